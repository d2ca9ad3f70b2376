"""`eft bench serve`: load on any OpenAI-style server, and a report."""

import random
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import uvloop
from cyclopts import Parameter
from msgspec import Struct
from rich.table import Table

from runtime.cli.flags import MODEL_SECTIONS, ConfigFile, Json, read_settings, with_settings
from runtime.cli.load_prompts import WORDS, LoadSpec
from runtime.cli.loadgen import Sample, Stats, render, run_load
from runtime.cli.output import Meter, UsageError, console
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.llm import LLM, Completion


_DEFAULT = LoadSpec()


def bench_serve(
    *,
    url: Annotated[str, Parameter(help="The server, with or without a trailing /v1.")] = _DEFAULT.url,
    model: Annotated[str | None, Parameter(help="Default: the first model that the server lists.")] = None,
    endpoint: Annotated[Literal["chat", "completions"], Parameter(help="What to ask.")] = _DEFAULT.endpoint,
    requests: Annotated[int, Parameter(help="How many.")] = _DEFAULT.requests,
    concurrency: Annotated[
        int | None, Parameter(help="Closed loop: requests at once; default 8. Not with --rate.")
    ] = None,
    rate: Annotated[
        float | None,
        Parameter(help="Open loop: requests a second, at Poisson times, however slow the answers."),
    ] = None,
    input_len: Annotated[int, Parameter(help="Prompt tokens of each request.")] = _DEFAULT.input_len,
    output_len: Annotated[int, Parameter(help="Tokens to generate.")] = _DEFAULT.output_len,
    ignore_eos: Annotated[
        bool,
        Parameter(help="Exactly --output-len tokens. --no-ignore-eos for servers that refuse the field."),
    ] = _DEFAULT.ignore_eos,
    shared_prefix: Annotated[
        int, Parameter(help="Tokens that every prompt begins with, besides its own.")
    ] = _DEFAULT.shared_prefix,
    seed: Annotated[int, Parameter(help="Same seed, same load.")] = _DEFAULT.seed,
    temperature: Annotated[float, Parameter(help="0 is greedy.")] = _DEFAULT.temperature,
    api_key: Annotated[str | None, Parameter(help="Key for the server; default: EFT_API_KEY.")] = None,
    timeout: Annotated[float, Parameter(help="Seconds after which a request has failed.")] = _DEFAULT.timeout,
    json: Json = False,
) -> int:
    """Returns 1 where a request failed."""
    spec = LoadSpec(
        url=url,
        model=model,
        endpoint=endpoint,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        input_len=input_len,
        output_len=output_len,
        ignore_eos=ignore_eos,
        shared_prefix=shared_prefix,
        seed=seed,
        temperature=temperature,
        api_key=api_key,
        timeout=timeout,
    )
    spec.verify()
    with Meter("bench", requests) as meter:
        failed = 0

        def on_progress(sample: Sample) -> None:
            nonlocal failed
            failed += sample.error is not None
            meter.advance(f"{failed} failed" if failed else "")

        report = uvloop.run(run_load(spec, on_progress))
    if json:
        print(report.to_json().decode())
    else:
        console().print(render(report))
    return 1 if report.failed else 0


# -- offline ---------------------------------------------------------------------------------------
#
# `eft bench offline`: the engine alone, without HTTP, on prompts of random words.


class OfflineSpec(Struct, frozen=True, kw_only=True):
    """The work, reproducible from its seed. Lengths are in tokens."""

    requests: int
    concurrency: int
    input_len: int
    output_len: int
    shared_prefix: int
    seed: int

    def verify(self) -> None:
        """Raise `UsageError` naming the first invalid field."""
        for name, least in {"requests": 1, "input_len": 1, "output_len": 1, "shared_prefix": 0}.items():
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")


class OfflineReport(Struct, frozen=True, kw_only=True):
    """Results of a run. Rates are over `duration`, without loading and warm-up. Times are in seconds."""

    spec: OfflineSpec
    model: str
    load_time: float
    duration: float
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Stats | None
    """Time to first token, from the start of the whole run: all requests are submitted at once."""
    e2e: Stats | None


