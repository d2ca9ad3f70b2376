"""Sections that measure: what the card can do, and what serving and training make of it."""

import asyncio
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.correct import make_examples
from benchmarks.gpu.report import Clock, Figures, NotHere
from benchmarks.gpu.subject import MAX_PROMPT, Generated, Row, Subject, generate, synchronise
from benchmarks.training import Beside, Job, percentile, stand_alone, stream
from runtime.engine.assembly import Assembled
from runtime.engine.service import EngineService
from runtime.trainer.host import TrainingHost
from runtime.trainer.slices import LatencyTargets, TrainingShare

BATCHES = (1, 64, 256)
PROMPT = 128
REPEATS = 3


class Roofline:
    """What the device reaches alone: filled by `measure_roofline`, read by the sections after it."""

    def __init__(self) -> None:
        self.bytes_per_second = 0.0
        """Read and written together, by a copy larger than any cache."""
        self.flops = 0.0
        """Of a large matmul in the model's type."""


def measure_roofline(subject: Subject, roofline: Roofline, clock: Clock, figures: Figures) -> None:
    """Copy bandwidth and matmul throughput."""
    on_gpu = subject.device.type == "cuda"
    num_bytes = 1 << (31 if on_gpu else 26)
    roofline.bytes_per_second = 2 * num_bytes / _copy_seconds(subject, num_bytes, clock.share(0.5))
    size = 8192 if on_gpu else 512
    a, b = (torch.randn(size, size, device=subject.device).to(subject.dtype) for _ in range(2))
    roofline.flops = 2 * size**3 / _best(lambda: a @ b, subject, clock)
    figures["copy, GB/s"] = roofline.bytes_per_second / 1e9
    figures["matmul, TFLOP/s"] = roofline.flops / 1e12


def _copy_seconds(subject: Subject, num_bytes: int, clock: Clock) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=subject.device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), subject, clock)


def _best(work: Callable[[], object], subject: Subject, clock: Clock) -> float:
    """Seconds of the fastest of several calls, at least one after the first."""
    work()
    times: list[float] = []
    while len(times) < 20 and (not times or clock.left > 0):
        synchronise(subject.device)
        begin = time.perf_counter()
        work()
        synchronise(subject.device)
        times.append(time.perf_counter() - begin)
    return min(times)


# -- serving ---------------------------------------------------------------------------------------


def serving(subject: Subject, roofline: Roofline, clock: Clock, figures: Figures) -> None:
    """Decoding of 1, 64 and 256 rows, prefill, and time to first token, beside the roofline."""
    with subject.engine() as assembled:
        num_bytes, elements = _weights(assembled)
        for batch in batches(subject):
            result = _repeated(assembled, subject, batch, clock.share(0.5))
            figures[f"batch {batch}, tok/s"] = result.decode_rate
            if batch == 1:
                figures["of the roofline, batch 1"] = result.decode_rate * num_bytes / roofline.bytes_per_second
        rate, ttft = _prefill(assembled, subject)
        figures["prefill, tok/s"] = rate
        figures["of the roofline, prefill"] = rate * 2 * elements / roofline.flops
        figures["ttft, ms"] = 1e3 * ttft


def _weights(assembled: Assembled) -> tuple[int, int]:
    """(bytes, elements) of the weights that every step reads. An embedding that is no head too is only looked up."""
    parameters = assembled.decoder.parameters()
    if "head.weight" in parameters:
        del parameters["embedding.weight"]
    values = [parameter.value for parameter in parameters.values()]
    num_bytes = sum(value.nbytes if isinstance(value, torch.Tensor) else value.num_bytes for value in values)
    return num_bytes, sum(value.shape.numel() for value in values)


def batches(subject: Subject) -> list[int]:
    """The numbers of rows that are measured."""
    return [batch for batch in BATCHES if batch <= subject.most]


def _lengths(subject: Subject) -> tuple[int, int]:
    """Tokens of a prompt and of an answer."""
    return (PROMPT, 128) if subject.device.type == "cuda" else (32, 16)


