"""From a config's bounds to a plan that meets them: a budget in bytes or as a share, an error, a slowdown."""

from actcompile.passes.graph.split import Split, is_tensor
from actcompile.passes.plan.costs import Noise, Speeds
from actcompile.passes.plan.costs import speeds as speeds_of
from actcompile.passes.plan.fit import Fit, Fitted, Wish
from actcompile.passes.plan.plan import Plan
from actcompile.passes.plan.policy import Policy

from .config import Config, parse_budget
from .datasets import cache_folder


def fit(trial: Split, rules: Plan, policy: Policy, config: Config, plain_peak: int) -> Fitted:
    """The ways that meet the config's bounds best; the rules' own, where it has none but knows what noise costs.

    Args:
        trial: written by the rule table's plan, `rules`.
        plain_peak: bytes of a step's peak without us, for a budget relative to it.

    Raises:
        Impossible: nothing meets the bounds.
    """
    peak, share = parse_budget(config.budget)
    if share is not None:
        peak = int(share * plain_peak)
    bounds = {"peak": peak, "error": config.max_gradient_error, "seconds": None}
    speeds = Speeds()
    if config.max_slowdown is not None:
        speeds = speeds_of(_device(trial), cache_folder())
        bounds["seconds"] = (config.max_slowdown - 1) * speeds.step(trial)
    wish = Wish(**{name: bound for name, bound in bounds.items() if bound is not None})
    noise = Noise({key: dict(formats) for key, formats in config.measured})
    program = Fit(trial, rules, policy, config.inner == "inductor", noise, speeds)
    return program.solve(wish) if config.bounded else program.of_rules()


def _device(split: Split) -> str:
    devices = {n.meta["val"].device.type for n in split.forward.graph.nodes if is_tensor(n)}
    return "cuda" if "cuda" in devices else "cpu"
