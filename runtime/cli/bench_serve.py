"""`eft bench serve`: load on any OpenAI-style server, and what it made of it."""

from typing import Annotated, Literal

import uvloop
from cyclopts import Parameter

from runtime.cli.flags import Json
from runtime.cli.load.spec import LoadSpec
from runtime.cli.loadgen import Sample, render, run_load
from runtime.cli.output import console
from runtime.cli.progress import Meter

_DEFAULT = LoadSpec()


def bench_serve(
    *,
    url: Annotated[str, Parameter(help="The server, with or without a trailing /v1.")] = _DEFAULT.url,
    model: Annotated[str | None, Parameter(help="Default: the first model that the server lists.")] = None,
    endpoint: Annotated[Literal["chat", "completions"], Parameter(help="What to ask.")] = _DEFAULT.endpoint,
    requests: Annotated[int, Parameter(help="How many.")] = _DEFAULT.requests,
    concurrency: Annotated[
        int | None, Parameter(help="Closed loop: so many at once; default 8. Not with --rate.")
    ] = None,
    rate: Annotated[
        float | None,
        Parameter(help="Open loop: so many a second, at Poisson times, however slow the answers."),
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
