"""What the API and grammars cost beside the model.

python -m benchmarks.surface streams    SSE chunks a second of a tiny model to 64 clients, alone and with top_logprobs 5
python -m benchmarks.surface schema     time per output token with a JSON schema and without, 32 rows at once
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop

from benchmarks.inprocess import served
from benchmarks.machine import busy
from benchmarks.work import Prompts
from runtime import LLM, SamplingParams
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["streams", "schema"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="demo", help="for `schema`")
    asked = parser.parse_args()
    if warning := busy():
        print(warning)
    if asked.what == "streams":
        streams(asked.clients, asked.tokens, asked.repeats)
    else:
        schema(asked.model, asked.rows, asked.tokens, asked.repeats)


if __name__ == "__main__":
    main()
