"""What is measured. Each scenario returns its measurements; the first one is what the others are compared to.

The peers take turns within every repeat, each alone on the machine, on the same prompts; every peer has
done the same kind of work once before it is timed.
"""

from collections.abc import Callable

from msgspec import Struct

from benchmarks.inprocess import Eft, HuggingFace, OneByOne, load, served
from benchmarks.work import Job, Measurement, Outcome, Peer, Prompts


class Setup(Struct, frozen=True, kw_only=True):
    """The peers, and how much to measure."""

    model: str
    hf: HuggingFace
    eft: Eft
    prompts: Prompts
    at_once: int
    repeats: int
    peer_sample: int
    """So many requests stand for all where Hugging Face does one at a time: its rate is the same for more."""
    http: bool
    overrides: dict[str, str]


def single(setup: Setup) -> list[Measurement]:
    """64 tokens in, 128 out, one request at a time."""
    peers: list[tuple[str, Peer]] = [("generate", setup.hf), ("Eft", OneByOne(setup.eft))]
    results = [Measurement(peer=name, unit="output tok/s") for name, _ in peers]
    for _, peer in peers:
        peer.run(setup.prompts.job(1, 64, 8))
    for _ in range(setup.repeats):
        job = setup.prompts.job(min(4, setup.peer_sample), 64, 128)
        for (_, peer), result in zip(peers, results, strict=True):
            result.values.append(peer.run(job).output_rate)
    return results


def batch(setup: Setup) -> list[Measurement]:
    """64 requests of 120 tokens in and 128 out."""
    size, sample = setup.at_once, setup.peer_sample
    static = setup.hf.batches_of(size)
    results = [
        Measurement(peer="generate, one at a time", unit="output tok/s", note=f"on {sample} of 64 requests"),
        Measurement(peer=f"generate, batches of {size}", unit="output tok/s"),
        Measurement(peer=f"Eft, {size} at once", unit="output tok/s"),
    ]
    setup.hf.run(setup.prompts.job(1, 120, 8))
    for peer in (static, setup.eft):
        peer.run(setup.prompts.job(size, 120, 8))
    equal = total = 0
    for _ in range(setup.repeats):
        job = setup.prompts.job(64, 120, 128)
        alone = setup.hf.run(Job(job.prompts[:sample], job.output_len))
        together = setup.eft.run(job)
        for result, outcome in zip(results, (alone, static.run(job), together), strict=True):
            result.values.append(outcome.output_rate)
        equal += equal_tokens(alone, together)
        total += sum(map(len, alone.tokens))
    results[2].note = f"{equal / total:.1%} of the tokens as generate's"
    return [*results, *(_batch_over_http(setup) if setup.http else [])]


def _batch_over_http(setup: Setup) -> list[Measurement]:
    result = Measurement(peer=f"Eft over HTTP, {setup.at_once} at once", unit="output tok/s")
    with served(setup.model, at_once=setup.at_once, overrides=setup.overrides) as url:
        lengths = {"input_len": 120, "at_once": setup.at_once}
        load(url, requests=setup.at_once, output_len=8, seed=1000, **lengths)
        for seed in range(setup.repeats):
            report = load(url, requests=64, output_len=128, seed=seed, **lengths)
            result.values.append(report.output_tokens_per_s)
    return [result]


def prefix(setup: Setup) -> list[Measurement]:
    """Time to first token of 1,016 tokens, of which the first 1,000 are new, or were asked before."""
    results = [
        Measurement(peer="Eft, new prefix", unit="s to first token"),
        Measurement(peer="Eft, known prefix", unit="s to first token"),
        Measurement(peer="generate", unit="s to first token"),
    ]
    for peer in (setup.eft, setup.hf):
        peer.run(setup.prompts.job(1, 1016, 1))
    for _ in range(setup.repeats):
        shared = setup.prompts.ids(1000)
        jobs = [Job([shared + setup.prompts.ids(16)], 1) for _ in range(2)]
        outcomes = [setup.eft.run(jobs[0]), setup.eft.run(jobs[1]), setup.hf.run(jobs[0])]
        for result, outcome in zip(results, outcomes, strict=True):
            result.values.append(outcome.seconds)
    return results


def prefill(setup: Setup) -> list[Measurement]:
    """1,000 new tokens in, one out."""
    peers: list[tuple[str, Peer]] = [("generate", setup.hf), ("Eft", setup.eft)]
    results = [Measurement(peer=name, unit="prompt tok/s") for name, _ in peers]
    for _, peer in peers:
        peer.run(setup.prompts.job(1, 1000, 1))
    for _ in range(setup.repeats):
        job = setup.prompts.job(1, 1000, 1)
        for (_, peer), result in zip(peers, results, strict=True):
            result.values.append(1000 / peer.run(job).seconds)
    return results


def equal_tokens(one: Outcome, other: Outcome) -> int:
    """Tokens that are the same at the same place, over the prompts that both were given."""
    pairs = zip(one.tokens, other.tokens, strict=False)
    return sum(a == b for left, right in pairs for a, b in zip(left, right, strict=True))


SCENARIOS: dict[str, Callable[[Setup], list[Measurement]]] = {
    "single": single,
    "batch": batch,
    "prefix": prefix,
    "prefill": prefill,
}
