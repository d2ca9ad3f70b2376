"""Eft against Hugging Face `generate` or other servers: the same weights, the same prompts, medians and ratios.

python -m benchmarks.compare                      against generate: everything, 3 repeats
python -m benchmarks.compare batch --repeats 1    one scenario, once
python -m benchmarks.compare --http --json        also through the server; JSON on stdout
python -m benchmarks.compare --peer llama.cpp=ENV against llama.cpp's server, installed in ENV

Measures on the CPU; against generate in float32. Use an idle machine: each peer runs alone, one after the other.
docs/performance.md says how the peers are installed.
"""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import beside, machine
from benchmarks.inprocess import Eft, HuggingFace
from benchmarks.loads import LOADS
from benchmarks.options import Results, parse, settings_of
from benchmarks.peers import Eft as EftServer
from benchmarks.peers import PeerFailed
from benchmarks.scenarios import SCENARIOS, Setup
from benchmarks.work import Measurement, Prompts


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv, (__doc__ or "").splitlines()[0])
    console = Console(stderr=given.json)
    warning = machine.busy()
    if warning:
        console.print(warning, style="yellow")
    alone = not (given.peer or given.eft or given.earlier)
    results: Results = {}
    try:
        complete = beside_generate(given, console, results) if alone else beside_peers(given, console, results)
    except asyncio.CancelledError:
        console.print("ended early, by a signal", style="red")
        complete = False
    if given.json:
        sys.stdout.write(msgspec.json.encode(report(given, results, warning), enc_hook=str).decode() + "\n")
    return 0 if complete else 1


def beside_generate(given: argparse.Namespace, console: Console, results: Results) -> bool:
    """Fills `results`; whether they are complete."""
    if given.threads:
        torch.set_num_threads(given.threads)
    setup = prepare(given)
    for name in given.scenarios or SCENARIOS:
        console.print(f"{name}: measuring …", style="dim")
        results[name] = SCENARIOS[name](setup)
        console.print(render(name, results[name]))
    return True


def beside_peers(given: argparse.Namespace, console: Console, results: Results) -> bool:
    """Fills `results`, earlier measurements first; whether they are complete. A peer that fails is left out."""
    ours = EftServer.variants if given.eft is None else given.eft
    who = beside.entries(given.peer, ours, model=given.model, files=given.peer_models, overrides=settings_of(given))
    complete = True
    for name in given.scenarios or LOADS:
        measured = results[name] = [one for run in given.earlier for one in run.get(name, [])]
        for entry in who:
            console.print(f"{name}: {entry.label} …", style="dim")
            try:
                measured.append(
                    beside.measure_alone(
                        entry,
                        LOADS[name],
                        model=given.model,
                        threads=given.threads or beside.cores(),
                        repeats=given.repeats,
                        seed=given.seed,
                    )
                )
            except PeerFailed as error:
                console.print(f"{name}: {entry.label}: {error}", style="red", markup=False)
                complete = False
        if measured:
            console.print(beside.render(name, measured))
    return complete


def prepare(given: argparse.Namespace) -> Setup:
    overrides = settings_of(given)
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
        "arguments": {name: value for name, value in vars(given).items() if name != "earlier"},
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
