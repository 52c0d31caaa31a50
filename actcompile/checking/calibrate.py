"""Fit quantisation levels to what a model really saves, instead of to a clipped normal."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actcompile.kernels.baselines.projection import rademacher
from actcompile.kernels.blocks.format import EXPLICIT_BITS, levels_text
from actcompile.kernels.blocks.histogram import Histogram, optimal_levels
from actcompile.passes.codecs.codecs import Quantize
from actcompile.passes.plan.plan import Choice

from ..api import _configs
from ..config import COARSE, FINE, Config
from .observe import observed

LIMIT = 2**22  # elements of an activation that are looked at in one step


def calibrate(model: nn.Module, *inputs: Any, steps: int = 3, config: Config | None = None, **options: Any) -> Config:
    """A config with levels of least rounding variance for every activation that it keeps in 2 or 4 bits.

        config = actcompile.calibrate(model, x, edge_index)  # after some epochs
        model = actcompile.compress(model, config)

    A copy of the model runs `steps` times, in the mode that the model is in, each time with other dropout. Neither the
    model nor the state of random generators changes. The histograms of all steps are added, and levels found by dynamic
    programming (ZipML, Zhang et al., ICML 2017).

    Args:
        model: a module, compressed or not, after some training rather than before: levels fit the values of now.
        inputs: what it is called with.
        steps: forward passes, at least 1.
        config: what is quantised, in how many bits and blocks; by default that of `compress`, or the defaults.
        options: fields of `Config` to change.

    Returns:
        the config with `fitted` filled: pairs of an activation's key, such as `convs.0/add`, and its levels, such as
        `"0,0.8,2.1,3"`, for each number of bits that it may have. Left out is what has no range.

    Raises:
        TypeError, ValueError: the model is no module, `steps` is less than 1, or an option is wrong.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: wrap the function in one")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    made = replace(Config.make(config or _configs.get(model), **options), plan=None)  # it is for a new plan
    histograms: dict[str, dict[int, Histogram]] = {}

    def look(choice: Choice, value: Tensor) -> None:
        assert isinstance(choice.codec, Quantize)
        fmt, columns = choice.codec.format, choice.codec.columns
        if fmt.bits in EXPLICIT_BITS:
            by_bits = histograms.setdefault(choice.activation.key, {})
            encoded = project(value, columns, len(by_bits)) if columns else value
            new = Histogram.of(some_blocks(encoded, fmt.block, LIMIT), fmt)
            by_bits[fmt.bits] = by_bits[fmt.bits] + new if fmt.bits in by_bits else new

    for config in [replace(made, bits=bits) for bits in (COARSE, FINE)] if made.bits == "auto" else [made]:
        forward = observed(copy.deepcopy(model), look, config)
        with torch.random.fork_rng(), torch.enable_grad():
            for _ in range(steps):
                forward(*inputs)
    fitted = {(key, len(text.split(","))): text for key, text in made.fitted}
    for key, by_bits in histograms.items():
        for bits, histogram in by_bits.items():
            if histogram.mass.any() or histogram.atoms[:, 0].any():  # blocks of zeros have elements at 0 only
                fitted[key, 2**bits] = levels_text(optimal_levels(histogram, 2**bits))
    return replace(made, fitted=tuple(sorted((key, text) for (key, _), text in fitted.items())))


def project(value: Tensor, columns: int, seed: int) -> Tensor:
    """The random projection of a tensor's last dimension to `columns`, as `Quantize` with `columns` has it."""
    seeds = torch.tensor([[seed, 0]], dtype=torch.int32, device=value.device)
    return value.detach() @ rademacher(seeds, 0, value.shape[-1], columns, value.dtype)


def some_blocks(value: Tensor, block: int, limit: int) -> Tensor:
    """At most `limit` elements of a tensor in memory order: whole blocks, evenly spread, as (blocks, block).

    A tensor that fills no block is returned whole, as one row.
    """
    flat = value.detach().reshape(-1)
    whole = flat.numel() // block
    if not whole:
        return flat.view(1, -1)
    blocks = flat[: whole * block].view(whole, block)
    wanted = max(1, limit // block)
    if whole <= wanted:
        return blocks
    return blocks[torch.linspace(0, whole - 1, wanted, dtype=torch.float64, device=flat.device).long()]
