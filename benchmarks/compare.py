"""Eft against Hugging Face `generate`: the same weights, the same prompts, one run, medians and ratios.

python -m benchmarks.compare                      everything, 3 repeats
python -m benchmarks.compare batch --repeats 1    one scenario, once
python -m benchmarks.compare --http --json        also through the server; JSON on stdout

Measures on the CPU in float32. Use an idle machine: each peer runs alone, one after the other.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.peers import Eft, HuggingFace
from benchmarks.scenarios import SCENARIOS, Setup
from benchmarks.work import Measurement, Prompts
from settings.fields import by_name


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    console = Console(stderr=given.json)
    warning = machine.busy()
    if warning:
        console.print(warning, style="yellow")
    if given.threads:
        torch.set_num_threads(given.threads)
    setup = prepare(given)
    results: dict[str, list[Measurement]] = {}
    for name in given.scenarios or SCENARIOS:
        console.print(f"{name}: measuring …", style="dim")
        results[name] = SCENARIOS[name](setup)
        console.print(render(name, results[name]))
    if given.json:
        sys.stdout.write(msgspec.json.encode(report(given, results, warning)).decode() + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--model", default="demo", help="a model of the Llama family (default: demo)")
    parser.add_argument("--repeats", type=positive, default=3, help="times to measure each peer (default: 3)")
    parser.add_argument("--at-once", type=positive, default=32, help="requests at once, and batch size of generate")
    parser.add_argument(
        "--peer-sample", type=positive, default=6, help="requests that generate does one at a time (default: 6)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads, for all peers (default: torch's)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--http", action="store_true", help="also measure `eft serve`, in `batch`")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of Eft's")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")
    given = parser.parse_args(argv)
    for name in given.scenarios:
        if name not in SCENARIOS:
            parser.error(f"there is no scenario {name!r}, but {', '.join(SCENARIOS)}")
    for item in given.set:
        if item.partition("=")[0] not in by_name():
            parser.error(f"--set {item}: no such setting (eft config show lists them)")
    return given


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def prepare(given: argparse.Namespace) -> Setup:
    overrides = dict(item.split("=", 1) for item in given.set)
    if given.threads:
        overrides["threads"] = str(given.threads)
    eft = Eft(given.model, at_once=given.at_once, overrides=overrides)
    return Setup(
        model=given.model,
        hf=HuggingFace(given.model),
        eft=eft,
        prompts=Prompts(eft.encode, given.seed),
        at_once=given.at_once,
        repeats=given.repeats,
        peer_sample=given.peer_sample,
        http=given.http,
        overrides=overrides,
    )


def render(name: str, results: Sequence[Measurement]) -> Table:
    base = results[0]
    notes = "\n".join(f"{result.peer}: {result.note}" for result in results if result.note)
    table = Table(title=f"{name}: {SCENARIOS[name].__doc__}", caption=notes or None)
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column(base.unit, justify="right")
    table.add_column("low – high", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right")
    for result in results:
        spread = f"{min(result.values):.4g} – {max(result.values):.4g}"
        table.add_row(result.peer, f"{result.median:.4g}", spread, f"{result.times_better(base):.2f}")
    return table


def report(
    given: argparse.Namespace, results: Mapping[str, Sequence[Measurement]], warning: str | None
) -> dict[str, object]:
    """What `--json` prints: the machine, the settings, and every value that was measured."""
    return {
        "machine": machine.describe(),
        "warning": warning,
        "arguments": vars(given),
        "scenarios": {
            name: [
                {
                    **msgspec.to_builtins(one),
                    "median": one.median,
                    "times_better": one.times_better(measured[0]),
                }
                for one in measured
            ]
            for name, measured in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
