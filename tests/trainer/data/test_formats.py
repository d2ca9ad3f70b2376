"""Every type of rows, against texts that were written down by hand from the types' documents: what is prompt, what is
trained on."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import BadRows, Example
from runtime.trainer.data.examples import Reader, RowCounts
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.instructions import NO_ANSWER, TEXT_TYPES
from runtime.trainer.recipe import Document, recipe_from

TASK = "Below is an instruction that describes a task"
REQUEST = "esponse that appropriately completes the request."
SHORT = f"{TASK}. Write a r{REQUEST}"
LONG = f"{TASK}, paired with an input that provides further context. Write a r{REQUEST}"
CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and "
    "concisely completes the request.\n\n"
)
CHOOSE = "Choose the answer that best answers the question. "
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
PLAIN = {"instruction": "Add 1 2.", "output": "3"}
CHOICES = {"question": "Which?", "choices": ["newt", "toad"], "solution": "newt"}
SYSTEM = {**PLAIN, "system": "Be brief."}
ORCA = {"system_prompt": "Be brief.", "question": "Which?", "response": "newt"}
CONTEXT = {"context": "Newts swim.", "question": "Who swims?", "answer": "Newts."}

# Type, row, prompt, answer.
GOLDEN: list[tuple[Any, dict[str, Any], str, str]] = [
    ("alpaca", PLAIN, f"{SHORT}\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca", ALPACA, f"{LONG}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"),
    ("alpaca:instruct", PLAIN, f"{SHORT}\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca:chat", PLAIN, f"SYSTEM: {SHORT}\nUSER: Add 1 2.\nASSISTANT:", "3"),
    ("alpaca:chat", ALPACA, f"SYSTEM: {LONG}\nUSER: Add.\n1 2\nASSISTANT:", "3"),
    (
        "alpaca:chatml",
        ALPACA,
        f"<|im_start|>system\n{LONG}<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n",
        "3",
    ),
    ("alpaca:phi", PLAIN, f"<|system|>\n{SHORT}<|end|>\n<|user|>\nAdd 1 2.<|end|>\n<|assistant|>\n", "3"),
    ("alpaca:phi", ALPACA, f"<|system|>\n{LONG}<|end|>\n<|user|>\nAdd.<|end|>1 2<|assistant|>", "3"),
    ("alpaca_instruct", PLAIN, f"{SHORT}\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca_instruct.load_no_prompt", PLAIN, "### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca_chat", PLAIN, f"SYSTEM: {SHORT}\nUSER: Add 1 2.\nASSISTANT:", "3"),
    ("alpaca_chat.load_no_prompt", ALPACA, "USER: Add.\n1 2\nASSISTANT:", "3"),
    ("alpaca_chat.load_concise", PLAIN, f"SYSTEM: {CONCISE}\nUSER: Add 1 2.\nASSISTANT:", "3"),
    (
        "alpaca_chat.load_qa",
        {"question": "Which?", "answer": "newt"},
        f"SYSTEM: {CONCISE}\nUSER: Which?\nASSISTANT:",
        "newt",
    ),
    (
        "alpaca_chat.load_camel_ai",
        {"message_1": "Which?", "message_2": "newt"},
        f"SYSTEM: {CONCISE}\nUSER: Which?\nASSISTANT:",
        "newt",
    ),
    ("alpaca_w_system", SYSTEM, "Be brief.\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca_w_system", {**SYSTEM, "system": None}, "### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca_w_system.load_instruct", SYSTEM, "Be brief.\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("alpaca_w_system.load_chat", SYSTEM, "SYSTEM: Be brief.\nUSER: Add 1 2.\nASSISTANT:", "3"),
    (
        "alpaca_w_system.load_open_orca",
        ORCA,
        "### System:\nBe brief.\n\n### User:\nWhich?\n\n### Response:\n",
        "newt",
    ),
    (
        "alpaca_w_system.load_open_orca_chatml",
        ORCA,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n",
        "newt",
    ),
    (
        "context_qa",
        CONTEXT,
        "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
        "USER: Newts swim.\n===\nWho swims?\nASSISTANT:",
        "Newts.",
    ),
    (
        "context_qa.load_404",
        CONTEXT,
        "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
        "USER: Newts swim.\n===\nWho swims?\nASSISTANT:",
        NO_ANSWER,
    ),
    ("context_qa.load_v2", CONTEXT, "Context:\nNewts swim.\nQuestion:\nWho swims?\n", "Answer:\nNewts."),
    (
        "explainchoice",
        CHOICES,
        f'SYSTEM: {CHOOSE}Explain your reasoning.\n\nUSER: Which?\n- "newt"\n- "toad"\nASSISTANT:',
        "newt",
    ),
    (
        "concisechoice",
        {"question": "Which?", "choices": ["newt"], "explanation": "It swims."},
        f'SYSTEM: {CHOOSE}Be concise in your response.\n\n\nUSER: Which?\n- "newt"\nASSISTANT:',
        "It swims.",
    ),
    (
        "summarizetldr",
        {"article": "Newts swim a lot.", "summary": "They swim."},
        "USER: Summarize the following article as a TL;DR.\nNewts swim a lot.\nASSISTANT:",
        "They swim.",
    ),
    ("gpteacher", {"instruction": "Add 1 2.", "response": "3"},
     f"{SHORT}\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("gpt4all", {"prompt": "Add 1 2.", "response": "3"},
     f"{SHORT}\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("oasst", {"INSTRUCTION": "Add 1 2.", "RESPONSE": "3"},
     f"{SHORT}\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("metharme", {"prompt": "<|user|>Hi<|model|>", "generation": "Hello"}, "<|user|>Hi<|model|>", "Hello"),
    ("orcamini", SYSTEM, "### System:\nBe brief.\n\n### User:\nAdd 1 2.\n\n### Response:\n", "3"),
    ("prompt_completion", {"prompt": "1 2", "completion": " 3"}, "1 2", " 3"),
    ({"format": "[INST] {instruction} {input} [/INST]", "no_input_format": "[INST] {instruction} [/INST]"},
     PLAIN, "[INST] Add 1 2. [/INST]", "3"),
    (
        {
            "field_instruction": "q", "field_input": "c", "field_output": "a", "field_system": "s",
            "system_prompt": "Usual.", "system_format": "<<{system}>>", "format": "{input}? {instruction}: ",
        },
        {"q": "{input}", "c": "Newt", "a": "yes"},
        "<<Usual.>>Newt? {input}: ",
        "yes",
    ),
    ({"field_instruction": "q", "field_output": "a"}, {"q": "Who?", "a": "newt", "system": "S "}, "S Who? ", "newt"),
]  # fmt: skip


class Given:
    """Reads rows that a test writes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.counts = RowCounts()

    def reader(self, **keys: Any) -> Reader:
        basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "rows.jsonl"}]}
        recipe = recipe_from(Document({**basic, **keys}), max_lora_rank=64)
        self.datasets = recipe.datasets
        return Reader(recipe, self.tokenizer, DataFiles(roots=[self.folder]), self.tokenizer.eos_ids)

    def read(self, *rows: dict[str, Any], entry: dict[str, Any] | None = None, **keys: Any) -> list[Example]:
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        reader = self.reader(**keys, datasets=[{"path": "rows.jsonl", **(entry or {})}])
        self.counts = RowCounts()
        found = reader.read("datasets", self.datasets, self.counts)
        self.prompt = reader.datasets[0].format.prompt
        return found

    def trained(self, example: Example) -> str:
        ids = [id for id, on in zip(example.token_ids, example.trained, strict=True) if on]
        return self.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture
