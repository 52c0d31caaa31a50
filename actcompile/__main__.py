"""The command line: `python -m actcompile demo | explain | estimate | check | env`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import actcompile
from actcompile import datasets
from actcompile._estimate import fits, meta_inputs
from actcompile.config import METADATA, PRESETS, Config, parse_budget
from actcompile.kernels.blocks.format import BITS, LEVELS
from actcompile.rules import Rule, bits, keep, lossless

MODELS = {"sage": "GraphSAGE", "gcn": "GCN", "gin": "GIN", "gat": "GAT"}  # of torch_geometric.nn


class UsageError(Exception):
    """What was asked for cannot be done; the message says why, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 with a message on stderr, or where `check` finds a bias."""
    given = _parser().parse_args(arguments)
    try:
        return given.run(given) or 0
    except (UsageError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if given.traceback:
            raise
        print(f"actcompile {given.command}: {_message(error)}", file=sys.stderr)
        return 1


def _message(error: BaseException) -> str:
    # An error of ours inside a compilation comes wrapped in one of Dynamo's, with a page of advice on debugging Dynamo.
    inner = getattr(error, "inner_exception", None)
    return f"{inner or error}" or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="actcompile", description="Compresses what a model saves for backward, as a pass of torch.compile."
    )
    parser.add_argument("--version", action="version", version=f"actcompile {actcompile.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | explain | estimate | check | env")

    command = commands.add_parser("demo", help="train a GraphSAGE, plain and compressed in turn, and compare")
    command.set_defaults(run=_demo)
    command.add_argument("--epochs", type=_positive, default=40)
    command.add_argument("--hidden", type=_positive, default=256)
    command.add_argument("--device", choices=["cpu", "cuda"], help="by default cuda where there is a device")
    command.add_argument("--seed", type=int, default=0)
    _add_data(command)
    _add_config(command)

    command = commands.add_parser(
        "explain",
        help="tell what a model saves for backward and how it would be kept, without running it",
        epilog="examples: explain my_model.py:make   explain my.package:Net --input 'float32[1000,128]' --bits 4   "
        "explain --model sage --shape 169343x1166243x128x40",
    )
    command.set_defaults(run=_explain)
    command.add_argument(
        "target",
        nargs="?",
        help="file.py:name or package.module:name, where name is a module, or a function that returns one, or "
        "(module, inputs)",
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        type=_input,
        metavar="[name=]dtype[sizes]",
        help="an input by its shape, such as 'float32[1000,128]' or 'edge_index=int64[2,5000]'; repeat for more",
    )
    command.add_argument("--model", choices=list(MODELS), help="a model of PyG's instead of a target")
    command.add_argument("--hidden", type=_positive, default=256, help="width of --model")
    command.add_argument("--layers", type=_positive, default=3, help="layers of --model")
    command.add_argument("--html", type=Path, metavar="FILE", help="write tables, a drawing of the graphs, their code")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report as data")
    command.add_argument("--save-plan", type=Path, metavar="FILE", help="write how each activation is kept, for --plan")
    command.add_argument("--code", action="store_true", help="print both rewritten graphs, too")
    _add_data(command)
    _add_config(command)

    command = commands.add_parser(
        "estimate",
        help="tell what a step of a model would take on a graph of any size, and what fits into a given memory",
        epilog="example: estimate --model sage --shape 111059956x1615685872x128x172 --memory 80GB",
    )
    command.set_defaults(run=_estimate)
    command.add_argument("--model", choices=list(MODELS), default="sage", help="a model of PyG's (default: sage)")
    command.add_argument("--hidden", type=_positive, default=256, help="its width")
    command.add_argument("--layers", type=_positive, default=3, help="its depth")
    command.add_argument(
        "--memory", type=_memory, metavar="BYTES", help="such as 80GB: how many nodes, how deep, how wide fits into it"
    )
    _add_data(command)
    _add_config(command)

    command = commands.add_parser(
        "check",
        help="tell what compression does to a model's gradients on a batch: noise, bias, and a rule that mends it",
        epilog="exit status 1 where a gradient is biased though the plan claims that it is not, or by more than 2 %%",
    )
    command.set_defaults(run=_check)
    command.add_argument(
        "target",
        help="file.py:name or package.module:name, where name is a function that returns (model, inputs) or "
        "(model, inputs, loss); loss takes the model's outputs",
    )
    command.add_argument("--seeds", type=_positive, default=20, help="number of roundings (default: 20)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report as data")
    _add_config(command)

    command = commands.add_parser("env", help="tell versions, compilers, devices, and what works here")
    command.set_defaults(run=_env)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dataset", choices=datasets.names(), default="pubmed", help="a real graph (default: pubmed)")
    group.add_argument(
        "--shape", type=_shape, metavar="NODESxEDGESxFEATURESxCLASSES", help="a generated graph of this shape instead"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("config", "fields of actcompile.Config")
    number = [*map(str, BITS), "none"]
    group.add_argument("--bits", choices=[*number, "auto"])
    group.add_argument("--nonlinear-bits", choices=[*number, "auto"])
    group.add_argument("--block", type=int)
    group.add_argument("--preset", choices=list(PRESETS), metavar="NAME", help="such as exact, iexact-8, iexact-64-vm")
    group.add_argument("--levels", choices=["auto", *LEVELS])
    group.add_argument("--metadata", choices=list(METADATA))
    group.add_argument("--min-bytes", type=int)
    group.add_argument("--replay", type=_replay, metavar="SHARE|auto")
    group.add_argument(
        "--rule",
        dest="rules",
        action="append",
        type=_rule,
        metavar="PATTERN=RULE",
        help="for the modules that match: keep, lossless, 1, 2, 4 or 8; repeat for more, the first match wins",
    )
    group.add_argument(
        "--budget", type=_budget, metavar="BYTES|SHARE", help="the step's peak: 2GiB, or 0.25 of plain's"
    )
    group.add_argument("--max-gradient-error", type=float, metavar="SHARE", help="of rounding, such as 0.05")
    group.add_argument("--max-slowdown", type=float, metavar="TIMES", help="of a step, such as 1.05")
    group.add_argument(
        "--plan", type=Path, metavar="FILE", help="the plan that --save-plan wrote, instead of a new one"
    )
    group.add_argument("--inner", choices=["inductor", "aot_eager"])


def _config(given: argparse.Namespace) -> Config:
    names = [
        *("bits", "nonlinear_bits", "block", "levels", "metadata", "min_bytes", "replay", "rules", "inner"),
        *("budget", "max_gradient_error", "max_slowdown", "plan"),
    ]
    fields: dict[str, Any] = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    for name in ("bits", "nonlinear_bits"):
        if name in fields and fields[name] != "auto":
            fields[name] = None if fields[name] == "none" else int(fields[name])
    if "rules" in fields:
        fields["rules"] = tuple(fields["rules"])
    return Config.make(preset=given.preset, **fields)


def _demo(given: argparse.Namespace) -> None:
    from actcompile.demo import demo

    demo(
        Console(),
        _config(given),
        given.dataset,
        given.shape,
        given.hidden,
        given.epochs,
        given.device,
        given.seed,
    )


def _explain(given: argparse.Namespace) -> None:
    config = _config(given)
    if bool(given.target) == bool(given.model):
        raise UsageError("give either a target such as my_model.py:make, or --model; see explain --help")
    model, inputs = _named_model(given) if given.model else _load(given.target)[:2]
    if given.input:
        inputs = tuple(tensor for name, tensor in given.input if not name)
    keywords = {name: tensor for name, tensor in given.input if name}
    if not inputs and not keywords:
        raise UsageError(f"{given.target} gives no inputs: return (model, inputs), or pass --input 'float32[1000,128]'")
    report = actcompile.explain(model, *inputs, config=config, **keywords)
    Console().print(report)
    if given.code:
        print(report.code())
    writing: list[tuple[Path | None, Callable[[Path], object]]] = [
        (given.html, report.to_html),
        (given.json, report.to_json),
        (given.save_plan, lambda path: report.plan().save(path)),
    ]
    for path, write in writing:
        if path:
            write(path)
            print(f"written to {path}")


def _estimate(given: argparse.Namespace) -> None:
    config, console = _config(given), Console()

    def of(scale: float = 1.0, layers: int = given.layers, hidden: int = given.hidden) -> actcompile.Estimate:
        model, inputs = _named_model(given, scale, layers, hidden)
        return actcompile.estimate(model, *inputs, config=config)

    console.print(of())
    if given.memory is not None:
        with console.status("what fits"):
            table = fits(of, given.memory, _shape_of(given)[0], given.layers, given.hidden)
        console.print(table)


def _check(given: argparse.Namespace) -> int:
    config = _config(given)
    model, inputs, loss = _load(given.target)
    if not inputs:
        raise UsageError(f"{given.target} gives no inputs: return (model, inputs) or (model, inputs, loss)")
    inner = given.inner or "aot_eager"
    report = actcompile.check(model, *inputs, loss=loss, config=config, seeds=given.seeds, options={"inner": inner})
    Console().print(report)
    if given.json:
        given.json.write_text(report.to_json(), encoding="utf-8")
        print(f"written to {given.json}")
    return int(not report.ok)


def _env(given: argparse.Namespace) -> None:
    from actcompile.environment import renderable

    Console().print(renderable())


def _shape_of(given: argparse.Namespace) -> tuple[int, int, int, int]:
    if given.shape:
        return given.shape  # type: ignore[no-any-return]
    task = datasets.load(given.dataset)
    return task.nodes, task.edges, task.features, task.classes


def _named_model(
    given: argparse.Namespace, scale: float = 1.0, layers: int | None = None, hidden: int | None = None
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model of PyG's that was asked for, and inputs without data; `scale`: of nodes and edges."""
    nodes, edges, features, classes = _shape_of(given)
    try:
        from torch_geometric import nn as pyg
    except ImportError as error:
        raise UsageError("--model needs torch_geometric: pip install 'actcompile[demo]'") from error
    make = getattr(pyg, MODELS[given.model])
    with torch.device("meta"):
        model = make(features, hidden or given.hidden, layers or given.layers, classes, dropout=0.5, norm="batch_norm")
    return model, meta_inputs(max(1, int(nodes * scale)), max(1, int(edges * scale)), features)


