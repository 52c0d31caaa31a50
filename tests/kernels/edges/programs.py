"""Random programs over edges and random graphs, for comparing what is compiled with what the reference computes."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from actcompile.kernels.edges.program import (
    COMPARING,
    REDUCTIONS,
    Operand,
    Output,
    Program,
    Step,
    packed,
    run_reference,
    width,
)

LEVELS = ("", "h", "c", "hc")
EXACT = {"add": 2, "sub": 2, "mul": 2, "div": 2, "neg": 1, "abs": 1, "sqrt": 1, "reciprocal": 1, "relu": 1}
EXACT |= {"maximum": 2, "minimum": 2, "where": 3, "float": 1}
ROUNDED = ("exp", "log", "log1p", "expm1", "rsqrt", "sin", "cos", "erf", "pow", "sigmoid", "tanh")
GRAPHS = ("none", "one node", "isolated", "hub", "duplicates", "sorted", "random")


def join(*levels):
    return "".join(axis for axis in "hc" if any(axis in level for level in levels))


@st.composite
def programs(draw, floats=("float32", "bfloat16")):
    """Programs whose comparisons only see what both sides compute to the bit, in float32 and in float64."""
    operands, values = [], []  # a value: its name, level, whether it is a bool, whether it is to the bit
    for i in range(draw(st.integers(1, 4))):
        where = draw(st.sampled_from(("take", "by", "edge", "all")))
        dtype = draw(st.sampled_from(floats))
        if i and draw(st.integers(0, 3)) == 0:
            dtype = "bits" if where == "edge" and draw(st.booleans()) else "bool"
        index = {"take": draw(st.integers(0, 1)), "by": -1}.get(where, -1)
        level = draw(st.sampled_from(LEVELS))
        operands.append(Operand("take" if where == "by" else where, index, level, dtype))
        values.append((f"o{i}", level, dtype in ("bool", "bits"), True))
    used = sorted({o.index for o in operands if o.where == "take" and o.index >= 0})
    operands = [Operand(o.where, used.index(o.index) if o.index >= 0 else -1, o.level, o.dtype) for o in operands]
    steps = []

    def pick(truth, exact=False, number=True):
        found = [v for v in values if v[2] == truth and (v[3] or not exact)]
        if not truth and number and draw(st.integers(0, 5)) == 0:
            return draw(st.sampled_from((0.5, -2.0, 1e-3, 1.0))), "", False, True
        return draw(st.sampled_from(found))

    for _ in range(draw(st.integers(0, 8))):
        truths = any(v[2] for v in values)
        op = draw(st.sampled_from((*EXACT, *ROUNDED, *COMPARING)))
        if op in ("and", "or", "not", "where") and not truths:
            op = "gt"
        if op in ("and", "or", "not"):
            given = [pick(True) for _ in range(1 if op == "not" else 2)]
        elif op in COMPARING:
            given = [pick(False, exact=True, number=False), pick(False, exact=True)]
        elif op == "where":
            given = [pick(True), pick(False), pick(False)]
        elif op == "pow":
            given = [pick(False, exact=True, number=False), (2.0, "", False, True)]
        elif op in ("div", "reciprocal", "sqrt", "maximum", "minimum", *ROUNDED):
            given = [pick(False, exact=True, number=False) for _ in range(EXACT.get(op, 1))]
        else:
            given = [pick(False, number=False), *(pick(False) for _ in range(EXACT[op] - 1))]
            if draw(st.booleans()):
                given.reverse()
        if all(not isinstance(g[0], str) for g in given):
            continue
        level = join(*(g[1] for g in given))
        exact = op not in ROUNDED and all(g[3] for g in given)
        steps.append(Step(op, tuple(g[0] for g in given), level))
        values.append((f"v{len(steps) - 1}", level, op in COMPARING, exact))
    outputs, exact = [], []
    for _ in range(draw(st.integers(1, 3))):
        name, level, truth, bits = draw(st.sampled_from(values[-4:]))
        kind = draw(st.sampled_from(("edge",) if truth else (*REDUCTIONS, "edge", "dot", "total")))
        if kind == "dot":
            level = level.replace("c", "")
        elif kind != "edge" or draw(st.booleans()):
            level = join(level, draw(st.sampled_from(LEVELS))) if not truth else level
        outputs.append(Output(kind, name, level, draw(st.sampled_from(("bool", "bits") if truth else floats))))
        exact.append(bits and kind not in ("dot", "total"))
    return Program(tuple(operands), tuple(steps), tuple(outputs)), exact


def is_close(ours, expected, rtol, program, i, *of):
    """Whether output `i` of a program is the expected one, as far as sums round: by the size of what is summed up.

    of: what `run_reference` takes behind the program.
    """
    output, size = program.outputs[i], expected.double().abs()
    if output.kind in ("sum", "dot", "total"):
        value = Step("abs", (output.value,), program.level_of(output.value))
        sums = replace(output, value=f"v{len(program.steps)}", dtype="float64")
        (size,) = run_reference(Program(program.operands, (*program.steps, value), (sums,)), *of)
    ours, expected, size = (x.double().nan_to_num(7, 1e30, -1e30) for x in (ours, expected, size))
    return bool(((ours - expected).abs() <= rtol * (1 + size)).all())


def graph(kind, index=torch.int64, seed=0):
    """The nodes that edges are grouped by, two others, and the number of nodes."""
    generator = torch.Generator().manual_seed(seed)
    nodes = 1 if kind == "one node" else 23
    count = 0 if kind == "none" else 131
    by = torch.randint(nodes, (count,), generator=generator)
    if kind == "isolated":
        by = by % 5 + 3
    if kind == "hub":
        by[torch.rand(count, generator=generator) < 0.8] = 7
    others = [torch.randint(nodes, (count,), generator=generator) for _ in range(2)]
    if kind == "duplicates":
        by, others = by[:40].repeat(4)[:count], [other[:40].repeat(4)[:count] for other in others]
    if kind == "sorted":
        by = by.sort().values
    return by.to(index), [other.to(index) for other in others], nodes


def data(program, nodes, edges, heads, columns, seed=0, special=0.0):
    """Operands: of a few values, so that there are ties; a share of them infinite or NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"take": nodes, "edge": edges, "all": 1}
    tensors = []
    for operand in program.operands:
        level = operand.level
        if operand.where == "matrix":
            rows["matrix"], level = width(level[0], heads, columns, program.inner), level[1:]
        size = rows[operand.where], width(level, heads, columns, program.inner)
        x = (2 * torch.randn(size, generator=generator, dtype=torch.float64)).round() / 2
        for value in (torch.inf, -torch.inf, torch.nan):
            x[torch.rand(size, generator=generator) < special] = value
        if operand.dtype in ("bool", "bits"):
            tensors.append(packed(x > 0) if operand.dtype == "bits" else x > 0)
        else:
            tensors.append(x.to(getattr(torch, operand.dtype)))
    return tensors
