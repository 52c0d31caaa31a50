"""The integer program against exhaustive search, and greedy beside it."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcompile.passes.plan.program import Demands, Program, Way, meets

POSITIONS = 6
noises = st.sampled_from([0.0, 1e-6, 1e-4, 0.003, 0.02, 0.5])
times = st.sampled_from([0.0, 1e-5, 3e-4, 0.01])


@st.composite
def ways(draw):
    held = []
    for _ in range(draw(st.integers(1, 2))):
        begin = draw(st.integers(0, POSITIONS - 1))
        held.append((draw(st.integers(0, 1000)), begin, draw(st.integers(begin, POSITIONS - 1))))
    return Way(tuple(held), draw(noises), draw(times))


@st.composite
def programs(draw):
    base = draw(st.lists(st.integers(0, 1500), min_size=POSITIONS, max_size=POSITIONS))
    return Program(base, draw(st.lists(st.lists(ways(), min_size=1, max_size=4), min_size=1, max_size=4)))


demands = st.builds(
    Demands,
    st.sampled_from([math.inf, 800, 1500, 2500]),
    st.sampled_from([math.inf, 1e-5, 0.01, 0.6]),
    st.sampled_from([math.inf, 1e-4, 0.011]),
)


@given(programs(), demands, st.sampled_from(["peak", "noise", "seconds"]))
@settings(max_examples=300, deadline=None)
def test_solution_is_the_best_of_all(program, wanted, objective):
    every = [program.evaluate(p) for p in itertools.product(*(range(len(w)) for w in program.activations))]
    allowed = [s for s in every if meets(s, wanted)]
    found, quick = program.solve(objective, wanted), program.greedy(objective, wanted)
    if not allowed:
        assert found is None and quick is None
        return
    best = min(s.of(objective) for s in allowed)
    assert found is not None and meets(found, wanted)
    spread = sum(max(getattr(w, objective) for w in a) for a in program.activations) if objective != "peak" else 2500
    assert found.of(objective) <= best + 2e-3 * spread  # ties are broken at that price
    if quick is not None:  # it may miss what there is
        assert meets(quick, wanted) and quick.of(objective) >= best - 1e-12


def test_peak_is_over_positions_and_not_a_sum():
    early, late = [Way(((1000, 0, 1),), 0, 0)], [Way(((900, 2, 3),), 0, 0)]
    assert Program([10, 10, 10, 10], [early, late]).evaluate([0, 0]).peak == 1010


def test_no_activation_at_all():
    program = Program([5, 7], [])
    assert program.solve("noise", Demands(peak=7)).peak == 7
    assert program.solve("noise", Demands(peak=6)) is None


def test_three_hundred_activations():
    """The size of a deep model: solved nearly to its end, and no worse than greedy."""
    import random

    rng = random.Random(0)
    steps = 900
    activations = []
    for i in range(300):
        size, weight = rng.randrange(1, 100) * 10**6, rng.lognormvariate(0, 2)
        begin, end = i + 1, steps - i - 1
        activations.append(
            [
                Way(((size * bits // 32, begin, end),), weight * 4.0**-bits if bits < 32 else 0.0, size * 1e-10)
                for bits in (1, 2, 4, 8, 32)
            ]
        )
    program = Program([10**8] * steps, activations)
    low, high = program.solve("peak", Demands()), program.solve("noise", Demands())
    wanted = Demands(peak=low.peak + (high.peak - low.peak) * 0.2)
    found, quick = program.solve("noise", wanted), program.greedy("noise", wanted)
    assert meets(found, wanted) and found.gap < 0.01
    assert found.noise <= quick.noise * 1.001


def test_bad_input_has_a_name():
    with pytest.raises(TypeError):
        Demands(peek=3)
