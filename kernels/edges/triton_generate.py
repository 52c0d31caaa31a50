"""Triton of one output of a program over edges: nodes in parallel, no atomics, and the same sums every time.

One program of the launch takes `BN` nodes by `BE` of their edges by `BH` heads by `BC` columns: a tile of
(BN * BE, BH, BC), whose first axis are *lanes*. It goes over its nodes' edges, `BE` at a time, whose lanes are added up
each time: as a rule one thread has them all, and keeps one sum instead of `BE`. Values of a level without heads, or
without columns, have a 1 there, so what is the same for all columns is read and computed once.

A node with more than `split` edges is left out, and done in pieces by a second launch of the same code (`PIECES`);
`triton_run` has the rest. Offsets of rows are 64 bit. Products and sums may not be contracted: a maximum is compared
with messages that another kernel computes.
"""

from __future__ import annotations

from functools import lru_cache
from math import isfinite

from .program import COMPARING, OPS, REDUCTIONS, Program, parse

START = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
FOLD = {"sum": "{0} + {1}", "max": "greatest({0}, {1})", "min": "least({0}, {1})"}
WIDTH = {"": "1", "h": "H", "c": "C", "hc": "(H * C)"}
PLACE = {"": "", "h": " + h", "c": " + c", "hc": " + (h * C + c)"}
NUMBERS = ("nodes", "edges", "split", "halvings")
SIZES = ("ORDERED", "PIECES", "H", "C", "BN", "BE", "BH", "BC")


@lru_cache(maxsize=1024)
def generate(text: str, output: int) -> str:
    """The source of a kernel `run` that computes one output of the program written down as `text`.

    Its arguments are the operands and indices that `reads` names, `out`, the grouping's `pointer` and `order` (any
    pointer unless `ORDERED`); numbers: nodes, edges, edges of a node above which it is left out, halvings of the nodes
    that find one; and sizes.
    """
    return _Source(parse(text), output).function()


