"""Machine code of the Triton kernels, compiled for a GPU that need not be there, and what can be read from it.

Triton compiles for any NVIDIA architecture with the tools that it brings along. Pointers are declared divisible by 16,
as Triton's launcher finds them where a tensor owns its memory; without that, loads stay 4 bytes wide.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcompile.kernels.blocks.format import BlockFormat

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class MachineCode:
    """A kernel's code for one architecture. `elements`: that one program works on; `threads`: of one program."""

    registers: int
    instructions: Counter[str]
    elements: int
    threads: int
    ptx: str

    @property
    def per_element(self) -> float:
        """Instructions that one thread executes per element; code without loops, so each instruction counts once."""
        return self.instructions.total() * self.threads / self.elements

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return sum(n for op, n in self.instructions.items() if op.startswith(("LDL", "STL")))

    def widths(self, op: str) -> Counter[int]:
        """How many global accesses (`op` is "LDG" or "STG") there are of each width in bytes."""
        found: Counter[int] = Counter()
        for name, n in self.instructions.items():
            parts = name.split(".")
            if parts[0] == op:
                found[next((WIDTHS[p] for p in parts if p in WIDTHS), 4)] += n
        return found


WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so that kernels are not compiled"
    for tool in ("cuobjdump", "nvdisasm"):
        try:
            getattr(triton.knobs.nvidia, tool)
        except RuntimeError as error:
            return f"this triton brings no {tool}: {error}"
    return None


def machine_code(
    kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], warps: int, elements: int, capability: int
) -> MachineCode:
    """Compiles `kernel` for sm_`capability`. `pointers`: types of tensor arguments; scalars declare theirs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in pointers:
            signature[parameter.name] = pointers[parameter.name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "constexpr" if parameter.is_constexpr else parameter.annotation_type
    compiled = triton.compile(
        ASTSource(kernel, signature, dict(constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    nvidia = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(nvidia.cuobjdump.path, "-res-usage", cubin)
        code = _run(nvidia.nvdisasm.path, "-c", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    instructions = Counter(op for op in INSTRUCTION.findall(code) if op != "NOP")
    return MachineCode(int(registers[1]), instructions, elements, 32 * warps, compiled.asm["ptx"])


def _run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def quantize_code(
    fmt: BlockFormat, dtype: torch.dtype, capability: int, partial: bool = False, columns: int = 0
) -> MachineCode:
    """The code of `quantize` for an input of `dtype`; `partial`: for sizes whose last group is not full; `columns`:
    standardised."""
    from actcompile.kernels.blocks import triton_quantize as kernels

    units = kernels.Units(columns, columns > 0)
    tile = kernels.encode_tile(fmt, dtype.itemsize, units)
    return machine_code(
        kernels.quantize_kernel if fmt.words <= tile.width else kernels.quantize_long_kernel,
        _codec_pointers(fmt, dtype) | {"seed": "*i32"},
        kernels.encode_constants(fmt, partial, tile, units),
        tile.warps,
        tile.groups * fmt.group,
        capability,
    )


def again_code(op: str, fmt: BlockFormat, dtype: torch.dtype, capability: int) -> MachineCode:
    """The code that does tiles again whose blocks are not calm, of `quantize` or `dequantize` (`op`)."""
    from actcompile.kernels.blocks import triton_dequantize, triton_quantize

    encoding = op == "quantize"
    kernels: Any = triton_quantize if encoding else triton_dequantize
    tile = (kernels.encode_tile if encoding else kernels.decode_tile)(fmt, dtype.itemsize)
    return machine_code(
        kernels.quantize_again_kernel if encoding else kernels.dequantize_again_kernel,
        _codec_pointers(fmt, dtype) | ({"seed": "*i32"} if encoding else {}),
        kernels.again_constants(fmt, tile),
        tile.warps,
        tile.groups * fmt.group,
        capability,
    )


def dequantize_code(
    fmt: BlockFormat, dtype: torch.dtype, capability: int, partial: bool = False, columns: int = 0
) -> MachineCode:
    """The code of `dequantize` for an output of `dtype`."""
    from actcompile.kernels.blocks import triton_dequantize as kernels

    tile = kernels.decode_tile(fmt, dtype.itemsize)
    return machine_code(
        kernels.dequantize_kernel,
        _codec_pointers(fmt, dtype),
        kernels.decode_constants(fmt, partial, tile, kernels.Units(columns, columns > 0)),
        tile.warps,
        tile.groups * min(fmt.group, fmt.planes * tile.width),
        capability,
    )


def _codec_pointers(fmt: BlockFormat, dtype: torch.dtype) -> dict[str, str]:
    meta = TYPES[fmt.metadata]
    return {"x": TYPES[dtype], "words": "*i32", "low": meta, "high": meta, "shift": "*fp32", "scale": "*fp32"}


def bits_code(op: str, words: int, capability: int, partial: bool = False) -> MachineCode:
    """The code of `pack_bits` or `unpack_bits` (`op`) for groups of `words` words."""
    from actcompile.kernels.bits import triton_lossless as kernels

    tile = kernels.bit_tile(words)
    return machine_code(
        {"pack_bits": kernels.pack_kernel, "unpack_bits": kernels.unpack_kernel}[op],
        {"mask": "*u8", "packed": "*i32"},
        kernels.bit_constants(words, 32 * words + partial, tile),
        tile.warps,
        tile.groups * 32 * min(words, tile.width),
        capability,
    )


def edges_code(
    text: str, heads: int, columns: int, capability: int, degree: float = 7.0, pieces: bool = False
) -> MachineCode:
    """The code of the first output of a program over edges (`Program.dump`); `pieces`: of nodes with many edges.

    It has a loop over edges: instructions are counted once for it, `elements` are those of one turn.
    """
    from dataclasses import replace

    from actcompile.kernels.edges import triton_run as kernels
    from actcompile.kernels.edges.program import REDUCTIONS, parse

    program, chosen = parse(text), kernels.plan(text, 0, heads, columns, degree)
    output, tile = chosen.output, chosen.tile
    kinds = {
        "float64": "*fp64",
        "float32": "*fp32",
        "bfloat16": "*bf16",
        "float16": "*fp16",
        "bool": "*u8",
        "bits": "*u8",
    }
    pointers = {f"o{i}": kinds[program.operands[i].dtype] for i in chosen.operands}
    pointers |= {f"i{j}": "*i32" for j in chosen.indices}
    out = kinds["float32" if pieces and output.kind in REDUCTIONS else output.dtype]
    if pieces:
        tile = replace(tile, nodes=1, edges=tile.nodes * tile.edges)
    return machine_code(
        kernels.kernel(text, 0),
        pointers | {"out": out, "pointer": "*i32", "order": "*i32"},
        {"ORDERED": True, "PIECES": pieces, "H": heads, "C": columns, **tile.constants},
        tile.warps,
        tile.nodes * tile.edges * tile.heads * tile.columns,
        capability,
    )


def join_code(kind: str, columns: int, capability: int) -> MachineCode:
    """The code that makes rows of pieces."""
    from actcompile.kernels.edges import triton_lanes, triton_run
    from actcompile.kernels.edges.program import REDUCTIONS

    block = min(columns, triton_run.WIDEST)
    return machine_code(
        triton_lanes.join_kernel,
        {"pieces": "*fp32", "out": "*fp32", "pointer": "*i32"},
        {"KIND": kind, "START": REDUCTIONS[kind], "WIDTH": columns, "BLOCK": block, "AT_ONCE": triton_run.AT_ONCE},
        4,
        block * triton_run.AT_ONCE,
        capability,
    )
