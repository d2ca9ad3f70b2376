"""Training measured: against transformers + PEFT, and beside requests that are being served.

python -m benchmarks.training                 everything
python -m benchmarks.training loop            the loop against PEFT, on the same batches
python -m benchmarks.training beside          a lone streaming client and a job, each alone and together
python -m benchmarks.training trl             whole runs against TRL's SFTTrainer + PEFT, with and without packing
python -m benchmarks.training memory          what the base takes in memory, by its type
python -m benchmarks.training jobs            four jobs at once against one, by the size of their micro-batches

Real SmolLM2, float32, LoRA of rank 16 on all linears, 512 tokens a step. Use an idle machine. `trl` needs trl, and is
not part of everything.
"""

import argparse
import asyncio
import importlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.work import load_transformers
from kernels import training_ops
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.engine.service import EngineService
from runtime.events import FailedEvent, RunEvent, StepEvent
from runtime.messages import SamplingParams, Submission
from runtime.model.decoder import Decoder
from runtime.model.lora import Adapter, LoraShape
from runtime.model.model import Model
from runtime.support.memory import give_back_memory, keep_freed_memory
from runtime.trainer.data.example import Example, collate
from runtime.trainer.host import TrainingHost
from runtime.trainer.lora import TrainableLora
from runtime.trainer.recipe import Dataset, Recipe
from runtime.trainer.run import TrainingRun
from runtime.trainer.schedule import Schedule
from runtime.trainer.sliced_run import RunSpec
from runtime.trainer.slices import LatencyTargets, TrainingShare
from runtime.trainer.step import MAX_JOINT_TOKENS, MicroStep
from settings.load import load as load_settings

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {"qkv": ("q", "k", "v"), "out": ("",), "gate_up": ("gate", "up"), "down": ("",)}
VOCAB = 49_000


def uniform(rng: random.Random) -> list[Example]:
    """2 sequences of 256 tokens, all of them trained on: what suits a padding loop best."""
    return random_examples(rng, VOCAB)


def random_examples(rng: random.Random, vocab: int) -> list[Example]:
    """2 sequences of 256 random tokens below `vocab`, all of them trained on."""
    return [Example([rng.randrange(vocab) for _ in range(256)], [False] + [True] * 255) for _ in range(2)]


def chats(rng: random.Random) -> list[Example]:
    """4 chats of 40 to 216 tokens, of which the last third is an answer: 512 tokens."""
    lengths = [40, 96, 160, 216]
    return [
        Example([rng.randrange(VOCAB) for _ in range(n)], [place >= n - n // 3 for place in range(n)]) for n in lengths
    ]


BATCHES: dict[str, Callable[[random.Random], list[Example]]] = {"uniform": uniform, "chats": chats}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=[], help="loop, beside, memory, jobs, trl; default: all but trl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=600, help="that the client streams in each phase of `beside`")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all")
    parser.add_argument("--steps", type=int, default=4, help="of each job in a phase of `jobs`")
    given = parser.parse_args(argv)
    console = Console()
    if warning := machine.busy():
        console.print(warning, style="yellow")
    keep_freed_memory()
    if not given.what or "loop" in given.what:
        for name in BATCHES:
            console.print(loop(name, given.repeats, checkpointing=given.checkpointing))
    if "trl" in given.what:
        for packing in (True, False):
            console.print(against_trl(1 + given.repeats, packing=packing))
    if not given.what or "memory" in given.what:
        console.print(memory())
    if not given.what or "jobs" in given.what:
        for table in several(given.repeats, given.steps, checkpointing=given.checkpointing):
            console.print(table)
    if not given.what or "beside" in given.what:
        console.print(asyncio.run(beside(given.repeats, given.tokens, checkpointing=given.checkpointing)))
    return 0


# -- the loop alone ------------------------------------------------------------------------------


def loop(name: str, repeats: int, *, checkpointing: bool) -> Table:
    """Forward and backward of one step, ours and PEFT's in turns, on the same examples."""
    decoder = load_decoder(open_checkpoint("demo"), load_settings(env={}).settings.model)
    lora = TrainableLora(decoder, targets(decoder), LoraShape(rank=16, alpha=32), seed=0)
    peft = peft_model(checkpointing=checkpointing)
    rng = random.Random(0)
    times: dict[str, list[float]] = {"transformers + peft": [], "Eft": []}
    for repeat in range(repeats + 1):
        examples = BATCHES[name](rng)
        for peer in times:
            begin = time.perf_counter()
            if peer == "Eft":
                ours = our_step(decoder, lora, examples, checkpointing=checkpointing)
            else:
                theirs = peft_step(peft, examples)
            if repeat:  # the first one warms up
                times[peer].append(time.perf_counter() - begin)
        assert abs(ours - theirs) < 1e-3, (ours, theirs)
    table = Table(title=f"training step, {name}: {BATCHES[name].__doc__}", title_justify="left")
    for column in ("", "tok/s", "ms", "low – high", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    base = statistics.median(times["transformers + peft"])
    for peer, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values) * 1e3:.0f} – {max(values) * 1e3:.0f}"
        table.add_row(peer, f"{512 / median:.0f}", f"{median * 1e3:.0f}", spread, f"{base / median:.2f}")
    return table


