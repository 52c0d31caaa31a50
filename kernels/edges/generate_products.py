"""C++ of a program with matrix products: edges in tiles of eight, so that a matrix is read once for eight rows.

Tiles go over the edges in the order of their nodes, across nodes. For each product the rows that it needs are computed
first, then multiplied; what was multiplied is not computed again. Matrices and rows are padded to whole vectors.

What is summed up over all edges, the outer products of two rows, is summed up by each thread in a matrix of its own,
and there over 1,024 edges at a time, so that not all of them round at the size of the whole sum. Threads have the same
edges every time, so sums are the same for the same number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from .generate import Source, head
from .program import INNER, Output, Program, parse

TILE = 8
PRODUCTS = Path(__file__).with_name("products.cpp").read_text()


@lru_cache(maxsize=1024)
def generate_products(text: str, heads: int, columns: int) -> str:
    """The source of a function `run` that does what the program written down as `text` does; sizes as in `generate`."""
    program = parse(text)
    return head(program) + PRODUCTS + _Tiled(program, heads, columns).function()


class _Tiled(Source):
    schedule = "static"

    def __init__(self, program: Program, heads: int, columns: int) -> None:
        super().__init__(program, heads, columns)
        self.products = [i for i, step in enumerate(program.steps) if step.op == "product"]
        self.outer = [i for i, output in enumerate(program.outputs) if output.kind == "outer"]
        self.shown = self._needed([output.value for output in program.outputs])[0]

    def width(self, level: str) -> str:
        if level and level[0] in INNER:  # an inner axis, or a matrix
            size = str(self.program.inner[INNER.index(level[0])])
            return size if len(level) == 1 else f"{size} * {self.width(level[1:])}"
        return super().width(level)

    def at(self, level: str) -> str:
        return f" + {level}" if level in tuple(INNER) else super().at(level)

    def _axis(self, product: int) -> str:
        """The inner axis of a product."""
        return self._matrix(product)[1][0]

    def _matrix(self, product: int) -> tuple[int, str]:
        """The operand that a product multiplies with, and its level."""
        i = int(str(self.program.steps[product].arguments[1])[1:])
        return i, self.program.operands[i].level

    def _before(self) -> list[str]:
        lines = []
        for t in self.products:
            i, level = self._matrix(t)
            inner, width = self.width(level[0]), self.width(level[1:])
            lines += [
                f"const int64_t stride{t} = padded({width});",
                f"Row<T> matrix{t}({inner} * stride{t});",
                f"for (int64_t x = 0; x < {inner}; x++) for (int64_t f = 0; f < {width}; f++)",
                f"matrix{t}.data[x * stride{t} + f] = load(o{i}, x * {width} + f);",
            ]
        for i in self.outer:
            inner, width = self._sizes(i)
            lines += [
                f"const int64_t wide{i} = padded({width});",
                f"const int64_t size{i} = {inner} * wide{i};",
                f"Row<T> sums{i}(threads * size{i});",
            ]
        return lines

    def _sizes(self, output: int) -> tuple[str, str]:
        """The number of rows and of columns of a sum of outer products."""
        made = self.program.outputs[output]
        return self.width(made.axis), self.width(made.level)

    def _thread(self) -> list[str]:
        lines = ["int64_t node[TILE];"]
        for t in self.products:
            inner = self.width(self._axis(t))
            lines.append(f"Row<T> in{t}(TILE * {inner}), tile{t}(TILE * stride{t});")
        for i in self.outer:
            inner, _ = self._sizes(i)
            lines.append(f"Row<T> left{i}(TILE * {inner}), right{i}(TILE * wide{i});")
            lines.append(f"Row<T> part{i}(size{i}), sum{i}(size{i});")
        if self.outer:
            lines.append("int64_t tiles = 0;")
        return lines

    def _thread_done(self) -> list[str]:
        lines = []
        for i in self.outer:
            lines += [
                f"flush(part{i}.data, sum{i}.data, size{i});",
                "#ifdef _OPENMP",
                f"memcpy(sums{i}.data + omp_get_thread_num() * size{i}, sum{i}.data, size{i} * sizeof(T));",
                "#else",
                f"memcpy(sums{i}.data, sum{i}.data, size{i} * sizeof(T));",
                "#endif",
            ]
        return lines

    def _after(self) -> list[str]:
        lines = []
        for i in self.outer:
            inner, width = self._sizes(i)
            lines += [
                f"for (int64_t x = 0; x < {inner}; x++) for (int64_t f = 0; f < {width}; f++) {{",
                "T total = 0;",
                f"for (int64_t t = 0; t < threads; t++) total += sums{i}.data[t * size{i} + x * wide{i} + f];",
                f"store(r{i}, x * {width} + f, total);",
                "}",
            ]
        return lines

    def _chunk(self) -> list[str]:
        lines = []
        if self.folded:  # nodes without edges
            lines += ["for (int64_t i = ends[0]; i < ends[1]; i++) {", "if (pointer[i] == pointer[i + 1]) {"]
            lines += [*self._begin(), *self._end(), "}", "}"]
        lines += [
            "int64_t next = ends[0];",
            "const int64_t last = pointer[ends[1]];",
            "for (int64_t first = pointer[ends[0]]; first < last; first += TILE) {",
            "const int64_t count = last - first < TILE ? last - first : TILE;",
            "for (int64_t m = 0; m < count; m++) {",
            "while (pointer[next + 1] <= first + m) next++;",
            "node[m] = next;",
            "}",
        ]
        for i in self.outer:
            inner, _ = self._sizes(i)
            lines += [
                f"if (count < TILE) memset(left{i}.data, 0, TILE * {inner} * sizeof(T));",
                f"if (count < TILE) memset(right{i}.data, 0, TILE * wide{i} * sizeof(T));",
            ]
        for t in self.products:
            value = self.program.steps[t].arguments[0]
            lines += self._filled(f"in{t}", str(value), self._axis(t))
            lines.append(f"product(in{t}.data, matrix{t}.data, tile{t}.data, {self.width(self._axis(t))}, stride{t});")
        for i in self.outer:
            output = self.program.outputs[i]
            lines += self._filled(f"left{i}", output.other, output.axis)
        lines += [
            *self._each([o.value for o in self.program.outputs]),
            *self._accumulators(),
            "if (k == pointer[i]) {",
            *self._begin()[len(self.folded) :],
            "}",
            *self._results(),
            "if (k + 1 == pointer[i + 1]) {",
            *self._end(),
            "}",
            "}",
        ]
        for i in self.outer:
            inner, _ = self._sizes(i)
            lines.append(f"outer(left{i}.data, right{i}.data, part{i}.data, {inner}, wide{i});")
        if self.outer:
            lines += [
                "if (++tiles % 128 == 0) {",
                *(f"flush(part{i}.data, sum{i}.data, size{i});" for i in self.outer),
                "}",
            ]
        return [*lines, "}"]

    def _filled(self, buffer: str, value: str, axis: str) -> list[str]:
        """Computes rows of an inner axis, one for each edge of the tile."""
        size = self.width(axis)
        steps, _, _ = self._needed([value])
        return [
            *self._each([value]),
            f"T* const __restrict row = {buffer}.data + m * {size};",
            *self._steps("", steps),
            "#pragma omp simd",
            f"for (int64_t {axis} = 0; {axis} < {size}; {axis}++) {{",
            *self._steps(axis, steps),
            f"row[{axis}] = {self._value(value)};",
            "}",
            "}",
        ]

    def _each(self, values: Iterable[str]) -> list[str]:
        """Begins a loop over the edges of the tile, with what is read for some values."""
        _, operands, products = self._needed(values)
        return [
            "for (int64_t m = 0; m < count; m++) {",
            "const int64_t k = first + m, i = node[m];",
            *self._rows_of_node("i", operands),
            *self._rows_of_edge(operands, "k + TILE < edges ? k + TILE : k"),
            *(f"const T* const __restrict q{t} = tile{t}.data + m * stride{t};" for t in products),
        ]

    def _needed(self, values: Iterable[str]) -> tuple[set[int], list[int], list[int]]:
        """The steps, operands and results of products that values are computed of."""
        steps: set[int] = set()
        operands: set[int] = set()
        products: set[int] = set()
        todo = list(values)
        while todo:
            name = todo.pop()
            i = int(name[1:])
            if name[0] == "o":
                operands.add(i)
            elif i in self.products:
                products.add(i)
            elif i not in steps:
                steps.add(i)
                todo += [a for a in self.program.steps[i].arguments if isinstance(a, str)]
        return steps, sorted(operands), sorted(products)

    def _write(self, i: int, output: Output) -> str:
        if output.kind == "outer":
            return f"right{i}.data[m * wide{i}{self.at(output.level)}] = {self._value(output.value)};"
        return super()._write(i, output)

    def _value(self, argument: str | float) -> str:
        if isinstance(argument, str) and argument[0] == "v" and int(argument[1:]) in self.products:
            return f"q{argument[1:]}[0{self.at(self.program.level_of(argument))}]"
        return super()._value(argument)
