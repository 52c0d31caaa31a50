"""`sample_rows` and `restore_rows`: which rows are sure, how often the others are drawn, their mean and variance.

The statistical tests run on fixed seeds. With new seeds in every run each would raise a false alarm with a probability
below ALARM: counts by the exact binomial distribution, means by the normal approximation to 2,000 calls.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chi2, norm

from actcompile.kernels import restore_rows, sample_rows, sample_rows_nbytes
from actcompile.kernels.baselines import matrix
from actcompile.kernels.baselines.sample_rows import choose, uniform
from actcompile.kernels.blocks.random_bits import random_words
from tests.kernels.matrices import ODD, as_rows, check_fakes, check_symbolic_rows, matrices, nbytes
from tests.strategies import ACTIVATIONS, FLOATS, assert_same_bits, seed_tensor, seeds, values

ALARM = 1e-6
CALLS = 2000
SEED = seed_tensor(1)
MODERATE = st.sampled_from(("normal", "half zero", "constant", "integers", "large offset", "denormal"))
ratios = st.integers(1, 12)


def through(x, ratio, salt=0, seed=SEED):
    parts = sample_rows(x, seed, salt, ratio)
    return *parts, restore_rows(*parts, x.shape)


def sure_rows(norms, k):
    """The paper's |C| by trying all of them, and that bound: of a float64 vector of norms, its total not zero."""
    p = np.sort(norms)[::-1] / norms.sum()
    bounds = [(p[c:].sum()) / (k - c) for c in range(k)]
    return int(np.argmin(bounds)), min(bounds)


def lognormal(n, seed, sigma=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(sigma).exp()


# ---- what is chosen ------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.data(), seeds, st.floats(0, 3))
def test_the_number_of_sure_rows_minimises_the_papers_bound(n, data, seed, sigma):
    k = data.draw(st.integers(1, n - 1))
    norms = lognormal(n, seed, sigma)
    index, weight, sure = choose(norms, uniform(k, SEED, 0))
    c = int(sure)
    bound = float(norms.sort(descending=True).values[c:].sum() / norms.sum() / (k - c))
    assert bound == pytest.approx(sure_rows(norms.numpy(), k)[1], rel=1e-9)
    assert torch.equal(index[:c], norms.argsort(descending=True, stable=True)[:c])
    assert (weight[:c] == 1).all()
    assert not set(index[:c].tolist()) & set(index[c:].tolist())
    outside = norms.sum() - norms[index[:c]].sum()
    assert torch.allclose(weight[c:], outside / ((k - c) * norms[index[c:]]), rtol=1e-9)
    assert (weight >= 1 - 1e-9).all(), "no row that is drawn is expected more than once"


@given(matrices(MODERATE), ratios, st.integers(0, ACTIVATIONS - 1), seeds)
def test_rows_are_rows_of_the_matrix_times_their_weights(x, ratio, salt, seed):
    rows, index, restored = through(x, ratio, salt, seed_tensor(seed))
    truth = as_rows(x)
    k = math.ceil(len(truth) / ratio)
    assert rows.shape == (k, x.shape[-1]) and index.shape == (k,) and index.dtype == torch.int32
    assert nbytes((rows, index)) == sample_rows_nbytes(len(truth), x.shape[-1], ratio, x.dtype)
    if k < len(truth):
        weight = choose(truth.double().norm(dim=1), uniform(k, seed_tensor(seed), salt))[1]
        assert_same_bits(rows, (truth[index.long()].double() * weight[:, None]).to(x.dtype))
    expected = torch.zeros(truth.shape, dtype=x.dtype)
    for row, i in zip(rows, index.tolist(), strict=True):
        expected[i] += row
    assert_same_bits(restored, expected.view(x.shape))
    assert restored.is_contiguous()


@given(matrices(odd=True))
def test_with_ratio_one_every_row_is_kept(x):
    rows, index, restored = through(x, 1)
    assert torch.equal(index, torch.arange(len(rows), dtype=torch.int32))
    assert_same_bits(rows, as_rows(x))
    assert restored.shape == x.shape


@given(st.integers(1, 9), ratios, seeds)
def test_one_row_is_kept(columns, ratio, seed):
    x = values("normal", columns, seed).view(1, columns)
    assert_same_bits(through(x, ratio)[-1], x)


@given(st.integers(2, 80), st.integers(2, 9), st.data(), seeds)
def test_rows_of_zeros_need_no_room(n, ratio, data, seed):
    """If the others fit they are exact; if there are none, all is zero."""
    x = torch.zeros(n, 3)
    places = data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, math.ceil(n / ratio)))]
    x[places] = values("normal", 3 * len(places), seed).view(-1, 3)
    assert_same_bits(through(x, ratio)[-1], x)