@with_settings(*MODEL_SECTIONS)
def bench_offline(
    model: Annotated[str | None, Parameter(help="As in `eft serve MODEL`.")] = None,
    *,
    requests: Annotated[int, Parameter(help="How many.")] = 64,
    max_running: Annotated[
        int, Parameter(name=["--concurrency", "--max-running"], help="Most sequences running at once.")
    ] = 32,
    input_len: Annotated[int, Parameter(help="Prompt tokens of each request.")] = 120,
    output_len: Annotated[int, Parameter(help="Tokens to generate, exactly.")] = 128,
    shared_prefix: Annotated[int, Parameter(help="Tokens that every prompt begins with, besides its own.")] = 0,
    seed: Annotated[int, Parameter(help="Same seed, same prompts.")] = 0,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Generate greedily, all requests submitted at once, and report the rates."""
    settings = read_settings(flags, config, model=model, max_running=max_running).settings
    spec = OfflineSpec(
        requests=requests,
        concurrency=max_running,
        input_len=input_len,
        output_len=output_len,
        shared_prefix=shared_prefix,
        seed=seed,
    )
    spec.verify()
    report = _measure(spec, settings)
    if json:
        print(msgspec.json.encode(report).decode())
    else:
        console().print(_table(report))


def _measure(spec: OfflineSpec, settings: Settings) -> OfflineReport:
    from runtime.support.version import refuse_clash

    refuse_clash()
    from runtime.llm import LLM

    begin = time.perf_counter()
    llm = LLM(settings=settings)
    loaded = time.perf_counter()
    # The first steps include lazy setup. Another seed, so that these prompts leave no hits in the prefix cache.
    _generate(llm, _prompts(llm, msgspec.structs.replace(spec, requests=1, seed=~spec.seed)), 2)
    prompts = _prompts(llm, spec)
    started = time.perf_counter()
    done = _generate(llm, prompts, spec.output_len)
    duration = time.perf_counter() - started
    prompt_tokens, output_tokens = sum(map(len, prompts)), sum(len(one.token_ids) for one in done)
    return OfflineReport(
        spec=spec,
        model=llm.model_name,
        load_time=loaded - begin,
        duration=duration,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(one.cached_tokens for one in done),
        output_tokens=output_tokens,
        prompt_tokens_per_s=prompt_tokens / duration,
        output_tokens_per_s=output_tokens / duration,
        requests_per_s=len(done) / duration,
        ttft=Stats.of([one.ttft for one in done]),
        e2e=Stats.of([one.e2e for one in done]),
    )


def _prompts(llm: "LLM", spec: OfflineSpec) -> list[list[int]]:
    """Prompts of exactly `shared_prefix + input_len` tokens, made of ordinary words."""
    ids = llm.tokenizer.encode(" " + " ".join(WORDS), add_special_tokens=False)
    prefix = random.Random(f"prefix {spec.seed}").choices(ids, k=spec.shared_prefix)
    rng = random.Random(f"own {spec.seed}")
    return [prefix + rng.choices(ids, k=spec.input_len) for _ in range(spec.requests)]


def _generate(llm: "LLM", prompts: list[list[int]], length: int) -> list["Completion"]:
    from runtime.messages import SamplingParams

    return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))


def _table(report: OfflineReport) -> Table:
    spec = report.spec
    title = (
        f"{report.model}: {spec.requests} requests, {spec.concurrency} at once, "
        f"{spec.shared_prefix + spec.input_len} in, {spec.output_len} out"
    )
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    rows = {
        "output": f"{report.output_tokens_per_s:.1f} tok/s",
        "prompt": f"{report.prompt_tokens_per_s:.1f} tok/s",
        "requests": f"{report.requests_per_s:.2f} /s",
        "prompt tokens cached": f"{report.cached_tokens} of {report.prompt_tokens}",
        "duration": f"{report.duration:.2f} s",
        "loading": f"{report.load_time:.2f} s",
    }
    for label, value in rows.items():
        table.add_row(label, value)
    for label, stats in (("time to first token", report.ttft), ("end to end", report.e2e)):
        if stats is not None:
            table.add_row(f"{label}, median", f"{stats.p50:.2f} s")
    return table
