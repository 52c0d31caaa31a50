"""C++ of a program over edges: nodes in parallel, each by one thread, so no atomics, and the same sums every time.

Threads take chunks of nodes with about as many edges each. Rows of the edges to come are fetched ahead. Sums are taken
in float32 for 16-bit tensors, in float64 where an operand or a result is of float64.

The number of heads is a constant of a kernel, and that of columns where they are few: loops over them are unrolled, and
what is computed once for each head is so for all heads in one vector. Masks stay bits: a word of them is shifted by the
lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path

from .program import COMPARING, INNER, OPS, Operand, Output, Program, parse, width

TYPES = {"float32": "float", "float64": "double", "bfloat16": "bf16", "bool": "uint8_t", "bits": "uint8_t"}

MATHS = "#include <cmath>\n"  # takes a compiler as long as all the rest: only where a program needs it
HEAD = Path(__file__).with_name("head.cpp").read_text()

INFINITY = "std::numeric_limits<T>::infinity()"
LIMITS = {"inf": INFINITY, "-inf": f"(-{INFINITY})", "nan": "std::numeric_limits<T>::quiet_NaN()"}
START = {"sum": "T(0)", "total": "T(0)", "max": LIMITS["-inf"], "min": LIMITS["inf"]}
ARGUMENTS = "const void* const* in, void* const* out, const int32_t* pointer, const int32_t* order, "
ARGUMENTS += "const int32_t* const* index, int64_t nodes, int64_t columns, int32_t threads"
NARROW = 16  # columns, at most: few enough that their number is a constant
WORD, BLOCK = 32, 16  # bits of a word; of them those that are one vector's, wherever in a byte they begin
HEADS = 64  # heads, at most: what is computed for each is kept for all
AHEAD = 8  # edges: so far ahead rows are fetched


@lru_cache(maxsize=1024)
def generate(text: str, heads: int, columns: int) -> str:
    """The source of a function `run` that does what the program written down as `text` does.

    Args:
        heads, columns: the sizes of its axes; of columns 0 for any number above `NARROW`.
    """
    program = parse(text)
    return head(program) + Source(program, heads, columns).function()


def head(program: Program) -> str:
    """What the function of a program needs: T is the type that is computed in."""
    maths = any("std::" in OPS[step.op][0] for step in program.steps if step.op in OPS)
    return (MATHS if maths else "") + HEAD + f"typedef {'double' if program.is_double else 'float'} T;\n"


class Source:
    """Writes the source of a program, edge by edge."""

    def __init__(self, program: Program, heads: int, columns: int) -> None:
        self.program, self.columns = program, columns
        ends: tuple[Operand | Output, ...] = (*program.operands, *program.outputs)
        self.double = program.is_double
        self.levels = {part.level for part in (*ends, *program.steps)}
        self.has_heads = any("h" in level for level in self.levels)
        self.heads = heads if self.has_heads else 1
        self.folded = [i for i, o in enumerate(program.outputs) if o.kind in START]
        self.totals = [i for i, o in enumerate(program.outputs) if o.kind == "total"]  # of nodes', chunk by chunk
        self.masks = {i: self._mask(o) for i, o in enumerate(program.operands) if o.dtype == "bits"}
        self.bits_out = [i for i, o in enumerate(program.outputs) if o.dtype == "bits"]
        self.shown: Collection[int] | None = None  # the steps that results are computed with, if not all
        self.apart = [i for i in self.folded if not self._in_place(i)]  # summed up in a row of their own, then stored

    def _in_place(self, output: int) -> bool:
        made = self.program.outputs[output]
        return made.kind != "total" and made.dtype == ("float64" if self.double else "float32")

    def _mask(self, operand: Operand) -> str:
        """How bits are read: of a row that is a word, of blocks of a row, or unpacked, one in each byte."""
        level = operand.level
        if ("c" not in level or self.columns) and width(level, self.heads, self.columns, self.program.inner) <= WORD:
            return "word"
        return "bytes" if any(axis in INNER for axis in level) else "block"

    def function(self) -> str:
        program = self.program
        lines = [
            f'extern "C" void run({ARGUMENTS}) {{',
            f"const int64_t H = {self.heads}, C = {self.columns or 'columns'}, HC = H * C;",
            "const int64_t edges = pointer[nodes], work = edges + nodes;",
            *(f"const auto* const o{i} = (const {TYPES[o.dtype]}*)in[{i}];" for i, o in enumerate(program.operands)),
            *(f"auto* const r{i} = ({TYPES[o.dtype]}*)out[{i}];" for i, o in enumerate(program.outputs)),
            *self._before(),
            "const int64_t chunks = threads > 1 ? threads * 16 : 1;",
            *(f"Row<double> totals{i}(chunks * {self._size(i)});" for i in self.totals),
            "#pragma omp parallel num_threads(threads)",
            "{",
            *(f"Row<T> row{i}({self.width(program.outputs[i].level)});" for i in self.apart),
            *(
                f"Row<uint8_t> in_bits{i}({self.width(program.operands[i].level)} + 8);"
                for i, how in self.masks.items()
                if how != "word"
            ),
            *(f"Row<uint8_t> out_bits{i}({self.width(program.outputs[i].level)} + 8);" for i in self.bits_out),
            *self._thread(),
            f"#pragma omp for schedule({self.schedule})",
            "for (int64_t chunk = 0; chunk < chunks; chunk++) {",
            "int64_t ends[2];",
            "for (int64_t s = 0; s < 2; s++) {  // the first node before which there is so much work",
            "int64_t goal = work / chunks * (chunk + s), low = 0, high = nodes;",
            "while (low < high) {",
            "int64_t i = (low + high) / 2;",
            "if (pointer[i] + i < goal) low = i + 1; else high = i;",
            "}",
            "ends[s] = chunk + s == chunks ? nodes : low;",
            "}",
            *(f"double* const t{i} = totals{i}.data + chunk * {self._size(i)};" for i in self.totals),
            *self._chunk(),
            "}",
            *self._thread_done(),
            "}",
            *self._after(),
            *(line for i in self.totals for line in self._total(i)),
            "}",
        ]
        return "\n".join(lines) + "\n"

    schedule = "dynamic, 1"

    def _size(self, output: int) -> str:
        """The number of elements in a row of an output, in C++."""
        return self.width(self.program.outputs[output].level)

    def _total(self, output: int) -> list[str]:
        """Adds up what chunks add up to, in their order, in float64: there are as many nodes as there are."""
        size = self._size(output)
        return [
            f"for (int64_t f = 0; f < {size}; f++) {{",
            "double total = 0;",
            f"for (int64_t s = 0; s < chunks; s++) total += totals{output}.data[s * {size} + f];",
            f"store(r{output}, f, (T)total);",
            "}",
        ]

    def width(self, level: str) -> str:
        """The number of elements in a row, in C++."""
        return {"": "1", "h": "H", "c": "C", "hc": "HC"}[level]

    def at(self, level: str) -> str:
        """Where in a row an element is, in C++, after a number."""
        return {"": "", "h": " + h", "c": " + c", "hc": " + h * C + c"}[level]

    def _before(self) -> list[str]:
        """What comes before threads begin; then, what each does before and after its chunks, and what comes last."""
        return []

    def _thread(self) -> list[str]:
        return []

    def _thread_done(self) -> list[str]:
        return []

    def _after(self) -> list[str]:
        return []

    def _chunk(self) -> list[str]:
        """Goes over the nodes of a chunk, from `ends[0]` up to `ends[1]`."""
        everything = range(len(self.program.operands))
        return [
            "for (int64_t i = ends[0]; i < ends[1]; i++) {",
            *self._rows_of_node("i", everything),
            *self._begin(),
            "for (int64_t k = pointer[i]; k < pointer[i + 1]; k++) {",
            *self._rows_of_edge(everything, f"k + {AHEAD} < edges ? k + {AHEAD} : k"),
            *self._results(),
            "}",
            *self._end(),
            "}",
        ]

    def _rows_of_node(self, node: str, needed: Iterable[int]) -> list[str]:
        """Points at the rows of operands that are the same for all edges of a node."""
        lines = []
        for i in needed:
            operand = self.program.operands[i]
            if operand.where == "take" and operand.index < 0:
                lines.append(f"const auto* const __restrict p{i} = o{i} + {node} * {self.width(operand.level)};")
            elif operand.where == "all":
                lines.append(f"const auto* const __restrict p{i} = o{i};")
        return lines

    def _rows_of_edge(self, needed: Iterable[int], later: str) -> list[str]:
        """Points at the rows of operands for edge `k`; those that edge `later` needs are fetched."""
        operands = {i: self.program.operands[i] for i in needed}
        lines = ["const int64_t e = order ? order[k] : k;"]
        for j in sorted({o.index for o in operands.values() if o.where == "take" and o.index >= 0}):
            lines.append(f"const int64_t n{j} = index[{j}][k], next{j} = index[{j}][{later}];")
        if any(o.where == "edge" for o in operands.values()):
            lines.append(f"const int64_t later = order ? order[{later}] : e;")
        for i, operand in operands.items():
            width = self.width(operand.level)
            taken = operand.where == "take" and operand.index >= 0
            if not taken and operand.where != "edge":
                continue
            size = f"(({width} + 7) / 8)" if operand.dtype == "bits" else width
            row, ahead = (f"n{operand.index}", f"next{operand.index}") if taken else ("e", "later")
            nbytes = f"{size} * (int64_t)sizeof(*o{i})"
            address = f"(const char*)(o{i} + {ahead} * {size}) + f"
            lines.append(f"for (int64_t f = 0; f < {nbytes}; f += 64) __builtin_prefetch({address});")
            if operand.dtype != "bits":
                lines.append(f"const auto* const __restrict p{i} = o{i} + {row} * {size};")
            elif self.masks[i] == "word":
                lines.append(f"uint32_t m{i} = 0; memcpy(&m{i}, o{i} + {row} * {size}, {size});")
            else:
                how, number = ("unpack", width) if self.masks[i] == "bytes" else ("copy", size)
                lines.append(f"{how}(o{i} + {row} * {size}, {number}, in_bits{i}.data);")
                lines.append(f"const uint8_t* const __restrict p{i} = in_bits{i}.data;")
        return lines

    def _begin(self) -> list[str]:
        """Begins the sums and extrema of a node."""
        return [
            *self._accumulators(),
            *(
                f"for (int64_t f = 0; f < {self.width(o.level)}; f++) a{i}[f] = {START[o.kind]};"
                for i, o in enumerate(self.program.outputs)
                if i in self.folded
            ),
        ]

    def _accumulators(self) -> list[str]:
        """Points at what the edges of a node are added up in."""
        lines = []
        for i in self.folded:
            where = f"r{i} + i * {self.width(self.program.outputs[i].level)}"
            lines.append(f"T* const __restrict a{i} = {f'row{i}.data' if i in self.apart else where};")
        return lines

    def _end(self) -> list[str]:
        """Ends them."""
        lines = []
        for i in self.folded:
            output = self.program.outputs[i]
            size = self.width(output.level)
            if i in self.totals:
                lines.append(f"for (int64_t f = 0; f < {size}; f++) t{i}[f] += a{i}[f];")
                continue
            if output.kind != "sum":  # no edges: zero
                lines.append(f"if (pointer[i] == pointer[i + 1]) for (int64_t f = 0; f < {size}; f++) a{i}[f] = 0;")
            if i in self.apart:
                lines.append(f"for (int64_t f = 0; f < {size}; f++) store(r{i}, i * {size} + f, a{i}[f]);")
        return lines

    def _results(self) -> list[str]:
        """Computes what an edge adds to results, or is written down of it."""
        program = self.program
        lines = []
        lines += [f"uint8_t* const __restrict b{i} = out_bits{i}.data;" for i in self.bits_out]
        lines += self._steps("", self.shown)
        for i, output in enumerate(program.outputs):
            if _nest(output) == "" and output.kind != "dot":
                lines.append(self._write(i, output))
        if self.levels != {""} or any(o.kind == "dot" for o in program.outputs):
            lines += self._head()
        for i in self.bits_out:
            width = self.width(program.outputs[i].level)
            lines.append(f"pack(b{i}, {width}, r{i} + e * (({width} + 7) / 8));")
        return lines

    def _head(self) -> list[str]:
        """What is done for each head: first for all of them what has no columns, then the columns."""
        outputs = [(i, o) for i, o in enumerate(self.program.outputs) if _nest(o) != "" or o.kind == "dot"]
        by_head = [self._write(i, o) for i, o in outputs if _nest(o) == "h" and o.kind != "dot"]
        inner = [(i, o) for i, o in outputs if _nest(o) in ("c", "hc") or o.kind == "dot"]
        steps = self._steps("h", self.shown)
        heads = "for (int64_t h = 0; h < H; h++) {"
        if not 1 < self.heads <= HEADS:
            return [heads, *steps, *by_head, *self._columns(inner), "}"]
        shared = self._shared(inner)
        lines = [f"{'bool' if self.program.steps[j].op in COMPARING else 'T'} all{j}[H];" for j in shared]
        lines += ["#pragma omp simd", heads, *steps, *by_head, *(f"all{j}[h] = v{j};" for j in shared), "}"]
        if inner:
            lines += [heads, *(f"const auto v{j} = all{j}[h];" for j in shared), *self._columns(inner), "}"]
        return lines

    def _shared(self, inner: Iterable[tuple[int, Output]]) -> list[int]:
        """The steps without columns that are read where there are some."""
        read = {o.value for _, o in inner}
        read |= {
            str(a)
            for i, step in enumerate(self.program.steps)
            if "c" in step.level and (self.shown is None or i in self.shown)
            for a in step.arguments
        }
        return [i for i, step in enumerate(self.program.steps) if step.level == "h" and f"v{i}" in read]

    def _columns(self, inner: list[tuple[int, Output]]) -> list[str]:
        """The loop over the columns of a head."""
        if not inner:
            return []
        dots = [i for i, o in inner if o.kind == "dot"]
        steps = self._steps("c", self.shown)
        done = [f"d{i} += {self._value(o.value)};" if i in dots else self._write(i, o) for i, o in inner]
        text = " ".join((*steps, *done))
        blocks = [i for i, how in self.masks.items() if how == "block" and f"(m{i} " in text]
        if not blocks and not any(o.dtype == "bits" for _, o in inner):
            lines = [f"T d{i} = 0;" for i in dots]
            sums = f" reduction(+: {', '.join(f'd{i}' for i in dots)})" if dots else ""
            lines += [f"#pragma omp simd{sums}", "for (int64_t c = 0; c < C; c++) {", *steps, *done, "}"]
        else:
            done = [f"s{i}[l] += {self._value(o.value)};" if i in dots else self._write(i, o) for i, o in inner]
            lines = [f"T s{i}[{BLOCK}] = {{}}, d{i} = 0;" for i in dots]
            lines += [
                "const auto block = [&](const int64_t first, const int64_t size) __attribute__((always_inline)) {"
            ]
            for i in blocks:
                row = "h * C + " if "h" in self.program.operands[i].level else ""
                lines.append(f"const uint32_t m{i} = word(p{i}, {row}first);")
            lines += [
                "#pragma omp simd",
                "for (int64_t l = 0; l < size; l++) {", "const int64_t c = first + l;", *steps, *done, "}", "};",
                "int64_t f = 0;",
                f"for (; f + {BLOCK} <= C; f += {BLOCK}) block(f, {BLOCK});",
                "if (f < C) block(f, C - f);",
            ]  # fmt: skip
            lines += [f"for (int64_t l = 0; l < {BLOCK}; l++) d{i} += s{i}[l];" for i in dots]
        for i in dots:
            level = self.program.outputs[i].level
            lines.append(f"store(r{i}, e * {self.width(level)}{self.at(level)}, d{i});")
        return lines

    def _write(self, i: int, output: Output) -> str:
        level, kind, value = output.level, output.kind, self._value(output.value)
        if output.dtype == "bits":
            return f"b{i}[0{self.at(level)}] = {value};"
        if kind == "edge":
            return f"store(r{i}, e * {self.width(level)}{self.at(level)}, {value});"
        place = f"a{i}[0{self.at(level)}]"
        once = "h" in level or _nest(output) == "" or not self.has_heads
        new = {
            "sum": f"{place} + {value}" if once else f"{place} + (h ? T(0) : T({value}))",
            "max": f"larger({place}, T({value}))",
            "min": f"smaller({place}, T({value}))",
        }
        new["total"] = new["sum"]
        return f"{place} = {new[kind]};"

    def _steps(self, loop: str, only: Collection[int] | None = None) -> list[str]:
        """The steps that are computed in a loop: over nothing, heads, or columns; of these, `only` some."""
        lines = []
        for i, step in enumerate(self.program.steps):
            if only is not None and i not in only:
                continue
            if step.op != "product" and ("c" if "c" in step.level else step.level) == loop:
                values = [self._value(a) for a in step.arguments]
                lines.append(f"const auto v{i} = {OPS[step.op][0].format(*values)};")
        return lines

    def _value(self, argument: str | float) -> str:
        if not isinstance(argument, str):
            number = float(argument)
            if number != number or number in (float("inf"), float("-inf")):
                return LIMITS[str(number)]
            return f"T({number!r})"
        if argument[0] == "v":
            return argument
        i = int(argument[1:])
        at = self.at(self.program.operands[i].level)
        match self.masks.get(i):
            case "word":
                return f"((m{i} >> (0{at}) & 1u) != 0)"
            case "block":
                columns = "c" in self.program.operands[i].level
                return f"((m{i} >> l & 1u) != 0)" if columns else f"((p{i}[(0{at}) / 8] >> (0{at}) % 8 & 1) != 0)"
        return f"load(p{i}, 0{at})"


def _nest(output: Output) -> str:
    """The level at whose loop an output is written."""
    return "hc" if "c" in output.level else output.level
