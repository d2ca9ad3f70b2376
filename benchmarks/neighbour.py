"""What a busy neighbour costs: the tokens a second of decoding alone, and beside a process that wants the cores too.

python -m benchmarks.neighbour                               float32 and int8, 1 and 32 requests at once
python -m benchmarks.neighbour --types int8 --at-once 1      some of it
GOMP_SPINCOUNT=300000 python -m benchmarks.neighbour         waiting threads spin for longer

The neighbour keeps one core busy, or all of them, each with a loop of its own; or it computes with a team of OpenMP
threads as large as the machine, as a second torch does. Alone and beside each of them is measured in turns, and the
medians are compared. A neighbour that keeps all cores busy is due half of them: 2 is what it has to cost.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.work import greedy
from runtime import LLM
from runtime.messages import Submission

LOOP = "while True: pass"
TEAM = "import torch\nx = torch.ones(768, 768)\nwhile True: x @ x"
CORES = len(os.sched_getaffinity(0))
NEIGHBOURS = {
    "alone": ("", 0),
    "one core busy": (LOOP, 1),
    "all cores busy": (LOOP, CORES),
    "another OpenMP team": (TEAM, 1),
}
"""What a process of each kind runs, and how many there are."""
PROMPT = 16
"""Tokens of every prompt: what is measured comes after them."""
OUTPUT = 1000
"""Tokens that a request would generate if it could, more than it is given time for."""


class Neighbour:
    """Processes that are stopped but while they are measured beside."""

    def __init__(self, name: str, script: str, count: int) -> None:
        """`count` processes, each running the Python `script`."""
        self.name = name
        # It is one that knows nothing of us.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
        self._processes = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(count)]

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._send(signal.SIGCONT)
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def __enter__(self) -> "Neighbour":
        if self._processes:
            time.sleep(5.0)  # what they import is no load of the kind that is measured
        self._send(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    console = Console()
    if warning := machine.busy():
        console.print(warning, style="yellow")
    spins = os.environ.get("GOMP_SPINCOUNT", "not set")
    title = f"{torch.get_num_threads()} threads on {CORES} cores, GOMP_SPINCOUNT {spins}"
    table = Table("weights", "at once", "neighbour", "output tok/s", "times slower", title=title)
    with ExitStack() as stack:
        neighbours = [stack.enter_context(Neighbour(name, *NEIGHBOURS[name])) for name in given.neighbours]
        for kind in given.types:
            llm = LLM(given.model, dtype="float32", quantization=kind, max_running=max(given.at_once))
            for at_once in given.at_once:
                rates = measure(llm, neighbours, at_once, given.seconds, given.repeats)
                for name, rate in rates.items():
                    slower = next(iter(rates.values())) / rate
                    table.add_row(kind, str(at_once), name, f"{rate:.1f}", f"{slower:.2f}")
    console.print(table)
    return 0


def measure(llm: LLM, neighbours: Sequence[Neighbour], at_once: int, seconds: float, repeats: int) -> dict[str, float]:
    """Median tokens a second beside each neighbour."""
    decode(llm, at_once, seconds)
    rates: dict[str, list[float]] = {neighbour.name: [] for neighbour in neighbours}
    for _ in range(repeats):
        for neighbour in neighbours:
            with neighbour.busy():
                rates[neighbour.name].append(decode(llm, at_once, seconds))
    return {name: statistics.median(values) for name, values in rates.items()}


def decode(llm: LLM, at_once: int, seconds: float) -> float:
    """Tokens a second of `at_once` requests that have their first token already."""
    engine = llm.engine
    params = greedy(min(OUTPUT, engine.max_len - PROMPT))
    prompts = [[1 + index, *range(100, 99 + PROMPT)] for index in range(at_once)]
    submissions = [Submission(request_id="bench", prompt_ids=prompt, params=params) for prompt in prompts]
    for submission in submissions:
        engine.submit(engine.prepare(submission))
    begun: set[int] = set()
    while len(begun) < at_once:
        begun |= {output.id for output in engine.step()}
    tokens, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        tokens += sum(len(output.token_ids) for output in engine.step())
    for submission in submissions:
        engine.abort(submission.id)
    engine.settle()
    return tokens / (now - begin)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.neighbour", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="what decodes (default: demo)")
    parser.add_argument("--types", nargs="+", default=["none", "int8"], help="settings of `quantization`")
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 32], help="requests (default: 1 32)")
    parser.add_argument("--neighbours", nargs="+", default=[*NEIGHBOURS], choices=NEIGHBOURS)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn (default: 1.5)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: 5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