def given(tmp_path: Path, tokenizer: Tokenizer) -> Given:
    return Given(tmp_path, tokenizer)


@pytest.mark.parametrize(("kind", "row", "prompt", "answer"), GOLDEN)
def test_prompts_and_answers(given: Given, kind: Any, row: dict[str, Any], prompt: str, answer: str) -> None:
    (example,) = given.read(row, entry={"type": kind}, sequence_len=2048)
    whole = given.tokenizer.encode(prompt + answer)
    assert example.token_ids == [*whole, given.tokenizer.eos_ids[0]]
    assert given.trained(example).endswith(answer.lstrip() + "<|im_end|>")
    assert not any(example.trained[: len(given.tokenizer.encode(prompt)) - 1])


def test_every_type_has_a_golden_row() -> None:
    covered = {kind for kind, *_ in GOLDEN if isinstance(kind, str)}
    assert set(TEXT_TYPES) - covered == {"jeopardy", "reflection"}  # below


def test_jeopardy_and_reflection(given: Given) -> None:
    row = {"question": "It swims.", "category": "Pond", "answer": "a newt"}
    (example,) = given.read(row, entry={"type": "jeopardy"}, sequence_len=2048)
    assert given.trained(example) == "what is a newt<|im_end|>"
    assert "### Instruction:\nIt swims.\n\n### Input:\nPond\n\n" in given.tokenizer.decode(example.token_ids)
    row = {**PLAIN, "reflection": "Hm.", "corrected": "Three."}
    (example,) = given.read(row, entry={"type": "reflection"}, sequence_len=2048)
    assert given.trained(example) == "3\n\n### Agent Reflection:\nHm.\n\n### Final Response:\nThree.<|im_end|>"