def _load(target: str) -> tuple[Any, tuple[Any, ...], Any]:
    """The model, its inputs and loss if there are any, behind `file.py:name` or `package.module:name`."""
    where, _, name = target.rpartition(":")
    if not where:
        raise UsageError(f"{target!r} names no object: write file.py:name or package.module:name")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None or not Path(where).is_file():
            raise UsageError(f"there is no file {where}")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(where).resolve().parent))  # as `python file.py` would
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(where)
    if not hasattr(module, name):
        raise UsageError(f"{where} has no {name!r}")
    made = getattr(module, name)
    if not isinstance(made, nn.Module):
        made = made()
    model, inputs, loss = (*made, None)[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (made, (), None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} gives a {type(model).__name__}, not a torch.nn.Module or (module, inputs)")
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), loss


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _replay(text: str) -> str | float:
    return text if text == "auto" else float(text)


def _budget(text: str) -> str | float:
    value = float(text) if re.fullmatch(r"0?\.\d+|1\.0*", text) else text
    try:
        parse_budget(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _memory(text: str) -> int:
    try:
        nbytes, _ = parse_budget(text)
    except ValueError:
        nbytes = None
    if not nbytes:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 80GB or 24GiB")
    return nbytes


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not four sizes such as 19717x88648x500x3")
    nodes, edges, features, classes = map(int, sizes)
    return nodes, edges, features, classes


def _rule(text: str) -> tuple[str, Rule]:
    pattern, _, name = text.rpartition("=")
    if pattern and name in ("keep", "lossless"):
        return pattern, keep() if name == "keep" else lossless()
    if pattern and name.isdecimal() and int(name) in BITS:
        return pattern, bits(int(name))
    raise argparse.ArgumentTypeError(f"{text!r} is not like 'convs.0.*=keep', or =lossless, or =8")


def _input(text: str) -> tuple[str, torch.Tensor]:
    match = re.fullmatch(r"(?:(\w+)=)?(\w+)\[([\d, ]*)\]", text)
    dtype = getattr(torch, match[2], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'float32[1000,128]' or 'x=float32[1000,128]'")
    sizes = [int(size) for size in match[3].split(",") if size.strip()]
    return match[1] or "", torch.empty(sizes, dtype=dtype, device="meta")


if __name__ == "__main__":
    sys.exit(main())
