"""Schemas as people write them: what is accepted, and whether the answers are valid.

The schemas are those of JSONSchemaBench, out of the checkout of github.com/guidance-ai/jsonschemabench whose path is in
EFT_JSONSCHEMABENCH, 30 of each of its ten sets. Without one, as many are generated.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import Phase, given, settings
from llguidance import LLMatcher

from runtime import LLM, SamplingParams
from runtime.errors import InvalidRequest
from runtime.messages import Output, Submission
from runtime.text.grammar import GrammarCompiler
from runtime.text.tokenizer import Tokenizer
from tests.text.grammar.test_schemas import SCHEMAS, text_of
from tests.text.grammar.walks import walk

SETS, SCHEMAS_PER_SET, SHORT_SAMPLE = 10, 30, 20
WALKS = 3
"""Random answers to each schema."""


def published(root: Path) -> list[tuple[str, Any]]:
    """Names and schemas of a sample that is the same for the same checkout."""
    sets = sorted(path for path in (root / "data").iterdir() if path.is_dir())
    assert len(sets) == SETS, sets
    found = []
    for folder in sets:
        files = sorted(folder.glob("*.json"))
        chosen = files[:: max(1, len(files) // SCHEMAS_PER_SET)][:SCHEMAS_PER_SET]
        found += [(f"{folder.name}/{path.name}", json.loads(path.read_bytes())) for path in chosen]
    return found


def generated(count: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []

    @settings(max_examples=count, database=None, phases=[Phase.generate])
    @given(schema=SCHEMAS)
    def collect(schema: Any) -> None:
        found.append((f"generated {len(found)}", schema))

    collect()
    return found[:count]


def sample(count: int) -> list[tuple[str, Any]]:
    root = os.environ.get("EFT_JSONSCHEMABENCH")
    if root is None:
        return generated(count)
    schemas = published(Path(root))
    return schemas[:: len(schemas) // count][:count]


def compiled(compiler: GrammarCompiler, schema: Any) -> str | None:
    """The grammar of a schema, None if it is refused."""
    try:
        text = text_of(compiler, schema)
        compiler.compile(text)
    except InvalidRequest:
        return None
    return text


def invalid(schema: Any, answer: str) -> str | None:
    """The first fault of an answer, formats included."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    fault = next(iter(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(json.loads(answer))), None)
    return None if fault is None else f"{fault.message} in {answer[:200]}"


def check(compiler: GrammarCompiler, tokenizer: Tokenizer, schemas: Sequence[tuple[str, Any]]) -> None:
    accepted = accepted_by_itself = finished = 0
    faults: list[str] = []
    for name, schema in schemas:
        alone = LLMatcher(compiler.backend, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
        accepted_by_itself += not alone.is_error()
        if (text := compiled(compiler, schema)) is None:
            continue
        accepted += 1
        for seed in range(WALKS):
            ids, ended = walk(compiler, tokenizer, text, seed, most=1200)
            finished += ended
            if ended and (fault := invalid(schema, tokenizer.decode(ids))):
                faults.append(f"{name}: {fault}")
    assert not faults
    assert accepted >= accepted_by_itself > len(schemas) // 2
    assert finished > accepted * WALKS * 0.8


def test_answers_under_some_schemas_are_valid(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    check(compiler, tokenizer, sample(SHORT_SAMPLE))


@pytest.mark.slow
def test_answers_under_300_schemas_are_valid(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    check(compiler, tokenizer, sample(SETS * SCHEMAS_PER_SET))


@pytest.mark.slow
def test_a_models_answers_under_300_schemas_are_valid(tiny_model: Path) -> None:
    """All in one engine, which computes masks on a thread and takes forced tokens without a step."""
    llm = LLM(str(tiny_model))
    compiler = llm.engine.grammars
    schemas = {}
    for number, (_, schema) in enumerate(sample(SETS * SCHEMAS_PER_SET)):
        if (text := compiled(compiler, schema)) is not None:
            params = SamplingParams(max_tokens=450, temperature=0.8, seed=number)
            asked = Submission(request_id=str(number), prompt_ids=[5, 77, 131], params=params, grammar=text)
            schemas[asked.id] = schema
            llm.engine.submit(asked)
    answers: dict[int, list[Output]] = {id: [] for id in schemas}
    while llm.engine.busy:
        for output in llm.engine.step():
            answers[output.id].append(output)
    whole = {id: "".join(one.text for one in some) for id, some in answers.items() if some[-1].finish_reason == "stop"}
    assert {some[-1].finish_reason for some in answers.values()} <= {"stop", "length"}
    assert len(whole) > len(answers) // 4
    assert not [fault for id, text in whole.items() if (fault := invalid(schemas[id], text))]
