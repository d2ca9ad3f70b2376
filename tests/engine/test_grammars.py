"""Outputs that are held to grammars, over a tiny real model: valid, and the same whatever the engine does.

The oracle of all ways to run is the engine that plans ahead, which takes every token in a step of its own.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from runtime import LLM, SamplingParams
from runtime.engine.delivery import OutputStream
from runtime.errors import GrammarTooComplex, InvalidRequest
from runtime.messages import GRAMMAR_TOO_COMPLEX, ROW_FAILED, Output, Submission
from runtime.support import failpoints
from runtime.text.grammar import GrammarBuilder, Part, choice_part, json_part, regex_part
from tests.adapter_files import make_adapter

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "legs": {"type": "integer", "minimum": 0, "maximum": 100},
        "lives in": {"enum": ["water", "on land", "both in water and on land"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "legs", "lives in", "tags"],
    "additionalProperties": False,
}
PROMPT = [5, 77, 131, 9, 42, 200, 17]
KEY = "one@1:a"


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    yield
    failpoints.configure("")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "one", seed=1)


def make(tiny_model: Path, adapter: Path, **settings: Any) -> LLM:
    llm = LLM(str(tiny_model), **settings)
    llm.engine.prepare_adapter(KEY, str(adapter))
    llm.engine.load_adapter(KEY)
    return llm


@pytest.fixture(scope="module")
def oracle(tiny_model: Path, adapter: Path) -> LLM:
    return make(tiny_model, adapter, asynchronous="on")


def source(llm: LLM, part: Part) -> str:
    builder = GrammarBuilder(llm.engine.grammars.special_id)
    text = builder.build(builder.part("body", part))
    llm.engine.grammars.compile(text)
    return text


def submission(prompt: Sequence[int], grammar: str, **fields: Any) -> Submission:
    params = SamplingParams(**{"max_tokens": 150, **fields.pop("params", {})})
    return Submission(request_id="r", prompt_ids=list(prompt), params=params, grammar=grammar, **fields)


def run(llm: LLM, submissions: Sequence[Submission]) -> list[list[Output]]:
    """The outputs of each submission."""
    found: dict[int, list[Output]] = {one.id: [] for one in submissions}
    llm.engine.submit_all(submissions)
    while llm.engine.busy:
        for output in llm.engine.step():
            found[output.id].append(output)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks
    return [found[one.id] for one in submissions]


def tokens(outputs: list[Output]) -> list[int]:
    return [id for output in outputs for id in output.token_ids]


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def traffic(llm: LLM) -> list[Submission]:
    """Rows with and without grammars, greedy and not, of the base and an adapter, forks among them."""
    schema, letters = source(llm, json_part(SCHEMA, "schema")), source(llm, regex_part("[a-z ]{3,60}\\.", "regex"))
    choice = source(llm, choice_part(["The newt", "The eft, of course"], "choice"))
    found = []
    for number in range(12):
        grammar = [schema, "", letters, choice][number % 4]
        prompt = [5 + number, *PROMPT, *range(20, 20 + 3 * number)]
        params: dict[str, Any] = {"seed": number, "temperature": [0.0, 1.0, 2.0][number % 3]}
        if not grammar:
            params |= {"max_tokens": 40, "ignore_eos": True}
        found.append(submission(prompt, grammar, params=params, adapter=KEY if number % 5 == 0 else ""))
        if number % 4 == 0:
            again = {"params": params | {"seed": 99}, "adapter": found[-1].adapter, "fork_of": found[-1].id}
            found.append(submission(prompt, grammar, **again))
    return found


WAYS: dict[str, dict[str, Any]] = {
    "synchronous": {"asynchronous": "off"},
    "speculation": {"asynchronous": "off", "speculative_tokens": 4, "speculative_min_acceptance": 0.0},
    "a small pool": {"asynchronous": "off", "num_blocks": 20, "max_model_len": 256, "max_running": 6},
    "a small pool ahead": {"asynchronous": "on", "num_blocks": 20, "max_model_len": 256, "max_running": 6},
    "swapping": {
        "asynchronous": "off", "num_blocks": 20, "max_model_len": 256, "max_running": 6, "preemption_mode": "swap",
    },
    "chunks": {"asynchronous": "off", "max_batched_tokens": 7, "max_running": 4},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_gives_the_same_valid_outputs(oracle: LLM, tiny_model: Path, adapter: Path, way: str) -> None:
    llm = make(tiny_model, adapter, **WAYS[way])
    expected, found = run(oracle, traffic(oracle)), run(llm, asked := traffic(llm))
    for want, got in zip(expected, found, strict=True):
        assert tokens(got) == tokens(want)
        assert text(got) == text(want)
        assert got[-1].finish_reason == want[-1].finish_reason
        assert got[-1].generated_tokens == len(tokens(got))
    finished = [
        json.loads(text(got))
        for one, got in zip(asked, found, strict=True)
        if "json_schema" in one.grammar and got[-1].finish_reason == "stop"
    ]
    assert finished
    for value in finished:
        jsonschema.validate(value, SCHEMA)


def test_forced_tokens_take_no_step(oracle: LLM, tiny_model: Path, adapter: Path) -> None:
    llm = make(tiny_model, adapter, asynchronous="off")
    sentence = "The newt is a small amphibian that lives both in water and on land."
    (outputs,) = run(llm, [submission(PROMPT, source(llm, choice_part([sentence], "choice")))])
    assert text(outputs) == sentence
    assert outputs[-1].finish_reason == "stop"
    assert len(tokens(outputs)) > 10
    assert len(outputs) <= 2
    assert tokens(run(oracle, [submission(PROMPT, source(oracle, choice_part([sentence], "choice")))])[0]) == tokens(
        outputs
    )


def test_scored_sequences_are_sampled_token_by_token(tiny_model: Path, adapter: Path) -> None:
    llm = make(tiny_model, adapter, asynchronous="off")
    grammar = source(llm, choice_part(["The newt", "The eft"], "choice"))
    (outputs,) = run(llm, [submission(PROMPT, grammar, scored=True)])
    assert all(len(output.token_ids) == 1 for output in outputs)
    assert outputs[-1].cumulative_logprob < 0


@pytest.mark.parametrize("mode", ["off", "on"])
def test_max_tokens_cuts_what_is_forced(tiny_model: Path, adapter: Path, mode: str) -> None:
    llm = make(tiny_model, adapter, asynchronous=mode)
    grammar = source(llm, choice_part(["The newt is a small amphibian"], "choice"))
    (outputs,) = run(llm, [submission(PROMPT, grammar, params={"max_tokens": 3})])
    assert outputs[-1].finish_reason == "length"
    assert len(tokens(outputs)) == outputs[-1].generated_tokens == 3


@pytest.mark.parametrize("mode", ["off", "on"])
def test_stop_strings_end_inside_of_what_is_forced(tiny_model: Path, adapter: Path, mode: str) -> None:
    llm = make(tiny_model, adapter, asynchronous=mode)
    grammar = source(llm, choice_part(["The newt is a small amphibian"], "choice"))
    (outputs,) = run(llm, [submission(PROMPT, grammar, params={"stop": ("small",)})])
    assert (text(outputs), outputs[-1].finish_reason, outputs[-1].stop_reason) == ("The newt is a ", "stop", "small")


@pytest.mark.parametrize("mode", ["off", "on"])
def test_min_tokens_holds_as_long_as_the_grammar_goes_on(tiny_model: Path, adapter: Path, mode: str) -> None:
    llm = make(tiny_model, adapter, asynchronous=mode)
    letters = source(llm, regex_part("[a-z]*", "regex"))
    word = source(llm, choice_part(["newt"], "choice"))
    long, short = run(
        llm,
        [
            submission(PROMPT, letters, params={"min_tokens": 30, "max_tokens": 60, "temperature": 2.0, "seed": 1}),
            submission(PROMPT, word, params={"min_tokens": 30, "max_tokens": 60}),
        ],
    )
    assert len(tokens(long)) >= 30
    assert (text(short), short[-1].finish_reason) == ("newt", "stop")


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_state_that_fails_ends_its_request_alone(tiny_model: Path, adapter: Path, mode: str) -> None:
    llm = make(tiny_model, adapter, asynchronous=mode)
    asked = [submission(PROMPT, source(llm, regex_part("[a-z]{40}", "regex")), params={"seed": n}) for n in range(3)]
    before = [text(outputs) for outputs in run(llm, asked)]
    asked = [submission(PROMPT, one.grammar, params={"seed": n}) for n, one in enumerate(asked)]
    failpoints.configure("worker.grammar=raise:30")
    after = run(llm, asked)
    ends = [outputs[-1].finish_reason for outputs in after]
    assert sorted(ends, key=str) == ["error", "stop", "stop"]
    for outputs, expected in zip(after, before, strict=True):
        if outputs[-1].finish_reason == "error":
            assert outputs[-1].error == ROW_FAILED
        else:
            assert text(outputs) == expected


def test_a_grammar_that_is_too_complex_is_the_requests_fault(tiny_model: Path, adapter: Path) -> None:
    """It compiles, and its first tokens are found; then the states become too many."""
    llm = make(tiny_model, adapter)
    heavy = source(llm, regex_part("a?" * 3000 + "a" * 3000, "regex"))
    (outputs,) = run(llm, [submission(PROMPT, heavy)])
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error == GRAMMAR_TOO_COMPLEX
    stream = OutputStream(outputs[-1].id, lambda _: None)
    stream.put(outputs[-1])
    with pytest.raises(GrammarTooComplex, match="too complex"):
        asyncio.run(anext(stream))  # type: ignore[arg-type]
    assert issubclass(GrammarTooComplex, InvalidRequest)
