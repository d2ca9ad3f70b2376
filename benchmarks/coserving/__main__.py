"""Requests and a training job on one machine: what either costs the other, in one process of ours and in two.

python -m benchmarks.coserving                                 float32 and int8, all loads
python -m benchmarks.coserving --types int8 --repeats 5 --plot coserving.svg
python -m benchmarks.coserving --no-peer --jobs 4              ours alone, four jobs at once
python -m benchmarks.coserving --loads lone --riding-rows 16
python -m benchmarks.coserving --tpot-ratio 1.25 --min-share 0.1

Three loads: a lone stream; half of what the server can do, at random times (Poisson); and as many requests at once as
keep it full. Each is served alone, beside a job in the same process, and beside transformers + PEFT that train in a
process of their own. The job is LoRA of rank 16 on all linears, 512 tokens a step; its speed is a share of what it is
alone. All ways take turns, and ratios are medians of those within one turn. Use an idle machine.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.coserving.chart import Panel, draw
from benchmarks.coserving.loads import Load
from benchmarks.coserving.measure import OURS, PEER, Bench, Result
from benchmarks.coserving.peer import PeftProcess
from runtime.engine.service import EngineService
from runtime.support.memory import keep_freed_memory
from settings.load import load as load_settings
from settings.schema import Settings

CORES = len(os.sched_getaffinity(0))


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    console = Console()
    if warning := machine.busy():
        console.print(warning, style="yellow")
    keep_freed_memory()
    results: list[Result] = []
    with ExitStack() as stack:
        peer = None
        if given.peer:
            peer = PeftProcess(given.model, CORES)
            stack.callback(peer.close)
        for weights in given.types:
            results += asyncio.run(_measure(_settings(given, weights), peer, given, console.print))
        if peer is not None:
            console.print(f"The second process holds {peer.memory / 1e6:.0f} MB: its own copy of the weights.")
    console.print(render(results))
    if given.json:
        report = {"machine": machine.describe(), "results": msgspec.to_builtins(results)}
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if given.plot:
        given.plot.write_text(draw(panels(results, given.tpot_ratio)), encoding="utf-8")
    return 0


async def _measure(
    settings: Settings, peer: PeftProcess | None, given: argparse.Namespace, report: Callable[[str], None]
) -> list[Result]:
    service = EngineService.load(settings)
    service.start()
    full = Load(name="full", at_once=given.at_once, prompt=given.prompt, output=given.output)
    loads = [
        Load(name="lone", at_once=1, prompt=given.prompt, output=given.output),
        Load(name="half", prompt=given.prompt, output=given.output),
        full,
    ]
    loads = [load for load in loads if load.name in given.loads]
    machine.settle()
    try:
        bench = Bench(service, settings, peer, given.seconds, given.jobs)
        return await bench.run(loads, given.repeats, settings.model.quantization, report, full=full)
    finally:
        await service.stop(0.0)


def _settings(given: argparse.Namespace, weights: str) -> Settings:
    flags: dict[str, Any] = {
        "model": given.model,
        "dtype": "float32",
        "quantization": weights,
        "prefix_caching": False,
        "max_running": max(given.at_once, 16),
        "tpot_ratio": given.tpot_ratio,
        "tpot_target": given.tpot_target,
        "min_share": given.min_share,
        "riding_rows": given.riding_rows,
    }
    return load_settings(env={}, flags=flags).settings


def render(results: Sequence[Result]) -> Table:
    """A row for each load and way; times alone in ms, the others as ratios to it."""
    title = "requests beside a job: ×, times alone; job: share of its stand-alone speed"
    table = Table(title=title, title_justify="left")
    columns = ("weights", "load", "", "TPOT p50", "TPOT p95", "TTFT p50", "TTFT p95", "tok/s", "job")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right", no_wrap=True)
    for result in results:
        for way in result.windows:
            beside, cells = way in (OURS, PEER), []
            for name in ("tpot", "ttft"):
                for share in ("p50", "p95"):
                    seconds = result.median(way, lambda one, n=name, s=share: getattr(one, n)[s])  # type: ignore[misc]
                    ratio = result.ratio(way, lambda one, n=name, s=share: getattr(one, n)[s])  # type: ignore[misc]
                    cells.append(f"{ratio:.2f} ×" if beside else f"{1e3 * seconds:.1f} ms")
            speed = result.median(way, lambda one: one.served)
            trained = result.median(way, lambda one: one.trained)
            job = f"{result.kept(way):.2f} ({trained:.0f} tok/s)" if beside else "–"
            names = ("", "") if beside else (result.weights, result.load)
            table.add_row(*names, way, *cells, f"{speed:.0f}", job)
    return table


def panels(results: Sequence[Result], limit: float) -> list[Panel]:
    """For each type of weights: the 95th percentile of the time per token, and the job's speed."""
    made = []
    for weights in dict.fromkeys(result.weights for result in results):
        some = [result for result in results if result.weights == weights]
        ways = [way for way in (OURS, PEER) if way in some[0].windows]
        groups = [result.load for result in some]
        kind = "float32" if weights == "none" else weights
        late = {way: [one.ratio(way, lambda window: window.tpot["p95"]) for one in some] for way in ways}
        speeds = {way: [one.median(way, lambda window: window.trained) for one in some] for way in ways}
        made.append(Panel(f"{kind}: time per token, p95, times alone", groups, late, limit))
        made.append(Panel(f"{kind}: training, tokens a second", groups, speeds))
    return made


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.coserving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="served and trained (default: demo)")
    parser.add_argument("--types", nargs="+", default=["none", "int8"], help="settings of `quantization`")
    parser.add_argument("--loads", nargs="+", default=["lone", "half", "full"], help="some of lone, half, full")
    parser.add_argument("--riding-rows", type=int, default=0, help="tokens of training in a step that decodes, at most")
    parser.add_argument("--at-once", type=int, default=16, help="requests that keep the server full (default: 16)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument("--jobs", type=int, default=1, help="that train at once in our process (default: 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--tpot-ratio", type=float, default=1.3, help="target of the time per token, times alone")
    parser.add_argument("--tpot-target", help="target of the time per token, such as 50ms, instead")
    parser.add_argument("--min-share", type=float, default=0.2, help="share of the time that the job gets in any case")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without the second process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every window there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart there, as SVG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
