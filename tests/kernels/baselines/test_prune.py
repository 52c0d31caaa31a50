"""`prune` and `restore_pruned`: the largest magnitudes of every row come back to the bit, all else as zero."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcompile.kernels import prune, prune_nbytes, restore_pruned
from actcompile.kernels.baselines import matrix
from actcompile.kernels.baselines.prune import column_dtype
from tests.kernels.matrices import as_rows, check_fakes, check_symbolic_rows, matrices, nbytes
from tests.strategies import FLOATS, assert_same_bits, values


@st.composite
def cases(draw):
    x = draw(matrices(odd=True))
    columns = x.shape[-1]
    return x, draw(st.integers(min(1, columns), columns))


def through(x, kept):
    parts = prune(x, kept)
    return *parts, restore_pruned(*parts, x.shape)


def largest(x, kept):
    """Columns (rows, kept): NaN first, then by magnitude, then from the left."""
    magnitude = as_rows(x).double().abs().numpy()
    column = np.broadcast_to(np.arange(magnitude.shape[1]), magnitude.shape)
    return np.lexsort((column, -magnitude, ~np.isnan(magnitude)), axis=1)[:, :kept]


@given(cases())
def test_the_largest_magnitudes_are_kept_of_equal_ones_the_first(case):
    x, kept = case
    values, index, restored = through(x, kept)
    column = torch.from_numpy(largest(x, kept))
    assert torch.equal(index.long(), column)
    assert_same_bits(values, as_rows(x).gather(1, column))
    assert_same_bits(restored, torch.zeros_like(as_rows(x)).scatter_(1, column, values).view(x.shape))
    assert restored.is_contiguous()
    assert nbytes((values, index)) == prune_nbytes(len(values), x.shape[-1], kept, x.dtype)


@given(matrices(odd=True))
def test_a_row_that_is_kept_whole_comes_back(x):
    assert_same_bits(through(x, x.shape[-1])[-1], x.contiguous())


@given(cases())
def test_rows_that_are_not_finite_do_not_come_back_finite_and_others_do(case):
    x, kept = case
    restored = through(x, kept)[-1]
    assert torch.equal(restored.isfinite().all(-1), x.isfinite().all(-1))


@given(cases())
def test_in_runs_of_few_rows_as_at_once(case):
    x, kept = case
    whole = through(x, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "CHUNK", 7)
        for ours, expected in zip(through(x, kept), whole, strict=True):
            assert_same_bits(ours, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (256, torch.uint8),
        (257, torch.int16),
        (2**15, torch.int16),
        (2**15 + 1, torch.int32),
        (2**16, torch.int32),
        (2**16 + 1, torch.int32),
    ],
)
def test_columns_take_as_few_bytes_as_hold_the_last_one(columns, expected, dtype):
    x = values("normal", 3 * columns, columns).view(3, columns).to(dtype)
    x[0, 0] = x[0, -1] = -100
    x[1] = 1
    kept, index, restored = through(x, 5)
    assert index.dtype == column_dtype(columns) == expected
    assert index[0, :2].tolist() == [0, columns - 1]
    assert index[1].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(restored.gather(1, index.long()), kept)


@given(cases())
def test_fakes_agree_with_the_ops(case):
    x, kept = case
    check_fakes(lambda x: through(x, kept), x)


def test_fakes_do_not_guard_on_the_number_of_rows():
    values, index, _ = check_symbolic_rows(lambda x: through(x, 4), 16)
    assert values.shape[1] == index.shape[1] == 4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(4, 7), (2, 3, 5), (0, 5), (300, 2)], ids=str)
def test_opcheck(size, dtype):
    x = values("normal", int(np.prod(size)), 0).to(dtype).view(size).transpose(0, -2)
    torch.library.opcheck(prune.overload, (x, 2))
    torch.library.opcheck(restore_pruned.overload, (*prune(x, 2), list(x.shape)))


@pytest.mark.parametrize("kept", [0, 8, -1])
def test_how_many_to_keep_is_checked(kept):
    with pytest.raises(ValueError, match="kept must be from 1 to 7"):
        prune(torch.randn(3, 7), kept)


def test_tensors_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        prune(torch.randn(7), 2)
    with pytest.raises(ValueError, match="x must be float32"):
        prune(torch.ones(3, 7, dtype=torch.int32), 2)