def _repeated(assembled: Assembled, subject: Subject, batch: int, clock: Clock) -> Generated:
    """The median run by decode rate, after one that warms up."""
    length, count = _lengths(subject)
    generate(assembled, [Row(prompt) for prompt in subject.prompts(batch, length)], 4)
    runs: list[Generated] = []
    while len(runs) < REPEATS and (not runs or clock.left > 0):
        runs.append(generate(assembled, [Row(prompt) for prompt in subject.prompts(batch, length)], count))
    return sorted(runs, key=lambda run: run.decode_rate)[len(runs) // 2]


def _prefill(assembled: Assembled, subject: Subject) -> tuple[float, float]:
    """(prompt tokens a second of one long batch, seconds to the first token of a lone prompt)."""
    length = min(MAX_PROMPT, subject.context - 8)
    rows = 8 if subject.device.type == "cuda" else 2
    alone = [generate(assembled, [Row(prompt)], 1).ttft[0] for prompt in subject.prompts(3, min(512, length))]
    many = generate(assembled, [Row(prompt) for prompt in subject.prompts(rows, length)], 1)
    return rows * length / many.seconds, statistics.median(alone)


# -- peers -----------------------------------------------------------------------------------------


def against_transformers(subject: Subject, clock: Clock, figures: Figures) -> None:
    """The same batches through `generate` of transformers, and how many times faster ours are, whole requests."""
    length, count = _lengths(subject)
    ours: dict[int, float] = {}
    with subject.engine() as assembled:
        for batch in batches(subject):
            generate(assembled, [Row(prompt) for prompt in subject.prompts(batch, length)], 4)
            ours[batch] = generate(assembled, [Row(prompt) for prompt in subject.prompts(batch, length)], count).rate
    with subject.transformers() as peer:
        for batch in batches(subject):
            if batch > 1 and clock.left <= 0:
                figures[f"batch {batch}"] = "left out: no time"
                continue
            ids = torch.tensor(subject.prompts(batch, length), device=subject.device)
            _hf_generate(peer, ids, 4)
            synchronise(subject.device)
            begin = time.perf_counter()
            _hf_generate(peer, ids, count)
            synchronise(subject.device)
            theirs = batch * count / (time.perf_counter() - begin)
            figures[f"batch {batch}"] = {"ours tok/s": ours[batch], "transformers": theirs, "x": ours[batch] / theirs}


@torch.inference_mode()
def _hf_generate(peer: Any, ids: torch.Tensor, count: int) -> None:
    peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


VLLM_CHILD = """
import json, sys, time
from vllm import LLM, SamplingParams
asked = json.load(sys.stdin)
llm = LLM(model=asked["model"], max_num_seqs=asked["most"], enable_prefix_caching=False, seed=0)
def run(prompts, count):
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    begin = time.perf_counter()
    made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert all(len(one.outputs[0].token_ids) == count for one in made)
    return len(prompts) * count / (time.perf_counter() - begin)
rates = {}
for batch, prompts in asked["batches"].items():
    run(prompts, 4)
    rates[batch] = run(prompts, asked["count"])
print("RATES " + json.dumps(rates))
"""
"""Program of a process of its own: vLLM keeps the memory that it takes."""


def against_vllm(subject: Subject, clock: Clock, figures: Figures) -> None:
    """The same batches through vLLM, where it is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise NotHere("vllm is not installed")
    length, count = _lengths(subject)
    prompts = {batch: subject.prompts(batch, length) for batch in batches(subject)}
    asked = {"model": subject.model, "most": subject.most, "count": count, "batches": prompts}
    done = subprocess.run(
        [sys.executable, "-c", VLLM_CHILD],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=max(clock.left, 1.0),
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RATES ")]
    if done.returncode or not lines:
        raise RuntimeError(f"vLLM ended with {done.returncode}: {done.stderr[-2000:]}")
    theirs = json.loads(lines[0].removeprefix("RATES "))
    with subject.engine() as assembled:
        for batch, rows in prompts.items():
            generate(assembled, [Row(prompt) for prompt in rows], 4)
            ours = generate(assembled, [Row(prompt) for prompt in rows], count).rate
            rate = theirs[str(batch)]
            figures[f"batch {batch}"] = {"ours tok/s": ours, "vLLM": rate, "x": ours / rate}


# -- training beside requests ----------------------------------------------------------------------


def beside_training(subject: Subject, clock: Clock, figures: Figures) -> None:
    """A stream and a training job, each alone and both together."""
    asyncio.run(_beside(subject, clock, figures))


async def _beside(subject: Subject, clock: Clock, figures: Figures) -> None:
    settings = subject.settings
    service = EngineService.load(settings)
    share = TrainingShare(LatencyTargets.of(settings.scheduler), min_share=settings.trainer.min_share)
    host = service.background = TrainingHost(share)
    service.start()
    prompt, tokens = subject.prompts(1, 64)[0], 200 if subject.device.type == "cuda" else 60
    try:
        await stream(service, 20, prompt)
        found = Beside()
        found.quiet.append(await stream(service, tokens, prompt))
        epoch = make_examples(subject, 16)
        found.alone.append(await service.call(lambda: stand_alone(Job(service.decoder, epoch))))
        job = Job(service.decoder, epoch)
        service.on_engine_thread(lambda: host.attach(job.run, job.note))
        await asyncio.sleep(8.0 if subject.device.type == "cuda" else 1.0)
        found.idle.append(job.rate())
        gaps, steps = await stream(service, tokens, prompt), job.steps
        while job.steps < steps + 3 and clock.left > 0:
            gaps += await stream(service, tokens, prompt)
        found.busy.append(gaps)
        found.beside.append(job.rate())
        service.on_engine_thread(lambda: host.detach(job.run))
    finally:
        await service.stop(0.0)
    for name, part in (("median", 0.5), ("95th percentile", 0.95)):
        quiet, busy = percentile(found.quiet[0], part), percentile(found.busy[0], part)
        figures[f"time per output token, {name}"] = {
            "alone ms": 1e3 * quiet,
            "beside ms": 1e3 * busy,
            "x": busy / quiet,
        }
    alone = found.alone[0]
    figures["training tok/s, alone"] = alone
    figures["training, share of it in the server, no requests"] = found.idle[0] / alone
    figures["training, share of it beside a stream"] = found.beside[0] / alone