def our_step(decoder: Decoder, lora: TrainableLora, examples: list[Example], *, checkpointing: bool) -> float:
    batch = collate(examples, decoder.device)
    micro = MicroStep(decoder, training_ops(decoder.ops), lora, batch, checkpointing=checkpointing)
    slices = micro.forward_backward(1 / sum(example.num_trained for example in examples))
    try:
        wanted = next(slices)
        while True:
            wanted = slices.send(wanted.amount)
    except StopIteration:
        return micro.score.mean


def peft_model(model: str = "demo", *, checkpointing: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    base = load_transformers(model)
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM")).train()


def peft_step(model: Any, examples: list[Example]) -> float:
    """Padded on the right, as trainers do."""
    width = max(map(len, examples))
    ids = torch.tensor([example.token_ids + [0] * (width - len(example)) for example in examples])
    mask = torch.tensor([[1] * len(example) + [0] * (width - len(example)) for example in examples])
    trained = torch.tensor([example.trained + [False] * (width - len(example)) for example in examples])
    found = model(input_ids=ids, attention_mask=mask, labels=torch.where(trained, ids, -100))
    found.loss.backward()
    return float(found.loss.detach())


# -- whole runs against TRL ----------------------------------------------------------------------


def against_trl(steps: int, *, packing: bool) -> Table:
    """Optimizer steps of the same chats in turns, from the same first weights: each of the trainer's batches is ours
    too, the rows that it packed together as one of our sequences each."""
    trl: Any = importlib.import_module("trl")
    datasets: Any = importlib.import_module("datasets")
    rng = random.Random(0)
    rows = [example for _ in range(steps) for example in chats(rng)]
    data = datasets.Dataset.from_list(
        [{"input_ids": row.token_ids, "completion_mask": [int(one) for one in row.trained]} for row in rows]
    )
    model = peft_model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=folder,
                max_length=512,
                packing=packing,
                per_device_train_batch_size=1 if packing else len(rows) // steps,
                max_steps=steps,
                train_sampling_strategy="sequential",
                completion_only_loss=True,
                gradient_checkpointing=False,
                learning_rate=TRL_LEARNING_RATE,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=trl_tokenizer(),
        )
        batches = [unpacked(one) for one in trainer.train_dataset] if packing else grouped(rows, len(rows) // steps)
        decoder = load_decoder(open_checkpoint("demo"), load_settings(env={}).settings.model)
        job = Job(decoder, batches[:steps], learning_rate=TRL_LEARNING_RATE, steps=steps)
        begin_alike(model, job.run._lora.capture())
        turns = Turns(job)
        trainer.add_callback(turns.callback())
        trainer.train()
    theirs = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    table = Table(title=f"{against_trl.__doc__} {'With' if packing else 'Without'} packing.", title_justify="left")
    for column in ("", "tok/s", "ms", "low – high", "ratio", "first loss", "last loss"):
        table.add_column(column, justify="left" if not column else "right")
    tokens = statistics.mean(sum(map(len, batch)) for batch in batches[1:steps])
    base = statistics.median(turns.theirs[1:])
    for peer, values, losses in (("TRL", turns.theirs, theirs), ("Eft", turns.ours, job.losses)):
        median = statistics.median(values[1:])  # the first one warms up
        spread = f"{min(values[1:]) * 1e3:.0f} – {max(values[1:]) * 1e3:.0f}"
        ends = f"{losses[0]:.4f}", f"{losses[-1]:.4f}"
        table.add_row(peer, f"{tokens / median:.0f}", f"{median * 1e3:.0f}", spread, f"{base / median:.2f}", *ends)
    if abs(theirs[-1] - job.losses[-1]) > 0.01 * theirs[-1]:
        raise RuntimeError(f"the losses differ by more than 1%: {theirs} and {job.losses}")
    return table


TRL_LEARNING_RATE = 2e-4


class Turns:
    """Seconds of each optimizer step of a trainer and of ours after it."""

    def __init__(self, job: "Job") -> None:
        self._job = job
        self.theirs: list[float] = []
        self.ours: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        turns, begin = self, 0.0

        class Callback(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                nonlocal begin
                begin = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.theirs.append(time.perf_counter() - begin)
                turns.step()

        return Callback()

    def step(self) -> None:
        """One of ours."""
        begin, steps = time.perf_counter(), self._job.steps
        while self._job.steps == steps and not self._job.run.pacer.done:
            self._job.run.work(1.0)
        self.ours.append(time.perf_counter() - begin)


def trl_tokenizer() -> Any:
    """The base's tokenizer as transformers has it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    untyped: Any = PreTrainedTokenizerFast
    backend = Tokenizer.from_str(open_checkpoint("demo").tokenizer.definition)
    return untyped(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")


def unpacked(row: dict[str, Any]) -> list[Example]:
    """The rows that were packed into this one."""
    found, start = [], 0
    for length in row["seq_lengths"]:
        part = slice(start, start + length)
        found.append(Example(list(row["input_ids"][part]), [label >= 0 for label in row["labels"][part]]))
        start += length
    return found


def grouped(rows: list[Example], size: int) -> list[list[Example]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def begin_alike(model: Any, captured: dict[str, torch.Tensor]) -> None:
    """Give PEFT's A matrices our first values; its B are zeros as ours are."""
    places = {f"{part}_proj": ("qkv", place) for place, part in enumerate("qkv")}
    places |= {"o_proj": ("out", 0), "gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "down_proj": ("down", 0)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                words = name.split(".")
                linear, place = places[words[words.index("lora_A") - 1]]
                a = captured[f"{words[words.index('layers') + 1]}.{linear}.a"]
                parameter.copy_(torch.split(a, len(parameter))[place])


# -- memory --------------------------------------------------------------------------------------

MEASURED = """
import ctypes, gc, psutil, sys
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from settings.schema import ModelSettings
checkpoint = open_checkpoint("demo")
def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss
settings = ModelSettings(quantization=sys.argv[1], cache_quantised=False)
load_decoder(checkpoint, settings)
before = resident()
decoder = load_decoder(checkpoint, settings)
held = [one.data if one.quantised is None else one.quantised for one in decoder.parameters().values()]
print(resident() - before, sum(one.nbytes if hasattr(one, "nbytes") else one.num_bytes for one in held))
"""
"""Loads the base twice, so that libraries and caches are in memory already before the second."""


def memory() -> Table:
    """Bytes that the base takes in a process of its own: what its tensors hold, and by how much the process grows."""
    table = Table(title=f"memory: {memory.__doc__}", title_justify="left")
    for column in ("", "tensors (MB)", "ratio", "resident (MB)", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    whole: tuple[int, int] | None = None
    for kind in ("none", "int8", "int4", "nf4"):
        command = [sys.executable, "-c", MEASURED, kind]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        grown, held = map(int, text.splitlines()[-1].split())  # log lines come before it
        whole = whole or (held, grown)
        name = "float32" if kind == "none" else kind
        ratios = f"{held / whole[0]:.2f}", f"{grown / whole[1]:.2f}"
        table.add_row(name, f"{held / 1e6:.0f}", ratios[0], f"{grown / 1e6:.0f}", ratios[1])
    return table


# -- several jobs --------------------------------------------------------------------------------

SEVERAL = 4
FORMS = {"one": (1, MAX_JOINT_TOKENS), "four in turns": (SEVERAL, 0), "four together": (SEVERAL, MAX_JOINT_TOKENS)}
"""Number of jobs, and tokens of a pass that several of them may share."""

MICRO_BATCHES = {"1 x 64": (1, 64), "1 x 128": (1, 128), "2 x 256": (2, 256)}
"""Sequences of a micro-batch, and tokens of each."""


@dataclass(frozen=True)
class JobsPhase:
    """Jobs that train at once for a while; rates are of all of their tokens."""

    rate: float
    """A second."""
    cpu_rate: float
    """A second of the process's CPU time, which other processes disturb less."""
    grown: int
    """Bytes by which the process grew at most."""


def several(repeats: int, steps: int, *, checkpointing: bool) -> Iterator[Table]:
    """One job, four whose passes take turns, and four that go through the base together, on an idle machine."""
    decoder = load_decoder(open_checkpoint("demo"), load_settings(env={}).settings.model)
    base = sum(parameter.num_bytes for parameter in decoder.parameters().values())
    for name, (sequences, length) in MICRO_BATCHES.items():
        rng = random.Random(0)
        epoch = [[sequence_of(rng, length) for _ in range(sequences)] for _ in range(64)]
        phases: dict[str, list[JobsPhase]] = {form: [] for form in FORMS}
        for _ in range(repeats):
            for form, (count, joint_tokens) in FORMS.items():
                phases[form].append(jobs_phase(decoder, count, joint_tokens, epoch, steps, checkpointing=checkpointing))
        table = Table(title=f"several jobs, micro-batches of {name}: {several.__doc__}", title_justify="left")
        for column in ("jobs", "tok/s", "low – high", "ratio", "tok / CPU s", "ratio", "memory, of the base"):
            table.add_column(column, justify="right")
        one, one_cpu = medians(phases["one"])
        for form, found in phases.items():
            rates = [phase.rate for phase in found]
            rate, cpu_rate = medians(found)
            grown = max(phase.grown for phase in found) / base
            cells = f"{rate:.0f}", f"{min(rates):.0f} – {max(rates):.0f}", f"{rate / one:.2f}"
            table.add_row(form, *cells, f"{cpu_rate:.0f}", f"{cpu_rate / one_cpu:.2f}", f"{grown:.2f}")
        yield table


def medians(phases: Sequence[JobsPhase]) -> tuple[float, float]:
    """Median rates, by time and by CPU time."""
    return statistics.median(phase.rate for phase in phases), statistics.median(phase.cpu_rate for phase in phases)


def sequence_of(rng: random.Random, length: int) -> Example:
    return Example([rng.randrange(VOCAB) for _ in range(length)], [False] + [True] * (length - 1))


def jobs_phase(
    decoder: Model, count: int, joint_tokens: int, epoch: list[list[Example]], steps: int, *, checkpointing: bool
) -> JobsPhase:
    """`count` jobs, in this number of steps of each after its first."""
    process = psutil.Process()
    give_back_memory()
    before = largest = process.memory_info().rss
    host = TrainingHost(TrainingShare(LatencyTargets(), min_share=0.2), joint_tokens=joint_tokens)
    jobs = [Job(decoder, epoch, checkpointing=checkpointing) for _ in range(count)]
    for job in jobs:
        host.attach(job.run, job.note)
    for most in (1, 1 + steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        tokens = sum(job.run.tokens_done for job in jobs)
        while any(job.steps < most for job in jobs):
            host.idle()
            largest = max(largest, process.memory_info().rss)
            if failed := [job.failed for job in jobs if job.failed]:
                raise RuntimeError(f"jobs have failed: {failed}")
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    tokens = sum(job.run.tokens_done for job in jobs) - tokens
    for job in jobs:
        host.detach(job.run)
    return JobsPhase(tokens / seconds, tokens / cpu_seconds, largest - before)


# -- beside requests -----------------------------------------------------------------------------


async def beside(repeats: int, tokens: int, *, checkpointing: bool) -> Table:
    """The same engine and the same job, each alone and both together, in turns."""
    settings = load_settings(env={}, flags={"model": "demo", "dtype": "float32", "prefix_caching": False}).settings
    service = EngineService.load(settings)
    decoder = service.decoder
    share = TrainingShare(LatencyTargets.of(settings.scheduler), min_share=settings.trainer.min_share)
    host = service.background = TrainingHost(
        share, riding_rows=settings.trainer.riding_rows, kept_widths=lambda: service.engine.kept_widths
    )
    service.start()
    machine.settle()
    try:
        await stream(service, 20)
        found = Beside()
        for _ in range(repeats):
            found.quiet.append(await stream(service, tokens))
            found.alone.append(
                await service.call(lambda: stand_alone(Job(decoder, random_epoch(), checkpointing=checkpointing)))
            )
            job = Job(decoder, random_epoch(), checkpointing=checkpointing)
            service.on_engine_thread(lambda job=job: host.attach(job.run, job.note))  # type: ignore[misc]
            while job.steps < 2:  # noqa: ASYNC110 - the engine thread does not announce it
                await asyncio.sleep(0.1)  # the first steps learn what pieces cost
            job.rate()
            await asyncio.sleep(8.0)
            found.idle.append(job.rate())
            found.busy.append(await stream_beside(service, job, tokens))
            found.beside.append(job.rate())
            service.on_engine_thread(lambda job=job: host.detach(job.run))  # type: ignore[misc]
            await stream(service, 5)
    finally:
        await service.stop(0.0)
    return found.table()


async def stream_beside(service: EngineService, job: "Job", tokens: int) -> list[float]:
    """The gaps of answers of `tokens` tokens, one after the other until a whole step of the job was done meanwhile."""
    gaps, steps = await stream(service, tokens), job.steps
    while job.steps < steps + 1:
        gaps += await stream(service, tokens)
    return gaps


class Beside:
    """What was measured, a value (or a list of gaps) a repeat."""

    def __init__(self) -> None:
        self.quiet: list[list[float]] = []
        self.busy: list[list[float]] = []
        self.alone: list[float] = []
        self.idle: list[float] = []
        self.beside: list[float] = []

    def table(self) -> Table:
        table = Table(title=f"training beside requests: {beside.__doc__}", title_justify="left")
        for column in ("", "alone", "together", "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        for name, share in (("time per output token, median", 0.5), ("time per output token, 95th percentile", 0.95)):
            quiet, busy = (statistics.median(percentile(g, share) for g in gaps) for gaps in (self.quiet, self.busy))
            table.add_row(f"{name} (ms)", f"{quiet * 1e3:.1f}", f"{busy * 1e3:.1f}", f"{busy / quiet:.2f}")
        alone = statistics.median(self.alone)
        for name, values in (("in the server, no requests", self.idle), ("in the server, one stream", self.beside)):
            rate = statistics.median(values)
            table.add_row(f"job, {name} (tok/s)", f"{alone:.0f}", f"{rate:.0f}", f"{rate / alone:.2f}")
        return table


class Job:
    """A run without an end, and how fast it is."""

    def __init__(
        self,
        decoder: Model,
        epoch: Sequence[list[Example]],
        *,
        checkpointing: bool = False,
        learning_rate: float = 1e-5,
        steps: int = 1_000_000,
    ) -> None:
        """`epoch`: the examples of each step."""
        recipe = Recipe(
            adapter="lora",
            lora_r=16,
            lora_alpha=32.0,
            datasets=(Dataset(path="rows.jsonl"),),
            learning_rate=learning_rate,
            lr_scheduler="constant",
            gradient_checkpointing=checkpointing,
            loss_watchdog_threshold=100.0,  # random tokens are worse than guessing
        )
        schedule = Schedule(
            microbatches_per_epoch=len(epoch),
            steps_per_epoch=len(epoch),
            total_steps=steps,
            epochs=steps / len(epoch),
            warmup_steps=0,
            eval_every=None,
            save_every=None,
        )
        spec = RunSpec(recipe=recipe, schedule=schedule, targets=targets(decoder))
        self.failed: str | None = None
        self.losses: list[float] = []
        """Of each step."""
        self.run = TrainingRun(decoder, spec, lambda _: [*epoch], [], self.note, write_nothing)
        self._asked = time.perf_counter(), 0.0
        """When `rate` was last asked, and the tokens then."""

    def note(self, event: RunEvent) -> None:
        if isinstance(event, StepEvent):
            self.losses.append(event.loss)
        if isinstance(event, FailedEvent):
            self.failed = event.message

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.run.step

    def rate(self) -> float:
        """Tokens a second since this was last asked, those of a step under way in part."""
        now = time.perf_counter(), self.run.tokens_done
        (before, tokens), self._asked = self._asked, now
        return (now[1] - tokens) / (now[0] - before)


def random_epoch(vocab: int = VOCAB) -> list[list[Example]]:
    rng = random.Random(0)
    return [random_examples(rng, vocab) for _ in range(64)]


def stand_alone(job: Job) -> float:
    """The same loop with the machine to itself, on the thread that has the OpenMP team: 4 steps after the first
    two, which get memory from the system."""
    for more in (2, 4):
        job.rate()
        steps = job.steps + more
        while job.steps < steps:
            job.run.work(1.0)
            if job.run.pacer.done:
                raise RuntimeError(f"the run has ended: {job.failed}")
    job.run.pacer.close()
    return job.rate()


async def stream(service: EngineService, tokens: int, prompt: list[int] | None = None) -> list[float]:
    """The gaps between the tokens of one greedy answer, in seconds. `prompt`: 64 random ids by default."""
    prompt = prompt or random.Random(tokens).choices(range(VOCAB), k=64)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    submission = Submission(request_id=f"stream-{time.monotonic_ns()}", prompt_ids=prompt, params=params)
    times = []
    async for output in service.submit(submission):
        times += [time.perf_counter()] * len(output.token_ids)
    return [later - earlier for earlier, later in pairwise(times)]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def targets(decoder: Model) -> dict[tuple[int, str], tuple[str, ...]]:
    return {(layer.index, name): parts for layer in decoder.layers for name, parts in PARTS.items()}


def write_nothing(path: Path, adapter: Adapter) -> None:
    """Nothing is published here."""


if __name__ == "__main__":
    sys.exit(main())
