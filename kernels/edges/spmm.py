"""Products of a sparse matrix, given by the arrays of its CSR form, with a dense one.

torch's own kernels, called with dense arrays. A torch.sparse tensor can't go through `torch.compile`; an op that makes
one inside can, and backward's transpose is an op of the same arrays: they are inputs, so nothing is saved for it. The
graph reads as it computes, and no tensor has a row for each entry.

A matrix of `rows` x `columns` has `pointer`, of `rows + 1` elements, `index`, the column of each entry, and `value`.
"""

import torch
from torch import Tensor


def rows_of(pointer: Tensor, entries: int) -> Tensor:
    """The row of each entry: the inverse of a CSR's pointer. `entries` is known, so the device is not waited for."""
    entry = torch.arange(entries, dtype=pointer.dtype, device=pointer.device)
    return torch.searchsorted(pointer[1:], entry, right=True, out_int32=pointer.dtype == torch.int32)


def pointer_to(row: Tensor, number: int) -> Tensor:
    """The pointer of `number` rows to entries that are in the order of rows: the row of each. Any number of them."""
    edge = torch.arange(number + 1, dtype=row.dtype, device=row.device)
    return torch.searchsorted(row, edge, out_int32=row.dtype == torch.int32)


@torch.library.custom_op("actcompile::spmm", mutates_args=())
def spmm(pointer: Tensor, index: Tensor, value: Tensor, matrix: Tensor) -> Tensor:
    """The product of a sparse matrix with a dense one; linear in `value` and in `matrix`.

    Args:
        pointer, index: int64 or int32, (rows + 1,) and (entries,).
        value: (entries,), in the dtype of `matrix`.
        matrix: (columns, width).

    Returns:
        (rows, width). Rows without entries are zero.
    """
    return _multiply(pointer, index, value, matrix)


@spmm.register_fake
def _(pointer, index, value, matrix):
    return matrix.new_empty(pointer.shape[0] - 1, matrix.shape[1])


@torch.library.custom_op("actcompile::spmm_transposed", mutates_args=())
def spmm_transposed(pointer: Tensor, index: Tensor, value: Tensor, matrix: Tensor, columns: int) -> Tensor:
    """The product of a sparse matrix's transpose with a dense one of (rows, width), to one of (columns, width)."""
    order = torch.argsort(index, stable=True)
    return _multiply(pointer_to(index[order], columns), rows_of(pointer, index.shape[0])[order], value[order], matrix)


@spmm_transposed.register_fake
def _(pointer, index, value, matrix, columns):
    return matrix.new_empty(columns, matrix.shape[1])


@torch.library.custom_op("actcompile::spmm_extremum", mutates_args=())
def spmm_extremum(
    pointer: Tensor, index: Tensor, value: Tensor, matrix: Tensor, largest: bool
) -> tuple[Tensor, Tensor]:
    """The largest, or the smallest, of each row's weighted rows of `matrix`, column by column. On the CPU only.

    Returns:
        (rows, width) of the extrema, zero for rows without entries, and the entry that each is of; `entries` for none.
    """
    if index.shape[0] == 0:
        size = pointer.shape[0] - 1, matrix.shape[1]
        return matrix.new_zeros(size), index.new_zeros(size)
    with torch.enable_grad():  # torch's kernel tells the entries only where it thinks that a gradient needs them
        sparse = _csr(pointer, index, value, matrix.shape[0])
        matrix = matrix.detach().contiguous().requires_grad_()
        out, entry = torch.ops.aten._sparse_mm_reduce_impl(sparse, matrix, "amax" if largest else "amin")
    return out.detach(), entry


@spmm_extremum.register_fake
def _(pointer, index, value, matrix, largest):
    size = pointer.shape[0] - 1, matrix.shape[1]
    return matrix.new_empty(size), index.new_empty(size)


def _csr(pointer: Tensor, index: Tensor, value: Tensor, columns: int) -> Tensor:
    size = pointer.shape[0] - 1, columns
    return torch.sparse_csr_tensor(pointer, index, value, size, check_invariants=False)


def _multiply(pointer: Tensor, index: Tensor, value: Tensor, matrix: Tensor) -> Tensor:
    sparse = _csr(pointer, index, value, matrix.shape[0])
    if matrix.device.type == "cpu" and not matrix.is_complex():  # takes half the time of the product that uses MKL
        return torch.ops.aten._sparse_mm_reduce_impl(sparse, matrix.contiguous(), "sum")[0]
    return torch.sparse.mm(sparse, matrix)


def _save(ctx, inputs, output):
    pointer, index, value, matrix = inputs[:4]
    ctx.columns = matrix.shape[0]
    entry = output[1] if isinstance(output, tuple) else None
    ctx.save_for_backward(pointer, index, value, matrix if ctx.needs_input_grad[2] else None, entry)


def _save_transposed(ctx, inputs, output):
    pointer, index, value, matrix, _ = inputs
    ctx.save_for_backward(pointer, index, value, matrix if ctx.needs_input_grad[2] else None)


def _spmm_backward(ctx, grad):
    pointer, index, value, matrix, _ = ctx.saved_tensors
    grad_matrix = grad_value = None
    if ctx.needs_input_grad[3]:
        grad_matrix = spmm_transposed(pointer, index, value, grad, ctx.columns)
    if ctx.needs_input_grad[2]:
        grad_value = (grad[rows_of(pointer, index.shape[0])] * matrix[index]).sum(1)
    return None, None, grad_value, grad_matrix


def _transposed_backward(ctx, grad):
    pointer, index, value, matrix = ctx.saved_tensors
    grad_matrix = grad_value = None
    if ctx.needs_input_grad[3]:
        grad_matrix = spmm(pointer, index, value, grad)
    if ctx.needs_input_grad[2]:
        grad_value = (matrix[rows_of(pointer, index.shape[0])] * grad[index]).sum(1)
    return None, None, grad_value, grad_matrix, None


def _extremum_backward(ctx, grad, _):
    _, index, value, matrix, entry = ctx.saved_tensors
    # One more entry, of weight zero, for the rows that have none.
    index = torch.cat([index, index.new_zeros(1)])
    source = index[entry].long()
    grad_matrix = grad_value = None
    if ctx.needs_input_grad[3]:
        weight = torch.cat([value, value.new_zeros(1)])[entry]
        grad_matrix = grad.new_zeros(ctx.columns, grad.shape[1]).scatter_add(0, source, grad * weight)
    if ctx.needs_input_grad[2]:
        each = grad * matrix.gather(0, source)
        grad_value = grad.new_zeros(index.shape[0]).index_add(0, entry.reshape(-1), each.reshape(-1))[:-1]
    return None, None, grad_value, grad_matrix, None


spmm.register_autograd(_spmm_backward, setup_context=_save)
spmm_transposed.register_autograd(_transposed_backward, setup_context=_save_transposed)
spmm_extremum.register_autograd(_extremum_backward, setup_context=_save)
