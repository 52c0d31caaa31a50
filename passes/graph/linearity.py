"""Which arguments each op is affine in: the table behind `bias`.

A rule is a polynomial with implicit coefficients, in the argument names of the op's schema. `addmm` has the rule
`"self + sum(mat1 * mat2)"`: its result is a sum of terms, each a product of the named arguments, and of anything that
does not depend on them. So it is affine in `self`, affine in `mat1` while `mat2` is held, and not in a tensor that both
are made of. What a rule leaves out counts as non-linear (an index, a mask, a divisor); `0 * x` says that `x` matters by
its shape at most. `sum(x)` and `mean(x)` say that elements of `x` are added up, or averaged, along the op's dimensions;
`sum(mat1 * mat2)` along the last one of the first factor. All else takes single elements. An op with several outputs
has one polynomial for each, separated by `;`.

The rules are facts of algebra. They treat the rounding of floating-point arithmetic as exact, as everyone does who
calls a layer linear, and hold for tensors of float dtypes; of complex ones, element by element of real and imaginary
parts.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx
from torch.fx.operator_schemas import normalize_function


@dataclass(frozen=True)
class Term:
    """A product of arguments; `reduce` is "sum" or "mean" where elements of it are added up, else empty."""

    factors: tuple[str, ...]
    reduce: str = ""


@dataclass(frozen=True)
class Polynomial:
    """One output of an op: a sum of products of arguments."""

    terms: tuple[Term, ...]
    ignored: frozenset[str]

    @staticmethod
    def parse(text: str) -> Polynomial:
        """Reads `"self + sum(mat1 * mat2) + 0 * other"`."""
        terms, ignored = [], frozenset[str]()
        for part in text.split("+"):
            reduce, _, inner = part.strip().rstrip(")").rpartition("(")
            # torch.fx renames the argument "self" to "input"; no op of the table has both.
            names = tuple("input" if (name := factor.strip()) == "self" else name for factor in inner.split("*"))
            if "0" in names:
                ignored |= set(names) - {"0"}
            else:
                terms.append(Term(names, reduce))
        return Polynomial(tuple(terms), ignored)

    @property
    def named(self) -> frozenset[str]:
        """Every argument that the polynomial is affine in."""
        return frozenset(name for term in self.terms for name in term.factors)


@dataclass(frozen=True)
class Rule:
    """The polynomials of an op's outputs, for calls whose other arguments are in `when`."""

    outputs: tuple[Polynomial, ...]
    when: Mapping[str, Container[Any]] = field(default_factory=dict)

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the rule speaks of a call with these `arguments`; one that is not given counts as None."""
        return all(arguments.get(name) in values for name, values in self.when.items())


_NONE = (None,)
_SUMMING = ("sum", "mean")

# (ops, formula, condition): the first rule of an op whose condition holds is the one that speaks.
_TABLE: tuple[tuple[str, str, dict[str, Container[Any]]], ...] = (
    # The result depends on shapes only.
    ("aten: zeros_like ones_like empty_like new_zeros new_ones new_empty new_empty_strided", "0 * self", {}),
    ("aten: sym_size sym_stride sym_numel sym_storage_offset", "0 * self", {}),
    ("aten: full_like new_full", "fill_value + 0 * self", {}),
    # The same elements elsewhere, or in another float dtype. Indices are not named: they must not depend on a source.
    ("aten: alias clone detach lift_fresh lift_fresh_copy _to_copy", "self", {}),
    ("aten: view", "self", {"dtype": _NONE}),
    ("aten: _unsafe_view expand permute transpose t squeeze unsqueeze flip roll repeat as_strided", "self", {}),
    ("aten: select slice diagonal split split_with_sizes unbind unfold", "self", {}),
    ("aten: diag_embed tril triu constant_pad_nd", "self", {}),
    ("aten: gather index _unsafe_index index_select take masked_select", "self", {}),
    ("aten: embedding", "weight", {}),
    ("aten: cat stack", "tensors", {}),
    # Complex numbers are pairs of real ones; what multiplies them sums up products of their parts.
    ("aten: view_as_real view_as_complex _conj", "self", {}),
    ("aten: complex", "real + imag", {}),
    ("aten: _fft_r2c _fft_c2r _fft_c2c", "self", {}),
    ("aten: copy", "src + 0 * self", {}),
    ("aten: slice_scatter select_scatter diagonal_scatter as_strided_scatter", "self + src", {}),
    ("aten: index_put _unsafe_index_put _unsafe_masked_index_put_accumulate", "self + values", {}),
    ("aten: _unsafe_masked_index", "self + fill", {}),
    ("aten: where", "self + other", {}),
    ("aten: masked_fill index_fill", "self + value", {}),
    ("aten: masked_scatter index_copy", "self + source", {}),
    ("prims: convert_element_type broadcast_in_dim transpose split_dim collapse collapse_view", "a", {}),
    ("prims: squeeze reshape rev view_of device_put", "a", {}),
    ("prims: cat", "tensors", {}),
    ("prims: where", "a + b", {}),
    ("prims: inductor_force_stride_order", "input", {}),
    # Sums.
    ("aten: neg cumsum trace", "self", {}),
    ("aten: sum", "sum(self)", {}),
    ("aten: mean", "mean(self)", {}),
    ("aten: add sub rsub", "self + other", {}),
    ("aten: index_add", "self + source", {}),
    ("aten: index_reduce", "self + source", {"reduce": ("mean",)}),
    ("aten: scatter", "self + src + value", {"reduce": (None, "add")}),
    ("aten: scatter_add", "self + src", {}),
    ("aten: scatter_reduce", "self + src", {"reduce": _SUMMING}),
    ("aten: segment_reduce", "data", {"reduce": _SUMMING}),
    ("prims: neg clone", "self", {}),
    ("prims: add sub", "self + other", {}),
    ("prims: sum", "sum(inp)", {}),
    # Products.
    ("aten: mul", "self * other", {}),
    ("aten: div", "self", {"rounding_mode": _NONE}),
    ("aten: pow", "self", {"exponent": (1,)}),
    ("aten: lerp", "self + self * weight + end * weight", {}),
    ("aten: addcmul", "self + tensor1 * tensor2", {}),
    ("aten: addcdiv", "self + tensor1", {}),
    ("aten: mm bmm", "sum(self * mat2)", {}),
    ("aten: mv", "sum(self * vec)", {}),
    ("aten: dot", "sum(self * tensor)", {}),
    ("aten: vdot", "sum(self * other)", {}),
    ("aten: addmm", "self + sum(mat1 * mat2)", {}),
    ("aten: addmv", "self + sum(mat * vec)", {}),
    ("aten: addr", "self + vec1 * vec2", {}),
    ("aten: baddbmm addbmm", "self + sum(batch1 * batch2)", {}),
    ("aten: convolution", "input * weight + bias", {}),
    (
        "aten: _embedding_bag _embedding_bag_forward_only",
        "weight * per_sample_weights" + 3 * "; 0 * weight * per_sample_weights",
        {"mode": (0, 1)},
    ),
    ("prims: mul", "self * other", {}),
    ("prims: div", "self", {}),
    ("prims: fma", "a * b + c", {}),
    ("actcompile: spmm spmm_transposed", "value * matrix", {}),
    ("actcompile: aggregate", "weight * matrix", {}),
    # Backward ops that only move or sum the gradient.
    ("aten: slice_backward select_backward diagonal_backward embedding_dense_backward", "grad_output", {}),
    ("aten: masked_scatter_backward", "grad_output", {}),
    ("aten: unfold_backward", "grad_in", {}),
    ("aten: value_selecting_reduction_backward", "grad", {}),
    ("aten: max_pool2d_with_indices_backward nll_loss_backward", "grad_output + 0 * self", {}),
    ("aten: _segment_reduce_backward", "grad + 0 * output * data", {"reduce": _SUMMING}),
    ("aten: native_dropout_backward", "grad_output * mask", {}),
    ("aten: _embedding_bag_dense_backward", "grad * per_sample_weights", {"mode": (0, 1)}),
    ("aten: _embedding_bag_per_sample_weights_backward", "grad * weight", {}),
    # Backward ops that multiply the gradient by a non-linear function of what was saved: activations, softmax.
    ("aten: threshold_backward gelu_backward silu_backward elu_backward leaky_relu_backward", "grad_output", {}),
    ("aten: sigmoid_backward tanh_backward softplus_backward hardtanh_backward glu_backward", "grad_output", {}),
    ("aten: mish_backward hardswish_backward hardsigmoid_backward log_sigmoid_backward", "grad_output", {}),
    ("aten: _softmax_backward_data _log_softmax_backward_data smooth_l1_loss_backward", "grad_output", {}),
    ("aten: huber_loss_backward", "grad_output", {}),
    ("aten: binary_cross_entropy_backward", "grad_output + grad_output * target", {}),
    ("aten: mse_loss_backward", "grad_output * self + grad_output * target", {}),
    # g: gradient, x: input, w: weight, m: mean, r: 1 / standard deviation, h = (x - m) r. Then with r and m saved apart
    #   grad_weight = sum(g h)                                 is affine in x, m and r,
    #   grad_bias   = sum(g)                                   does not see them,
    #   grad_input  = r (w g - mean(w g) - h mean(w g h))      is quadratic in x, through the two h.
    # Batch norm in eval mode has grad_input = w g r, with r from running_var.
    (
        "aten: native_layer_norm_backward",
        """grad_out * weight + 0 * bias;
        grad_out * input * rstd + grad_out * mean * rstd + 0 * weight * bias;
        grad_out + 0 * input * mean * rstd * weight * bias""",
        {},
    ),
    (
        "aten: native_group_norm_backward",
        """grad_out * weight;
        grad_out * input * rstd + grad_out * mean * rstd + 0 * weight;
        grad_out + 0 * input * mean * rstd * weight""",
        {},
    ),
    (
        "aten: native_batch_norm_backward",
        """grad_out * weight + 0 * running_mean * running_var;
        grad_out * input * save_invstd + grad_out * save_mean * save_invstd + 0 * weight * running_mean * running_var;
        grad_out + 0 * input * weight * running_mean * running_var * save_mean * save_invstd""",
        {"train": (True,)},
    ),
    (
        "aten: native_batch_norm_backward",
        """grad_out * weight + 0 * input * running_mean * save_mean * save_invstd;
        grad_out * input + grad_out * running_mean + 0 * weight * save_mean * save_invstd;
        grad_out + 0 * input * weight * running_mean * running_var * save_mean * save_invstd""",
        {"train": (False,)},
    ),
    (
        "aten: convolution_backward",
        "grad_output * weight + 0 * input; grad_output * input + 0 * weight; grad_output + 0 * input * weight",
        {},
    ),
    # grad_query = (P * (g v^T - sum(g * out))) k with P a non-linear function of query, key and logsumexp.
    (
        "aten: _scaled_dot_product_flash_attention_for_cpu_backward",
        "grad_out * value + grad_out * out; grad_out * value + grad_out * out; grad_out + 0 * value * out",
        {},
    ),
)


def _read_table() -> dict[str, tuple[Rule, ...]]:
    rules: dict[str, tuple[Rule, ...]] = {}
    for ops, formula, when in _TABLE:
        rule = Rule(tuple(Polynomial.parse(text) for text in formula.split(";")), when)
        namespace, names = ops.split(":")
        for name in names.split():
            key = f"{namespace}.{name}"
            rules[key] = (*rules.get(key, ()), rule)
    return rules


RULES: dict[str, tuple[Rule, ...]] = _read_table()
"""Op name without overload, such as `"aten.mm"` -> its rules."""


def rule_for(node: fx.Node) -> tuple[Rule, dict[str, Any]] | None:
    """The rule that speaks of this call, with the call's arguments by name and the schema's defaults filled in.

    None where the op must be taken as non-linear in everything: it is not in the table, none of its rules holds for
    these arguments, or the target is no aten or prims op (a higher-order op, a Python function).
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or str(packet) not in RULES:
        return None
    bound = normalize_function(cast(Any, node.target), node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    if bound is None:
        return None
    rule = next((rule for rule in RULES[str(packet)] if rule.applies(bound.kwargs)), None)
    return None if rule is None else (rule, bound.kwargs)
