"""What the API and grammars cost beside the model.

python -m benchmarks.surface streams    SSE chunks a second of a tiny model to 64 clients, alone and with top_logprobs 5
python -m benchmarks.surface schema     time per output token with a JSON schema and without, 32 rows at once
python -m benchmarks.surface watching   what metrics, scrapes and the page's stream take beside 32 rows that are decoded
"""

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import uvloop

from benchmarks.inprocess import served
from benchmarks.machine import busy
from benchmarks.work import Prompts
from runtime import LLM, SamplingParams
from runtime.api.admin.overview import INTERVAL_SECONDS, OverviewHistory
from runtime.messages import Submission
from runtime.text.grammar import GrammarBuilder, json_part
from tests.tiny import make_tiny_llama

WAYS: dict[str, dict[str, Any]] = {"plain": {}, "top_logprobs 5": {"logprobs": True, "top_logprobs": 5}}

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 30},
        "kind": {"enum": ["newt", "frog", "toad", "salamander"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "poisonous": {"type": "boolean"},
        "length": {"type": "number", "minimum": 0},
    },
    "required": ["name", "kind", "legs", "poisonous", "length"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 200}
"""Of an answer that does not end before it is cut."""


async def count_chunks(url: str, body: dict[str, Any], clients: int) -> tuple[int, float]:
    """Chunks that `clients` streams of the same length got together, and the seconds from first to last."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data
    arrivals: list[float] = []

    async def stream() -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        found, tail = 0, b""
        while piece := await reader.read(65536):
            arrivals.append(time.perf_counter())
            found += (tail + piece).count(b"data: {") - tail.count(b"data: {")
            tail = piece[-6:]
        writer.close()
        return found

    counts = await asyncio.gather(*(stream() for _ in range(clients)))
    return sum(counts), max(arrivals) - min(arrivals)


def streams(clients: int, tokens: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "tiny", max_position_embeddings=2048)
        overrides = {"num_blocks": str(clients * (tokens // 16 + 8)), "threads": "1"}
        with served(str(model), at_once=clients, overrides=overrides) as url:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            costs: dict[str, list[float]] = {way: [] for way in WAYS}
            (server,) = psutil.Process().children()
            for number in range(repeats + 1):
                for way, fields in WAYS.items():
                    body = {
                        "messages": [{"role": "user", "content": f"Hello {number}"}],
                        "max_tokens": tokens,
                        "stream": True,
                        "ignore_eos": True,
                        "temperature": 0,
                        **fields,
                    }
                    before = cpu_seconds(server)
                    count, seconds = uvloop.run(count_chunks(url, body, clients))
                    if count < clients * tokens // 2:  # a token that is part of a character has no chunk
                        raise RuntimeError(f"{count} chunks came of {clients} streams of {tokens} tokens")
                    if number:  # the first warms up
                        rates[way].append(count / seconds)
                        costs[way].append(1e6 * (cpu_seconds(server) - before) / count)
    for way, some in rates.items():
        rate = f"{median(some):,.0f} chunks/s ({min(some):,.0f} – {max(some):,.0f})"
        print(f"{way}: {rate}, {median(costs[way]):,.0f} µs of the server's CPU a chunk")


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def seconds_per_token(llm: LLM, prompts: Sequence[list[int]], tokens: int, grammar: str) -> tuple[float, float]:
    """Of one row, once all have their first token: of time, and of the CPU's."""
    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=1, ignore_eos=not grammar)
    asked = [
        Submission(request_id=str(number), prompt_ids=prompt, params=params, grammar=grammar)
        for number, prompt in enumerate(prompts)
    ]
    llm.engine.submit_all(asked)
    got = dict.fromkeys((one.id for one in asked), 0)
    begin, cpu, begun = 0.0, 0.0, 0
    while llm.engine.busy:
        for output in llm.engine.step():
            got[output.id] += len(output.token_ids)
        if not begin and all(got.values()):
            begin, cpu, begun = time.perf_counter(), time.process_time(), sum(got.values())
    share = len(prompts) / (sum(got.values()) - begun)
    return (time.perf_counter() - begin) * share, (time.process_time() - cpu) * share