@pytest.mark.parametrize(("kind", "row", "prompt", "answer"), [one for one in GOLDEN if "input" not in one[1]])
def test_the_adapter_is_asked_as_its_rows_were_written(
    given: Given, kind: Any, row: dict[str, Any], prompt: str, answer: str
) -> None:
    """`eft chat` fills the text of the card in."""
    given.read(row, entry={"type": kind}, sequence_len=2048)
    asked = TEXT_TYPES[kind].read(row).instruction if isinstance(kind, str) else row.get("q", row.get("instruction"))
    if given.prompt.format == "text":
        assert given.prompt.template == "{prompt}"
        assert asked == prompt
    elif "choices" not in row and "c" not in row:
        assert given.prompt.template is not None
        assert given.prompt.template.replace("{instruction}", str(asked)) == prompt


def test_texts_of_the_system_that_differ_are_not_in_the_card(given: Given) -> None:
    rows = [SYSTEM, {**SYSTEM, "system": "Be long."}]
    given.read(*rows, entry={"type": "alpaca_w_system"})
    assert given.prompt.template == "### Instruction:\n{instruction}\n\n### Response:\n"


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("jeopardy", {"question": "a", "answer": "b"}, "no field 'category'; it has question, answer"),
        ("explainchoice", {"question": "a", "choices": "b"}, "choices is no list of texts"),
        ("explainchoice", {"question": "a", "choices": ["b"]}, "no field 'explanation'"),
        ("oasst", {"INSTRUCTION": "a", "RESPONSE": " "}, r"the answer is empty \(RESPONSE\)"),
        ({"field_output": "a"}, {"instruction": "x"}, "no field 'a'"),
        ("input_output", {"text": "a"}, "segments is no list of texts with labels; it has text"),
        ("input_output", {"segments": [{"text": "a"}]}, "segment 1 must have a text, and a label"),
        ("tokenized", {"input_ids": [1, "a"]}, "input_ids is no list of whole numbers"),
        ("tokenized", {"input_ids": [5, 999_999]}, r"input_ids\[1\] is 999999; the served model has ids from 0 to"),
        ("tokenized", {"input_ids": [5, 6], "labels": [-100, 7]}, r"labels\[1\] is 7, neither -100 nor the token's id"),
        ("tokenized", {"input_ids": [5, 6], "labels": [5]}, "has 2 input_ids, 1 labels"),
    ],
)
def test_rows_that_are_no_such(given: Given, kind: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRows, match=rf"rows.jsonl, row 1: .*{message}"):
        given.read(row, entry={"type": kind})


@pytest.mark.parametrize("kind", ["input_output", "auto"])
def test_segments(given: Given, kind: str) -> None:
    parts = [("<|im_start|>user\nHi<|im_end|>\n", False), ("<|im_start|>", False), ("Hello", True), (" you", False)]
    row = {"segments": [{"text": text, "label": label} for text, label in parts]}
    (example,) = given.read(row, entry={"type": kind})
    ids = [given.tokenizer.encode(text, add_special_tokens=False) for text, _ in parts]
    assert example.token_ids == list(chain(*ids))
    assert example.trained == [on for (_, on), some in zip(parts, ids, strict=True) for _ in some]


@pytest.mark.parametrize("kind", ["tokenized", "auto"])
def test_tokens(given: Given, kind: str) -> None:
    (example,) = given.read({"input_ids": [7, 8, 9, 0], "attention_mask": [1, 1, 1, 0]}, entry={"type": kind})
    assert (example.token_ids, example.trained) == ([7, 8, 9], [False, True, True])
    row = {"input_ids": [7, 8, 9], "labels": [-100, -100, 9]}
    (example,) = given.read(row, entry={"type": kind})
    assert example.trained == [False, False, True]