@lru_cache(maxsize=1024)
def reads(text: str, output: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which operands and which indices one output needs."""
    source = _Source(parse(text), output)
    return tuple(source.operands), tuple(source.indices)


class _Source:
    def __init__(self, program: Program, output: int) -> None:
        self.program, self.output = program, program.outputs[output]
        needed, todo = set[str](), [self.output.value]
        while todo:
            name = todo.pop()
            if name not in needed:
                needed.add(name)
                if name[0] == "v":
                    todo += [a for a in program.steps[int(name[1:])].arguments if isinstance(a, str)]
        self.operands = sorted(int(name[1:]) for name in needed if name[0] == "o")
        self.steps = sorted(int(name[1:]) for name in needed if name[0] == "v")
        reading = [program.operands[i] for i in self.operands]
        self.indices = sorted({o.index for o in reading if o.where == "take" and o.index >= 0})
        self.type = "tl.float64" if program.is_double else "tl.float32"

    def function(self) -> str:
        pointers = [f"o{i}" for i in self.operands] + [f"i{j}" for j in self.indices]
        numbers = ", ".join(f"{name}: tl.int64" for name in NUMBERS)
        lines = [
            f"@triton.jit(do_not_specialize={list(NUMBERS)})",
            f"def run({', '.join(pointers)}, out, pointer, order, {numbers},",
            f"        {', '.join(f'{name}: tl.constexpr' for name in SIZES)}):",
            "    node, place, stop = lanes(pointer, nodes, edges, split, halvings, PIECES, BN, BE)",
            "    h, c = axes(BH, BC)",
            "    i = node[:, None, None]",
            *(f"    {line}" for line in self._before()),
            "    for j in range(0, tl.max(stop - place, 0).to(tl.int32), BE):",
            "        k = place + j",
            "        live = (k < stop)[:, None, None]",
            "        e = (tl.load(order + k, mask=k < stop, other=0).to(tl.int64) if ORDERED else k)[:, None, None]",
            *(f"        {line}" for line in self._edge()),
            *(f"    {line}" for line in self._after()),
        ]
        return "\n".join(lines) + "\n"

    def _before(self) -> list[str]:
        lines = []
        for i in self.operands:
            operand = self.program.operands[i]
            if operand.where == "all" or (operand.where == "take" and operand.index < 0):
                row = "" if operand.where == "all" else f" + i * {WIDTH[operand.level]}"
                lines.append(f"o{i}_ = {self._load(i, row, '')}")
        if self.output.kind in REDUCTIONS:
            lines.append(f"a = tl.full((BN, BH, BC), {START[self.output.kind]}, {self.type})")
        return lines

    def _edge(self) -> list[str]:
        lines = [f"n{j} = tl.load(i{j} + k, mask=k < stop, other=0).to(tl.int64)[:, None, None]" for j in self.indices]
        for i in self.operands:
            operand = self.program.operands[i]
            if operand.where == "edge" or (operand.where == "take" and operand.index >= 0):
                row = "e" if operand.where == "edge" else f"n{operand.index}"
                width = WIDTH[operand.level] if operand.dtype != "bits" else f"(({WIDTH[operand.level]} + 7) // 8)"
                lines.append(f"o{i}_ = {self._load(i, f' + {row} * {width}', 'live')}")
        for i in self.steps:
            step = self.program.steps[i]
            truths = {"and": 2, "or": 2, "not": 1, "where": 1}.get(step.op, 0)  # so many arguments
            arguments = (self._value(a, n < truths) for n, a in enumerate(step.arguments))
            lines.append(f"v{i}_ = {OPS[step.op][2].format(*arguments)}")
        return lines + self._written()

    def _written(self) -> list[str]:
        output, value = self.output, self._value(self.output.value, self.output.dtype in ("bool", "bits"))
        if output.kind in REDUCTIONS:
            every = f"tl.broadcast_to(tl.where(live, {value}, {START[output.kind]}), (BN * BE, BH, BC))"
            new = f'over_lanes({every}, "{output.kind}", BN, BE, BH, BC)'
            return [f"a = {FOLD[output.kind].format('a', new)}"]
        target, mask = f"out + e * {WIDTH[output.level]}{PLACE[output.level]}", _mask(output.level, "live")
        if output.kind == "dot":
            return [f"tl.store({target}, tl.sum(tl.where(c < C, {value}, 0.0), 2, keep_dims=True), mask={mask})"]
        if output.dtype == "bits":
            level = "hc" if "h" in output.level else "c"
            place, there = ("h * (C // 8) + b", "live & (h < H)") if level == "hc" else ("b", "live")
            return [
                f"byte, b = packed({value} & {_mask(level, 'live')}, BN * BE, BH, BC)",
                f"tl.store(out + e * (({WIDTH[level]} + 7) // 8) + {place}, byte, mask={there} & (b * 8 < C))",
            ]
        value = f"({value}).to(tl.uint8)" if output.dtype == "bool" else f"({value}).to(out.dtype.element_ty)"
        return [f"tl.store({target}, {value}, mask={mask})"]

    def _after(self) -> list[str]:
        output = self.output
        if output.kind not in REDUCTIONS:
            return []
        width = WIDTH[output.level]
        return [
            "row, stored, empty = rows(pointer, nodes, edges, split, PIECES, BN)",
            *(["a = tl.where(empty[:, None, None], 0.0, a)"] if output.kind != "sum" else []),
            f"tl.store(out + row[:, None, None] * {width}{PLACE[output.level]}, a.to(out.dtype.element_ty), "
            f"mask={_mask(output.level, 'stored[:, None, None]')})",
        ]

    def _load(self, i: int, row: str, live: str) -> str:
        """The elements of an operand's rows; `row` is what leads to them."""
        operand = self.program.operands[i]
        mask = _mask(operand.level, live)
        masked = f", mask={mask}, other=0" if mask else ""
        if operand.dtype == "bits":
            place = f"(0{PLACE[operand.level]})"
            return f"((tl.load(o{i}{row} + {place} // 8{masked}).to(tl.int32) >> {place} % 8) & 1) != 0"
        loaded = f"tl.load(o{i}{row}{PLACE[operand.level]}{masked})"
        return f"{loaded} != 0" if operand.dtype == "bool" else f"{loaded}.to({self.type})"

    def _value(self, argument: str | float, truth: bool) -> str:
        """An argument, as a truth value or as a number."""
        if not isinstance(argument, str):
            number = repr(float(argument)) if isfinite(argument) else f'float("{argument}")'
            return f"tl.full((1, 1, 1), {number}, {self.type})"
        return f"{argument}_" if truth or not self._is_truth(argument) else f"{argument}_.to({self.type})"

    def _is_truth(self, argument: str) -> bool:
        if argument[0] == "o":
            return self.program.operands[int(argument[1:])].dtype in ("bool", "bits")
        return self.program.steps[int(argument[1:])].op in COMPARING


def _mask(level: str, live: str) -> str:
    """Which elements of a level there are, in lanes that are `live`, an expression; empty where that is all of them."""
    return " & ".join([*([live] if live else []), *(f"({axis} < {axis.upper()})" for axis in level)])