def schema(model: str, rows: int, tokens: int, repeats: int) -> None:
    llm = LLM(model, dtype="float32", max_running=rows)
    builder = GrammarBuilder(llm.engine.grammars.special_id)
    grammar = builder.build(builder.part("body", json_part(SCHEMA, "schema")))
    llm.engine.grammars.compile(grammar)
    prompts = Prompts(llm.tokenizer.encode, 1)
    found: dict[str, list[tuple[float, float]]] = {"": [], grammar: []}
    for number in range(repeats + 1):
        for text, some in found.items():
            one = seconds_per_token(llm, [prompts.ids(64) for _ in range(rows)], tokens, text)
            if number:  # the first warms up
                some.append(one)
    for at, what in enumerate(("time", "CPU")):
        plain, held = ([one[at] for one in some] for some in found.values())
        ratios = [one / other for one, other in zip(held, plain, strict=True)]
        print(f"{what}: {median(plain) * 1000:.2f} ms a token, with a schema {median(held) * 1000:.2f} ms")
        print(f"  ratio {median(ratios):.3f} ({min(ratios):.3f} – {max(ratios):.3f})")


SCRAPE_SECONDS = 15
"""Time between two scrapes, as settings/observability/prometheus.yml has it."""
ADAPTERS, ROUTES = 16, 40
"""Adapters in memory, and routes that were called, while the metrics are scraped."""


class Stopwatch:
    """The time that an object's methods take, from outside."""

    def __init__(self, watched: Any, prefix: str) -> None:
        self.seconds = 0.0
        for name in dir(watched):
            if name.startswith(prefix):
                setattr(watched, name, self._timed(getattr(watched, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def watching(model: str, rows: int, tokens: int, repeats: int) -> None:
    """Decoding in this process, its metrics timed from outside (an upper bound: the stopwatch is in it), and beside it
    scrapes and samples of the page."""
    llm = LLM(model, dtype="float32", max_running=rows)
    metrics = llm.engine.metrics
    for number in range(ADAPTERS):
        metrics.on_adapter_loaded(f"adapter-{number}@1:x")
    for number in range(ROUTES):
        metrics.on_http("GET", 200, f"/route/{number}", 0.1)
    prompts = Prompts(llm.tokenizer.encode, 1)
    shares = []
    counted = Stopwatch(metrics, "on_")
    for number in range(repeats + 1):
        begin, before = time.perf_counter(), counted.seconds
        llm.generate([prompts.ids(64) for _ in range(rows)], SamplingParams(max_tokens=tokens, ignore_eos=True))
        if number:  # the first warms up
            shares.append((counted.seconds - before) / (time.perf_counter() - begin))
    print(f"metrics: {median(shares):.3%} of the time of {rows} rows ({min(shares):.3%} – {max(shares):.3%})")

    busy_engine = threading.Thread(
        target=llm.generate,
        args=([prompts.ids(64) for _ in range(rows)], SamplingParams(max_tokens=tokens, ignore_eos=True)),
    )
    service = SimpleNamespace(metrics=metrics, num_running=rows, num_waiting=0, kv_usage=0.5, ready=True)
    history = OverviewHistory(SimpleNamespace(service=service))  # type: ignore[arg-type]
    scrapes: list[float] = []
    samples: list[float] = []
    busy_engine.start()
    while busy_engine.is_alive() and len(scrapes) < 200:
        begin = time.perf_counter()
        text, _ = metrics.render()
        scrapes.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        history.take(time.time())
        msgspec.json.encode(history.samples[-1])
        samples.append(time.perf_counter() - begin)
        time.sleep(0.05)
    busy_engine.join()
    each = f"{1e3 * median(scrapes):.1f} ms ({1e3 * max(scrapes):.1f} at most)"
    share = f"{median(scrapes) / SCRAPE_SECONDS:.3%} of a core at one every {SCRAPE_SECONDS} s"
    print(f"scrape: {len(text):,} bytes in {each} beside it, {share}")
    print(f"page: a sample in {1e3 * median(samples):.2f} ms, {median(samples) / INTERVAL_SECONDS:.3%} of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["streams", "schema", "watching"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="demo", help="for `schema` and `watching`")
    asked = parser.parse_args()
    if warning := busy():
        print(warning)
    if asked.what == "streams":
        streams(asked.clients, asked.tokens, asked.repeats)
    elif asked.what == "watching":
        watching(asked.model, asked.rows, asked.tokens, asked.repeats)
    else:
        schema(asked.model, asked.rows, asked.tokens, asked.repeats)


if __name__ == "__main__":
    main()