def test_a_long_text_is_cut_and_nothing_of_it_is_lost(given: Given) -> None:
    text = "the newt is in the pond. " * 20
    examples = given.read({"text": text}, {"text": "the newt"}, entry={"type": "completion"}, sequence_len=32)
    whole = [*given.tokenizer.encode(text), given.tokenizer.eos_ids[0]]
    assert list(chain(*(example.token_ids for example in examples[:-1]))) == whole
    assert [len(example) for example in examples[:-2]] == [32] * (len(examples) - 2)
    assert all(example.trained == [False] + [True] * (len(example) - 1) for example in examples)
    assert given.counts.cut == 1
    assert given.counts.rows == 2
    assert given.counts.too_long == 0


def test_shards_have_every_row_once(given: Given) -> None:
    rows = [{"text": f"newt {number}"} for number in range(11)]
    found = [
        [
            given.tokenizer.decode(example.token_ids)
            for example in given.read(*rows, entry={"type": "completion", "shards": 3, "shards_idx": index})
        ]
        for index in range(3)
    ]
    assert sorted(chain(*found)) == sorted(row["text"] for row in rows)
    assert sorted(map(len, found)) == [3, 4, 4]
    assert found[0] != [row["text"] for row in rows[:3]]  # shuffled before
    with pytest.raises(InvalidRequest, match="no rows in shard 0 of 3"):
        given.read(rows[0], entry={"type": "completion", "shards": 3, "shards_idx": 0, "split": "train[:1]"})


def test_rows_are_shuffled_before_merging(given: Given) -> None:
    rows = [{"text": f"newt {number}"} for number in range(20)]
    plain = given.read(*rows, entry={"type": "completion"})
    mixed = given.read(*rows, entry={"type": "completion"}, shuffle_before_merging_datasets=True)
    again = given.read(*rows, entry={"type": "completion"}, shuffle_before_merging_datasets=True)
    assert mixed == again != plain
    assert sorted(example.token_ids for example in mixed) == sorted(example.token_ids for example in plain)


DETAIL = {"field_messages": "messages", "message_field_training_detail": "detail", "type": "chat_template"}


def test_ranges_of_a_message(given: Given) -> None:
    ranges = [
        {"begin_offset": 0, "end_offset": 5, "train": False},
        {"begin_offset": 6, "end_offset": 13, "train": True},
    ]
    chat = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "Wrong. Answer.", "detail": ranges},
    ]
    (example,) = given.read({"messages": chat}, entry=DETAIL)
    assert given.trained(example) == " Answer.<|im_end|>"
    chat[1]["detail"] = [{"begin_offset": 7, "end_offset": 13, "train": False}]  # the rest is as the message
    (example,) = given.read({"messages": chat}, entry=DETAIL)
    assert given.trained(example) == "Wrong. "
    chat[1]["detail"] = None
    (example,) = given.read({"messages": chat}, entry=DETAIL)
    assert given.trained(example) == "Wrong. Answer.<|im_end|>"


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        ([{"begin_offset": 3, "end_offset": 14, "train": True}], "3 to 14 is not within the 14 characters"),
        ([{"begin_offset": 3, "train": True}], "expected begin_offset and end_offset as whole numbers"),
        (["x"], "an entry that is no object"),
        ("[{", "a text that is not JSON"),
    ],
)
def test_ranges_that_make_no_sense(given: Given, detail: Any, message: str) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Wrong. Answer.", "detail": detail}]
    with pytest.raises(BadRows, match=f"row 1: message 2, detail.*{message}"):
        given.read({"messages": chat}, entry=DETAIL)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thought %}[{{ m.thought }}]{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_is_split_from_the_answer(tmp_path: Path, make_tokenizer: Any) -> None:
    given = Given(tmp_path, make_tokenizer(THINKS))
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}]
    entry = {"type": "chat_template", "split_thinking": True, "template_thinking_key": "thought"}
    (example,) = given.read({"messages": chat}, entry=entry)
    assert given.trained(example) == "[Hm.]Yes.<|im_end|>"
    (example,) = given.read({"messages": chat}, entry={"type": "chat_template"})
    assert given.trained(example) == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
