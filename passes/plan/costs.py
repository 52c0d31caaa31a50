"""What it costs to keep an activation one way or another: bytes are exact, seconds and noise are modelled or measured.

*Noise* is the squared relative error of all gradients together that rounding one activation adds: the variance of the
gradients over their squared norm. Rounding is independent from activation to activation, so that these add up, and
their root is the relative error of a step. `actcompile.measure` takes it from the model, format by format. Where it was
not measured, it is the rounding's variance relative to that of normal values, times the activation's share of all
rounded elements: right in order of magnitude where the rows of gradients are incoherent, too much elsewhere.

*Seconds* are those of encoding and decoding, by elements, from `Speeds`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.format import BITS
from actcompile.kernels.blocks.levels import ClippedNormal, expected_variance, level_values

from ..codecs.codecs import EXACT, Codec, Quantize
from ..codecs.standardise import PRODUCTS
from ..graph.find import numel_hint, own_nbytes
from ..graph.split import Split, is_tensor, is_view

ops = torch.ops.actcompile


@functools.lru_cache(maxsize=256)
def relative_variance(fmt: BlockFormat) -> float:
    """The variance of rounding normal values of variance 1 (i-EXACT, eq. 9, in units of the values)."""
    block = max(3, fmt.block)
    model = ClippedNormal(fmt.top, block)
    return expected_variance(level_values(fmt.bits, block, fmt.levels), model) / model.sigma**2


def codec_name(codec: Codec) -> str:
    """What names a codec where its noise is noted: `2x64-variance-minimising-bfloat16`, or `cast(bfloat16)`."""
    if not isinstance(codec, Quantize):
        return str(codec)
    fmt = codec.format
    return f"{fmt.bits}x{fmt.block}-{fmt.levels}-{str(fmt.metadata).removeprefix('torch.')}"


@dataclass(frozen=True)
class Noise:
    """The noise of formats by activation, as `actcompile.measure` found it."""

    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of(self, key: str, codec: Codec, share: float) -> float:
        """What an activation adds, with a codec; `share`: of all elements that may be rounded."""
        if isinstance(codec, EXACT):
            return 0.0
        known = self.measured.get(key, {}).get(codec_name(codec))
        if known is not None:
            return known
        return share * (relative_variance(codec.format) if isinstance(codec, Quantize) else 2.0**-18)

    def knows(self, key: str, codec: Codec) -> bool:
        """Whether it was measured."""
        return codec_name(codec) in self.measured.get(key, {})


@dataclass(frozen=True)
class Speeds:
    """How fast a device encodes and decodes, in nanoseconds per element, by bits.

    The defaults are what `measure_speeds` found on two cores of an AMD EPYC with AVX-512.

    Attributes:
        gflops, gbytes: of products in float32, and of copies, reads and writes counted; per second, in 10**9.
    """

    encode: Mapping[int, float] = field(default_factory=lambda: {1: 0.5, 2: 0.5, 4: 0.8, 8: 1.2})
    decode: Mapping[int, float] = field(default_factory=lambda: {1: 1.7, 2: 1.8, 4: 2.1, 8: 2.3})
    gflops: float = 240.0
    gbytes: float = 4.2

    def seconds(self, codec: Codec, numel: int) -> float:
        """Of encoding and decoding an activation once."""
        if not isinstance(codec, Quantize):
            return 0.0
        bits = codec.format.bits
        return numel * (self.encode[bits] + self.decode[bits]) * 1e-9

    def step(self, split: Split) -> float:
        """Seconds of both graphs without codecs: products by their operations, all else by the bytes it moves."""
        total = 0.0
        for graph in (split.forward.graph, split.backward.graph):
            for node in graph.nodes:
                if node.op == "call_function" and is_tensor(node) and not is_view(node):
                    tensors = [n for n in (node, *node.all_input_nodes) if is_tensor(n)]
                    if node.target in PRODUCTS:
                        a, b = node.args[-2:]
                        inner = numel_hint(a.meta["val"]) / max(a.meta["val"].shape[-2], 1)  # type: ignore[union-attr]
                        total += 2e-9 * numel_hint(node.meta["val"]) * inner / self.gflops
                    else:
                        total += 1e-9 * sum(own_nbytes(n.meta["val"]) for n in tensors) / self.gbytes
        return total


def measure_speeds(device: str = "cpu", elements: int = 2**24, repeats: int = 3) -> Speeds:
    """Times the kernels of every number of bits on a device: the median of some repeats, a few seconds in all."""
    x = torch.randn(elements // 256, 256, device=device)
    seed = torch.ops.actcompile.draw_seed(1, x.device)
    encode, decode = {}, {}
    for bits in BITS:
        fmt = BlockFormat(bits, 64, "variance-minimising", torch.bfloat16)
        fields = (fmt.bits, fmt.block, fmt.levels)
        to_words = functools.partial(ops.quantize, x, seed, 0, *fields, fmt.metadata, fmt.words)
        back = functools.partial(ops.dequantize, *to_words(), list(x.shape), x.dtype, *fields)
        back()  # both are compiled now
        encode[bits], decode[bits] = _median(to_words, device, repeats), _median(back, device, repeats)
    square = torch.randn(2048, 2048, device=device)
    product = _median(functools.partial(torch.mm, square, square), device, repeats)
    copy = _median(x.clone, device, repeats)
    per_element = 1e9 / x.numel()
    return Speeds(
        {b: t * per_element for b, t in encode.items()},
        {b: t * per_element for b, t in decode.items()},
        gflops=2e-9 * 2048**3 / product,
        gbytes=2e-9 * x.numel() * x.element_size() / copy,
    )


def speeds(device: str, folder: Path) -> Speeds:
    """Those that were measured on this device with this torch, kept in `folder`; measured now where there are none."""
    name = device if device == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-")
    path = folder / f"speeds-{name}-{torch.get_num_threads()}-torch-{torch.__version__}.json"
    try:
        known = json.loads(path.read_text())
        encode, decode = ({int(b): t for b, t in known[key].items()} for key in ("encode", "decode"))
        return Speeds(encode, decode, known["gflops"], known["gbytes"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or no longer of this form
        found = measure_speeds(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)))
        return found


def _median(call: Callable[[], object], device: str, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]
