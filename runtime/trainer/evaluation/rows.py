"""Rows that answers are generated for: the tokens before the last answer of an example, and that answer.

Cut from tokenised examples, so every format and template of training has them, and a prompt is, token by token, what
the model was trained to answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.recipe import Recipe

LEAST_PROMPT = 2
"""Tokens; texts that are trained on as a whole have a shorter one, to which there is no answer."""


class GenerationRow(NamedTuple):
    """A prompt and the answer that it should get, in tokens."""

    prompt_ids: list[int]
    reference_ids: list[int]


def generation_rows(
    recipe: Recipe, examples: Sequence[Example], tokenizer: Tokenizer, *, max_len: int
) -> list[GenerationRow]:
    """Rows for the first `num_generated` examples that have a prompt; of preferences, the answers to prefer. A prompt
    leaves room for a token in `max_len`. Raises `InvalidRequest` where no example has one."""
    found: list[GenerationRow] = []
    for example in examples[:: recipe.group_size]:
        if len(found) == recipe.num_generated:
            break
        row = _row(example, tokenizer) if example.weight > 0 else None
        if row is not None and len(row.prompt_ids) < max_len:
            found.append(row)
    if not found and examples and recipe.num_generated:
        raise InvalidRequest(
            "No row of the evaluation has a prompt and an answer: texts that are trained on as a whole cannot be "
            "asked. Leave do_causal_lm_eval and eval_table_size out, or give generation_datasets with questions and "
            "answers.",
            param="generation_datasets" if recipe.generation_datasets else "do_causal_lm_eval",
            code="invalid_data",
        )
    return found


def _row(example: Example, tokenizer: Tokenizer) -> GenerationRow | None:
    """The last stretch of targets with text, and what comes before it."""
    targets = [at for at, on in enumerate(example.trained) if on][example.prompt_targets :]
    while targets:
        end = targets[-1] + 1
        start = end - 1
        while len(targets) > 1 and targets[-2] == start - 1:
            targets.pop()
            start -= 1
        targets.pop()
        ids = example.token_ids[start:end]
        if tokenizer.decode(ids).strip():
            return GenerationRow(example.token_ids[:start], ids) if start >= LEAST_PROMPT else None
    return None