@given(st.integers(2, 100), st.integers(2, 9))
def test_of_rows_of_equal_norm_none_is_sure(n, ratio):
    k = math.ceil(n / ratio)
    _, weight, sure = choose(torch.full((n,), 0.25, dtype=torch.float64), uniform(k, SEED, 0))
    assert int(sure) == 0
    assert torch.allclose(weight, torch.full((k,), n / k, dtype=torch.float64), rtol=1e-12)


@given(st.integers(2, 60), st.integers(2, 6), st.data(), seeds)
def test_rows_that_are_not_finite_come_first_and_as_they_are(n, ratio, data, seed):
    x = values("normal", 2 * n, seed).view(n, 2)
    bad = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    for row in bad:
        x[row, data.draw(st.integers(0, 1))] = data.draw(st.sampled_from(ODD))
    k = math.ceil(n / ratio)
    rows, index, restored = through(x, ratio)
    first = min(len(bad), k)
    assert index[:first].tolist() == bad[:first]
    assert_same_bits(rows[:first], x[bad[:first]])
    assert restored.isfinite().all(1).logical_not().nonzero()[:, 0].tolist() == bad[:first]


@given(st.integers(3, 60), st.data(), seeds)
def test_the_room_that_rows_that_are_not_finite_leave_is_used_as_the_paper_says(n, data, seed):
    norms = lognormal(n, seed, 1.5)
    k = data.draw(st.integers(1, n - 1))
    bad = data.draw(st.integers(0, k - 1))
    odd = torch.cat([torch.full((bad,), float("inf"), dtype=torch.float64), norms])
    room = k - bad
    assert int(choose(odd, uniform(k, SEED, 0))[2]) - bad == int(choose(norms, uniform(room, SEED, 0))[2])


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_norms_whose_squares_float32_cannot_hold(dtype):
    """The largest row is sure, though float32 would find an infinite norm; small rows are drawn by norms not zero."""
    x = torch.full((12, 4), 1e-30, dtype=dtype)
    x[5] = 1e38
    rows, index, restored = through(x, 4)
    assert index[0] == 5 and len(set(index.tolist()) - {5}) > 0
    assert_same_bits(restored[5], x[5])
    assert torch.allclose(rows[1:].float(), torch.full((2, 4), 11 / 2 * 1e-30), rtol=0.01)


@given(matrices(), ratios)
def test_in_runs_of_few_rows_as_at_once(x, ratio):
    whole = through(x, ratio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "CHUNK", 7)
        for ours, expected in zip(through(x, ratio), whole, strict=True):
            assert_same_bits(ours, expected)


# ---- chance --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), seeds, st.integers(0, ACTIVATIONS - 1))
def test_uniform_numbers_are_52_random_bits(count, seed, salt):
    numbers = uniform(count, seed_tensor(seed), salt).tolist()
    index = torch.arange(2 * count, dtype=torch.int32)
    words = [w % 2**32 for w in next(random_words(index, seed_tensor(seed), salt, 1)).tolist()]
    exact = [((words[2 * i] << 20 | words[2 * i + 1] >> 12) * 2 + 1) / 2**53 for i in range(count)]
    assert numbers == exact
    assert all(0 < u < 1 for u in numbers)


def test_uniform_numbers_are_uniform():
    numbers = torch.cat([uniform(10**5, SEED, salt) for salt in range(ACTIVATIONS)])
    counts = torch.histc(numbers, 1000, 0, 1)
    expected = len(numbers) / 1000
    assert chi2.ppf(ALARM / 2, 999) < float(((counts - expected) ** 2 / expected).sum()) < chi2.isf(ALARM / 2, 999)


NORMS = {"even": (40, 5, 0.2), "a few large": (40, 10, 1.5), "one drawn": (30, 10, 3.0)}


