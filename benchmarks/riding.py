"""Tokens of training that ride in decode steps: what they cost beside any other rows, in one process without HTTP.

python -m benchmarks.riding                     1 request with riding rows against requests of their own sequences
python -m benchmarks.riding --rows 4 --dropout 0.1 --repeats 400

SmolLM2 in float32, LoRA of rank 16 on all linears. `requests` decode, each its own sequence; `riding` rows are tokens
of one sequence of training beside one request, `bare` the same without the adapter, and `chunk` as many tokens of a
prompt: rows of one sequence, of which nothing is kept. Steps of all kinds take turns; times are medians, of a step and
of its pass through all layers. Use an idle machine.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.training import targets
from kernels import StackFactors
from runtime.engine.service import EngineService
from runtime.messages import SamplingParams, Submission
from runtime.model.decoder import Decoder
from runtime.model.lora import LoraShape
from runtime.trainer.lora import TrainableLora
from runtime.trainer.riding import KeptMemory, Ride, factors_of
from settings.load import load as load_settings

PROMPT = 64
SEQUENCE = 96
"""Tokens of a riding sequence."""
LONGEST = 8000
"""Tokens that a request may reach before it is made anew."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.riding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 11, 16], help="beside one request")
    parser.add_argument("--repeats", type=int, default=60, help="turns (default: 60)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter's inputs")
    parser.add_argument("--only", nargs="+", help="kinds of rows: requests, chunk, bare, riding (default: all)")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(argv)
    console = Console()
    if warning := machine.busy():
        console.print(warning, style="yellow")
    bench = RidingBench(given.model, given.dtype, given.dropout)
    machine.settle()
    try:
        console.print(bench.run(given.rows, given.repeats, given.only))
    finally:
        bench.close()
    return 0


class RidingBench:
    """An engine that is stepped from here, and one ride after the other."""

    def __init__(self, model: str, dtype: str, dropout: float) -> None:
        flags = {"model": model, "dtype": dtype, "prefix_caching": False, "max_running": 64}
        self._service = EngineService.load(load_settings(env={}, flags=flags).settings)
        decoder = self._service.decoder
        if not isinstance(decoder, Decoder):
            raise TypeError("riding needs a model of ours")
        self._engine = self._service.engine
        self._decoder = decoder
        self._dropout = dropout
        self._numbers = itertools.count()
        self._layers = 0.0
        forward = decoder._forward_layers

        def timed(*args: object) -> torch.Tensor:
            begun = time.perf_counter()
            hidden = forward(*args)  # type: ignore[arg-type]
            self._layers += time.perf_counter() - begun
            return hidden

        self._widths = self._engine.kept_widths
        vars(decoder)["_forward_layers"] = timed
        self._memory: KeptMemory | None = None
        if self._widths is not None:
            self._memory = KeptMemory(decoder.spec.num_layers, self._widths, torch.float32, 1 << 30)
            lora = TrainableLora(decoder, targets(decoder), LoraShape(rank=16, alpha=32.0), seed=0)
            places = {place: decoder.ops.prepare_lora(factors_of(one)) for place, one in lora.linears.items()}
            self._factors = StackFactors(places)
            self._bare = StackFactors({})
        self._rides: dict[StackFactors, Ride] = {}
        self._touch()

    def close(self) -> None:
        for ride in self._rides.values():
            ride.drop()
        self._engine.close()

    def run(self, rows: Sequence[int], repeats: int, only: Sequence[str] | None) -> Table:
        """A row for each number of rows beside one request; `only` these kinds of rows (None: all)."""
        kinds: dict[str, Callable[[int], tuple[float, float]]] = {"requests": self._requests, "chunk": self._chunk}
        if self._memory is not None:
            kinds["bare"] = lambda count: self._riding(count, self._bare)
            kinds["riding"] = lambda count: self._riding(count, self._factors)
        kinds = {name: measure for name, measure in kinds.items() if only is None or name in only}
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(repeats):
            for count in (0, *rows):
                for name, measure in kinds.items():
                    if count or name == "requests":
                        found.setdefault((name, count), []).append(measure(count))
        table = Table(title="step (and its layers), ms, by rows beside one request", title_justify="left")
        for column in ("rows", *kinds):
            table.add_column(column, justify="right")
        for count in (0, *rows):
            cells = [_cell(found.get((name, count), [])) for name in kinds]
            table.add_row(str(count), *cells)
        return table

    def _requests(self, count: int) -> tuple[float, float]:
        self._decoding(1 + count)
        return self._step()

    def _chunk(self, count: int) -> tuple[float, float]:
        """A prompt's next tokens: the prompt is as long as they are, so that it is there as a whole."""
        self._decoding(1)
        self._submit(prompt=count, tokens=1)
        return self._step()

    def _riding(self, count: int, factors: StackFactors) -> tuple[float, float]:
        self._decoding(1)
        return self._step((self._ride_of(factors), count))

    def _step(self, ride: tuple[Ride, int] | None = None) -> tuple[float, float]:
        """Seconds of a step, and of its layers."""
        self._layers = 0.0
        begun = time.perf_counter()
        self._engine.step(ahead=False, ride=ride)
        return time.perf_counter() - begun, self._layers

    def _decoding(self, count: int) -> None:
        """Have this number of requests decode, and no other."""
        scheduler = self._engine.scheduler
        running = list(scheduler.running)
        for request in running[count:]:
            self._engine.abort(request.id)
        for _ in range(count - len(running)):
            self._submit(prompt=PROMPT, tokens=LONGEST)
        self._engine.step(ahead=False)
        while self._engine.prefilling:
            self._engine.step(ahead=False)

    def _submit(self, *, prompt: int, tokens: int) -> None:
        number = next(self._numbers)
        ids = [3 + (number * 7 + place * 11) % 40_000 for place in range(prompt)]
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self._engine.submit(Submission(request_id=f"bench-{number}", prompt_ids=ids, params=params))

    def _touch(self) -> None:
        """Have the memory of all rides at hand: the first writes to fresh pages are slow."""
        if self._memory is not None:
            taken = [self._memory.take(SEQUENCE) for _ in (self._factors, self._bare)]
            for kept, final in taken:
                kept.memory.zero_()
                self._memory.give(kept, final)

    def _ride_of(self, factors: StackFactors) -> Ride:
        """The ride with these factors that is under way, or a new one."""
        ride = self._rides.get(factors)
        if ride is not None and ride.under_way:
            return ride
        if ride is not None:
            ride.drop()
        assert self._memory is not None
        inputs = torch.randn(SEQUENCE, self._decoder.spec.hidden_size) * 0.1
        ride = self._rides[factors] = Ride(
            inputs,
            [slice(0, SEQUENCE)],
            self._memory,
            factors,
            dropout=self._dropout if factors.places else 0.0,
            seeds={place: number for number, place in enumerate(factors.places)},
            first_row=0,
        )
        return ride


def _cell(times: Sequence[tuple[float, float]]) -> str:
    if not times:
        return "–"
    step, layers = (1e3 * statistics.median(values) for values in zip(*times, strict=True))
    return f"{step:.1f} ({layers:.1f})"


if __name__ == "__main__":
    sys.exit(main())
