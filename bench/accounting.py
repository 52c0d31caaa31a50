"""A byte model of the activation memory that i-EXACT published (arXiv 2309.11856, table 1, ogbn-arxiv), from shapes.

Stated in the papers (EXACT, ICLR 2022; i-EXACT, ICASSP 2024): the network (GraphSAGE, 3 layers of 128, BatchNorm,
dropout), 2 bits, projection to an eighth, bfloat16 minimum and scale, blocks of G/R projected rows.

Read from the authors' code (github.com/saintslab/i-Exact, September 2023), not in the papers:

- memory is `torch.cuda.memory_allocated` before backward, less that before forward, less the logits and the loss: the
  data set's features cost nothing in full precision, but their compressed copy is new memory and counts;
- a layer's features are encoded once, for the aggregation and the linear layer; so is the aggregate: two tensors and
  two projection matrices (float32) to a layer;
- BatchNorm's inputs are not projected; a block of them too has G/R rows, but no block has more than 1,024 elements;
- rows that fill no block stay in float32;
- ReLU and dropout each keep a mask of 1 bit per element;
- the loss keeps the training nodes' labels (int64), gathered from all labels: eight bytes per training node, as many as
  the training indices.

Inferred: in full precision ReLU keeps its output, dropout a mask of one byte per element (what torch 1.9 did). Of the
compressed entries the model misses 0.01 to 0.02 MB: BatchNorm's statistics, the allocator's rounding, and what else we
did not find.
"""

from __future__ import annotations

from dataclasses import dataclass

from actcompile import Report

MB = 2**20  # the paper's megabyte
LARGEST_BLOCK = 1024
FLOAT, LABEL, METADATA = 4, 8, 2 * 2  # bytes of a float32, of an int64, of a block's minimum and scale in bfloat16
FULL_PRECISION = "FP32"

# i-EXACT, table 1: MB of 2**20 bytes, in full precision and by G/R, the projected rows of a block (1: EXACT)
PUBLISHED: dict[str | int, float] = {
    FULL_PRECISION: 786.22,
    1: 30.47,
    2: 27.89,
    4: 26.60,
    8: 25.95,
    16: 25.72,
    32: 25.60,
    64: 25.56,
}


@dataclass(frozen=True)
class Setting:
    """The published network and graph; `classes` is for building it, since the logits are not counted."""

    nodes: int = 169_343
    training_nodes: int = 90_941
    features: int = 128
    hidden: int = 128
    classes: int = 40
    layers: int = 3

    @property
    def widths(self) -> list[int]:
        """Elements per node of every layer's input."""
        return [self.features] + [self.hidden] * (self.layers - 1)

    @property
    def labels(self) -> int:
        """Bytes of the training nodes' labels, which the loss saves."""
        return LABEL * self.training_nodes


def full_precision_bytes(setting: Setting) -> int:
    """Bytes saved without compression.

    Every layer's aggregate, every layer's features but the first's, which are the data set's; between layers
    BatchNorm's input, ReLU's output and dropout's mask.
    """
    inputs = sum(setting.widths) + sum(setting.widths[1:])
    between = (setting.layers - 1) * setting.hidden
    return setting.nodes * (FLOAT * inputs + (FLOAT + FLOAT + 1) * between) + setting.labels


def compressed_bytes(setting: Setting, rows_per_block: int = 1, reduction: int = 8, bits: int = 2) -> int:
    """Bytes saved by EXACT (`rows_per_block` 1) or i-EXACT.

    Args:
        setting: network and graph.
        rows_per_block: G/R in the paper, rows that share a minimum and a scale.
        reduction: D/R, how many times fewer elements a projected row has.
        bits: bits per element.
    """
    total = setting.labels
    for width in setting.widths:
        projected = -(-width // reduction)
        matrix = FLOAT * width * projected
        total += 2 * (quantized_bytes(setting.nodes, projected, rows_per_block, bits) + matrix)
    masks = 2 * -(-setting.nodes * setting.hidden // 8)
    norm = quantized_bytes(setting.nodes, setting.hidden, rows_per_block, bits)
    return total + (setting.layers - 1) * (norm + masks)


def quantized_bytes(rows: int, width: int, rows_per_block: int, bits: int) -> int:
    """Bytes of [rows, width] floats as i-EXACT keeps them: payload, metadata, and the last rows in float32."""
    per_block = min(rows_per_block, max(1, LARGEST_BLOCK // width))
    blocks, left = divmod(rows, per_block)
    payload = -(-blocks * per_block * width * bits // 8)
    return payload + METADATA * blocks + FLOAT * left * width


def modelled() -> dict[str | int, float]:
    """What the model says for every entry of `PUBLISHED`, in MB of 2**20 bytes."""
    setting = Setting()
    return {
        key: (full_precision_bytes(setting) if isinstance(key, str) else compressed_bytes(setting, key)) / MB
        for key in PUBLISHED
    }


def in_their_convention(report: Report, training_nodes: int) -> float:
    """What a plan saves, counted as the paper counts, in MB of 2**20 bytes.

    Args:
        report: of the whole model, traced at the sizes of interest; its payload, metadata and masks are counted.
        training_nodes: whose labels the loss saves, outside the model.
    """
    return (report.saved_bytes_after + LABEL * training_nodes) / MB