@pytest.mark.parametrize("name", NORMS)
def test_rows_are_drawn_as_often_as_their_probabilities_say(name):
    """Draws of all calls are independent: a row's count is binomial, and each row is tested by its exact tails."""
    n, k, sigma = NORMS[name]
    norms = lognormal(n, 4, sigma)
    seed = torch.randint(-(2**31), 2**31, (CALLS, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    index, _, sure = zip(*(choose(norms, uniform(k, seed, call)) for call in range(CALLS)), strict=True)
    c = int(sure[0])
    assert c < k and len(set(map(int, sure))) == 1
    drawn = torch.stack(index)[:, c:]
    counts = torch.bincount(drawn.reshape(-1), minlength=n).numpy()
    p = norms.clone()
    p[index[0][:c]] = 0
    p = (p / p.sum()).numpy()
    below, above = binom.cdf(counts, drawn.numel(), p), binom.sf(counts - 1, drawn.numel(), p)
    assert np.minimum(below, above).min() > ALARM / 2 / n
    assert (counts[index[0][:c]] == 0).all()


@pytest.mark.parametrize("ratio", [2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_is_the_matrix_and_the_variance_is_what_theory_says(ratio, dtype):
    """The squared error of draws from rows of norms `n_i` is in the mean `(sum(n)^2 - sum(n^2)) / (k - |C|)`.

    A bfloat16 row is rounded after it is weighted, the same way in every call: that much its mean may be off.
    """
    n = 48
    k = n // ratio
    x = (torch.randn(n, 3, generator=torch.Generator().manual_seed(6)) * lognormal(n, 7)[:, None]).to(dtype)
    seed = torch.randint(-(2**31), 2**31, (CALLS, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(8))
    truth = x.double()
    restored = torch.stack([through(x, ratio, call, seed)[-1] for call in range(CALLS)]).double()
    norms = truth.norm(dim=1)
    order = norms.argsort(descending=True)
    c, _ = sure_rows(norms.numpy(), k)
    sure, rest = order[:c], order[c:]
    assert (restored[:, sure] == truth[sure]).all()

    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    q = norms[rest] / norms[rest].sum()
    deviation = truth[rest].abs() * ((1 - q) / ((k - c) * q))[:, None].sqrt() / CALLS**0.5
    excess = (restored.mean(0)[rest] - truth[rest]).abs() - rounding * truth[rest].abs()
    assert (excess / deviation).max() < norm.isf(ALARM / 2 / truth[rest].numel())

    squares = (restored - truth).square().sum((1, 2))
    expected = float((norms[rest].sum() ** 2 - norms[rest].square().sum()) / (k - c))
    excess = (squares.mean() - expected).abs() - 2 * rounding * expected
    assert excess / (squares.std() / CALLS**0.5) < norm.isf(ALARM / 2)


def test_sure_rows_lower_the_variance():
    """Below that of drawing all rows, which is the paper's reason for them."""
    n, k = 64, 16
    norms = lognormal(n, 9, 1.5)
    c, _ = sure_rows(norms.numpy(), k)
    rest = norms.sort(descending=True).values[c:]
    assert c > 0
    seed = torch.randint(-(2**31), 2**31, (500, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    x = norms[:, None].float()
    errors = torch.stack([(through(x, 4, call, seed)[-1] - x).square().sum() for call in range(500)])
    drawn_only = float((norms.sum() ** 2 - norms.square().sum()) / k)
    assert float((rest.sum() ** 2 - rest.square().sum()) / (k - c)) < 0.5 * drawn_only
    assert float(errors.mean()) < 0.6 * drawn_only


@given(st.integers(0, ACTIVATIONS - 1), seeds, seeds)
def test_salt_and_seed_choose_the_rows_and_nothing_else_does(salt, seed, data_seed):
    x = values("normal", 600, data_seed).view(200, 3)
    _, index, _ = through(x, 2, salt, seed_tensor(seed))
    torch.rand(3)  # the default generator's state has no part in it
    assert torch.equal(through(x, 2, salt, seed_tensor(seed))[1], index)
    assert not torch.equal(through(x, 2, (salt + 1) % ACTIVATIONS, seed_tensor(seed))[1], index)
    assert not torch.equal(through(x, 2, salt, seed_tensor(seed) + 1)[1], index)


# ---- op ------------------------------------------------------------------------------------------------------------


@given(matrices(odd=True), ratios)
def test_fakes_agree_with_the_ops(x, ratio):
    check_fakes(lambda x, seed: through(x, ratio, 1, seed), x, SEED)


def test_fakes_do_not_guard_on_the_number_of_rows():
    rows, index, _ = check_symbolic_rows(lambda x, seed: through(x, 4, 1, seed), 16, SEED)
    assert rows.shape[1] == 16 and rows.shape[0] == index.shape[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(9, 7), (2, 3, 5), (0, 5), (1, 5)], ids=str)
def test_opcheck(size, dtype):
    x = values("normal", int(np.prod(size)), 0).to(dtype).view(size).transpose(0, -2)
    torch.library.opcheck(sample_rows.overload, (x, SEED, 2, 3))
    torch.library.opcheck(restore_rows.overload, (*sample_rows(x, SEED, 2, 3), list(x.shape)))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="ratio must be at least 1, got 0"):
        sample_rows(torch.randn(3, 7), SEED, 0, 0)
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        sample_rows(torch.randn(7), SEED, 0, 2)
    with pytest.raises(ValueError, match="x must be float32"):
        sample_rows(torch.ones(3, 7, dtype=torch.int64), SEED, 0, 2)
    with pytest.raises(ValueError, match="at most 2\\*\\*31 rows"):
        sample_rows(torch.empty(2**31 + 1, 0), SEED, 0, 2)
