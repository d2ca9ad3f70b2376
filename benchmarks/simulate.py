"""The real scheduler and block pool over made-up traffic on a made-up device: what each policy does to whom.

python -m benchmarks.simulate                                   every policy and static batching, on an H100
python -m benchmarks.simulate --device a10 --rate 3 --bursty 4  a smaller card, requests in bursts
python -m benchmarks.simulate --policy fcfs --requests 1M       a million requests: 20 minutes, 100 MB
python -m benchmarks.simulate --policy fcfs --gpus 4 --nodes 2  one model over eight ranks (docs/scaling.md)
python -m benchmarks.simulate --prefixes 20 --plot ttft.svg     shared beginnings; a picture

Devices and lengths of requests: benchmarks/simulation/device.py and trace.py, with their sources. Deterministic.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.simulation.chart import draw
from benchmarks.simulation.device import DEVICES, spread
from benchmarks.simulation.outcome import Outcome
from benchmarks.simulation.replay import Replay
from benchmarks.simulation.static import replay_static
from benchmarks.simulation.trace import Traffic
from runtime.scheduler.policies import POLICIES
from settings.units import parse as parse_units

STATIC = "static"
RATES = {"h100": 20.0, "a10": 2.0, "cpu": 0.1}
"""Requests a second that load each device well without flooding it."""


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    console = Console()
    traffic = Traffic(
        requests=given.requests,
        rate=given.rate or RATES[given.device],
        burstiness=given.bursty,
        prefixes=given.prefixes,
        tenants=tuple(given.tenants),
        urgent=given.urgent,
        patience=given.patience,
        seed=given.seed,
    )
    outcomes = {name: simulate(name, traffic, given) for name in given.policy}
    many = f" x {given.gpus} x {given.nodes} nodes" if given.gpus * given.nodes > 1 else ""
    console.print(render(outcomes, traffic, given.device + many))
    if given.plot:
        draw(outcomes, given.plot, console)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.simulate", description=(__doc__ or "").splitlines()[0])
    names = [*sorted(POLICIES), STATIC]
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--gpus", type=int, default=1, help="devices of a node that share the model (default: 1)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that share the model (default: 1)")
    parser.add_argument("--policy", nargs="+", default=names, choices=names)
    parser.add_argument("--requests", type=_count, default=2000, help="how many, such as 5K or 1M (default: 2000)")
    parser.add_argument("--rate", type=float, help="requests a second; default: what suits the device")
    parser.add_argument("--bursty", type=float, default=1.0, help="variation between arrivals (default: 1, Poisson)")
    parser.add_argument("--prefixes", type=int, default=0, help="different shared beginnings (default: none)")
    parser.add_argument("--tenants", type=float, nargs="+", default=[3.0, 1.0], help="their shares of the requests")
    parser.add_argument("--urgent", type=float, default=0.1, help="share of requests of high priority")
    parser.add_argument("--patience", type=float, help="seconds to the deadline, on average (default: no deadlines)")
    parser.add_argument("--max-running", type=int, default=64, help="slots (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the distributions")
    return parser.parse_args(argv)


def simulate(name: str, traffic: Traffic, given: argparse.Namespace) -> Outcome:
    one, model = DEVICES[given.device]
    device = spread(one, model, given.gpus, given.nodes)
    if name == STATIC:
        return replay_static(traffic, device, model, max_running=given.max_running)
    return Replay(traffic, device, model, policy=name, max_running=given.max_running).run()


def render(outcomes: dict[str, Outcome], traffic: Traffic, device: str) -> Table:
    title = f"{traffic.requests:,} requests at {traffic.rate:g}/s on {device}"
    table = Table("", *outcomes, title=title)
    rows = {
        "TTFT mean, s": [f"{o.ttft():.3f}" for o in outcomes.values()],
        "TTFT 99%, s": [f"{o.ttft(0.99):.3f}" for o in outcomes.values()],
        "TTFT 99% of the urgent, s": [f"{o.ttft(0.99, priority=-1):.3f}" for o in outcomes.values()],
        "TPOT mean, ms": [f"{1000 * o.tpot():.1f}" for o in outcomes.values()],
        "TPOT 99%, ms": [f"{1000 * o.tpot(0.99):.1f}" for o in outcomes.values()],
        "output tokens/s": [f"{o.throughput:,.0f}" for o in outcomes.values()],
        "KV waste": [f"{o.kv_waste:.1%}" for o in outcomes.values()],
        "prompt tokens cached": [f"{o.cached_share:.1%}" for o in outcomes.values()],
        "deadlines missed": [f"{o.missed:,}" for o in outcomes.values()],
        "preemptions": [f"{o.preemptions:,}" for o in outcomes.values()],
        "service gap, tokens": [f"{o.service_gap:,.0f}" for o in outcomes.values()],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _count(text: str) -> int:
    """A number of requests: `2000`, `5K`, `1M`."""
    try:
        return int(parse_units(text, "count"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    raise SystemExit(main())
