"""What stochastic rounding does to a gradient, computed from the exact activations and never from samples.

An element `x` between two neighbouring levels `l <= x <= r` of its block becomes one of them, with mean `x`. So its
variance is `p q w**2` with `w = r - l`, `q = (x - l) / w`, `p = 1 - q`, which is `(r - x)(x - l)`, and its fourth
cumulant is `p q w**4 (1 - 6 p q)`. Elements are rounded independently, and both add up.
"""

from dataclasses import dataclass

import torch
from scipy.stats import chi2
from scipy.stats import t as student
from torch import Tensor, fx, nn

from actcompile.config import Config
from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.levels import level_values
from actcompile.kernels.blocks.quantize import round_outward
from actcompile.passes.graph import _torch
from actcompile.pipeline import partition
from tests.fidelity.measure import ALARM

LEAST_FREEDOM = 50.0


def moments(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Variance and fourth cumulant of every element of `x` after rounding, in float64 and in the shape of `x`."""
    padded = torch.full((-(-x.numel() // fmt.block) * fmt.block,), torch.nan)
    padded[: x.numel()] = x.reshape(-1).float()
    blocks = padded.view(-1, fmt.block)
    low, high = blocks.nan_to_num(nan=torch.inf).amin(1), blocks.nan_to_num(nan=-torch.inf).amax(1)
    low, high = (end.double()[:, None] for end in round_outward(low, high, fmt.metadata))
    levels = torch.tensor(level_values(fmt.bits, fmt.block, fmt.levels), dtype=torch.float64)
    grid = low + levels * (high - low) / fmt.top
    value = blocks.double().nan_to_num().clamp(low, high)
    right = torch.searchsorted(grid, value.contiguous()).clamp(1, fmt.top)
    below, above = grid.gather(1, right - 1), grid.gather(1, right)
    variance = (above - value) * (value - below)
    cumulant = variance * (above - below) ** 2 - 6 * variance**2
    return tuple(m.reshape(-1)[: x.numel()].view(x.shape) for m in (variance, cumulant))


@dataclass
class Moments:
    """Of each of several gradients (or of sums of their elements): float64, one element each."""

    variance: Tensor
    cumulant: Tensor

    def off(self, drawn: Tensor, mean: Tensor) -> list[str]:
        """The gradients whose spread about `mean` over samples [seeds, gradients] is not what it must be.

        The sum of `n` squares is nearly `V / k` times a chi-square variable with `n k` degrees of freedom, where
        `k = 2 V**2 / (fourth moment - V**2)` makes its variance right (Satterthwaite). The mean over all gradients of
        their squares by `V` is tested too, with Student's limits: it is the more sensitive test. All limits together
        are passed by chance with a probability of about `ALARM`. Gradients that hang on few roundings, which rarely
        differ, are left out: their spread is far from chi-square.
        """
        seeds = len(drawn)
        freedom = 2 * self.variance**2 / (self.cumulant + 2 * self.variance**2) * seeds
        usable = (freedom > LEAST_FREEDOM) & (self.variance > 1e-9 * self.variance.max())
        assert usable.sum() >= 8, "hardly anything is rounded here"
        squares = ((drawn - mean) ** 2 / self.variance)[:, usable]
        ratio, n, tail = squares.mean(0).numpy(), freedom[usable].numpy(), ALARM / 4 / int(usable.sum())
        few, many = chi2.ppf(tail, n) / n, chi2.isf(tail, n) / n
        wrong = (ratio < few) | (ratio > many)
        rows = zip(ratio[wrong], few[wrong], many[wrong], strict=True)
        found = [f"{r:.3f} of theory, expected {a:.3f} to {b:.3f}" for r, a, b in rows]
        together = squares.mean(1)
        margin = float(student.isf(ALARM / 4, seeds - 1)) * float(together.std()) / seeds**0.5
        if abs(float(together.mean()) - 1) > margin:
            found.append(f"together {float(together.mean()):.3f} of theory, expected within {margin:.3f} of it")
        return found


class Captured:
    """A model compressed as `inner="aot_eager"` does it, whose one pair of graphs and their last inputs are kept."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.graphs = model, {}

        def keep(kind):
            def compiler(gm, _):
                def run(arguments):
                    self.graphs[kind] = gm, list(arguments)
                    result = gm(*arguments)
                    self.outputs = [out for out in result if out is not None]  # in the end, those of backward
                    return result

                run._boxed_call = True
                return run

            return compiler

        def backend(gm, inputs):
            assert not self.graphs, "the model has graph breaks"
            return _torch.aot_autograd(
                fw_compiler=keep("forward"),
                bw_compiler=keep("backward"),
                partition_fn=lambda *a, **kw: partition(*a, config=config, **kw),
                decompositions=_torch.select_decomp_table(),
            )(gm, inputs)

        model.compile(backend=backend)

    def theory(self, along: Tensor) -> tuple[Moments, Tensor, int]:
        """The moments of sums of gradients, from the graphs, after the model has run.

        The backward graph runs with exact activations in place of decoded ones, and is differentiated by them; it must
        be affine in all of them together, which is checked.

        Args:
            along: the sums, [sums, elements of all outputs of the backward graph].

        Returns:
            the moments, the exact sums, and the number of rounded activations.
        """
        (forward, arguments), (backward, passed) = self.graphs["forward"], self.graphs["backward"]
        encode = _Encode(forward)
        outputs = encode.run(*arguments)
        inputs = backward.graph.find_nodes(op="placeholder")
        tangents = sum(n.name.startswith("tangents") for n in inputs)
        saved = list(outputs)[-(len(inputs) - tangents) :]

        def sums(shift=0.0):
            decode = _Decode(backward, encode.exact, shift)
            outputs = decode.run(*saved, *passed[len(passed) - tangents :])
            return along @ torch.cat([out.double().reshape(-1) for out in outputs if out is not None]), decode.leaves

        exact, leaves = sums()
        up, down = sums(0.1)[0], sums(-0.1)[0]
        torch.testing.assert_close((up + down) / 2, exact, rtol=1e-3, atol=1e-4 * float(exact.detach().abs().max()))

        variance, cumulant = torch.zeros(2, len(exact), dtype=torch.float64)
        per_leaf = [moments(leaf.detach(), fmt) for leaf, fmt in leaves]
        for i, total in enumerate(exact):
            slopes = torch.autograd.grad(total, [leaf for leaf, _ in leaves], retain_graph=True, allow_unused=True)
            for slope, (second, fourth) in zip(slopes, per_leaf, strict=True):
                if slope is not None:
                    variance[i] += (slope.double() ** 2 * second).sum()
                    cumulant[i] += (slope.double() ** 4 * fourth).sum()
        return Moments(variance, cumulant), exact.detach(), len(leaves)


class _Encode(fx.Interpreter):
    """Runs a forward graph and notes what each encoded tensor was."""

    def run(self, *arguments):
        self.exact: list[tuple[Tensor, Tensor, BlockFormat]] = []
        return super().run(*arguments)

    def call_function(self, target, args, kwargs):
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.actcompile.quantize.default:
            x, _, _, bits, block, levels, metadata, words = args
            self.exact.append((result[0], x.detach(), BlockFormat(bits, block, levels, metadata, words)))
        return result


class _Decode(fx.Interpreter):
    """Runs a backward graph with the exact values, or values near them, in place of decoded ones."""

    def __init__(self, module: fx.GraphModule, exact: list[tuple[Tensor, Tensor, BlockFormat]], shift: float) -> None:
        super().__init__(module)
        self.exact, self.shift, self.leaves = exact, shift, []

    def call_function(self, target, args, kwargs):
        if target is not torch.ops.actcompile.dequantize.default:
            return super().call_function(target, args, kwargs)
        x, fmt = next((x, fmt) for words, x, fmt in self.exact if words is args[0])
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(len(self.leaves)))
        leaf = (x + self.shift * noise).requires_grad_()
        self.leaves.append((leaf, fmt))
        return leaf
