"""Tokenizers of Hugging Face directories, against transformers' AutoTokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.hf_tokenizer import load_tokenizer

TEXT = "The newt<|im_end|> of 1234 – ünï 😀 <think>x</think>\n"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "copy")


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def test_ids_are_those_of_transformers(tiny_model: Path) -> None:
    ours, theirs = load_tokenizer(tiny_model, {}, {}), AutoTokenizer.from_pretrained(tiny_model)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ours.encode(TEXT), skip_special_tokens=False) == TEXT


def test_a_bos_of_the_post_processor(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours, theirs = load_tokenizer(copy, {}, {}), AutoTokenizer.from_pretrained(copy)
    assert ours.encode("newt") == theirs.encode("newt")
    assert ours.encode("newt")[0] == 1
    assert ours.encode("newt", add_special_tokens=False) == theirs.encode("newt", add_special_tokens=False)


def test_tokenizer_json_alone_says_whether_there_is_a_bos(copy: Path) -> None:
    change(copy / "tokenizer_config.json", add_bos_token=True)
    ours, theirs = load_tokenizer(copy, {}, {}), AutoTokenizer.from_pretrained(copy)
    assert ours.encode("newt") == theirs.encode("newt")


def test_tokens_that_only_the_config_lists(copy: Path) -> None:
    token = {"content": "<think>", "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    change(copy / "tokenizer_config.json", added_tokens_decoder={"512": token})
    ours, theirs = load_tokenizer(copy, {}, {}), AutoTokenizer.from_pretrained(copy)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert 512 in ours.encode(TEXT)
    assert ours.vocab_size == 513


def test_tokens_with_ids_that_do_not_fit(copy: Path) -> None:
    change(copy / "tokenizer_config.json", added_tokens_decoder={"600": {"content": "<think>"}})
    with pytest.raises(ModelLoadError, match=r"gives '<think>' the id 600.*next free id.*512"):
        load_tokenizer(copy, {}, {})


def test_a_token_with_a_role_is_special(copy: Path) -> None:
    """tokenizer.json may list the end of a turn as an ordinary token; transformers makes it special."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = False
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours, theirs = load_tokenizer(copy, {}, {}), AutoTokenizer.from_pretrained(copy)
    assert ours.decode([2, 50]) == theirs.decode([2, 50], skip_special_tokens=True)
    assert "<|im_end|>" not in ours.decode([2, 50])


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, (2,)),
        ({"eos_token_id": 7}, {}, (7, 2)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 2]}, (9, 2, 7)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (2,)),
    ],
)
def test_every_configured_end_counts(
    tiny_model: Path, config: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert load_tokenizer(tiny_model, config, generation).eos_ids == expected


def test_the_end_of_a_turn_that_the_template_writes_counts(copy: Path) -> None:
    change(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert load_tokenizer(copy, {}, {}).eos_ids == (0, 2)
    change(copy / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert load_tokenizer(copy, {}, {}).eos_ids == (0,)


def test_where_the_template_comes_from(copy: Path) -> None:
    own = json.loads((copy / "tokenizer_config.json").read_text())["chat_template"]
    assert load_tokenizer(copy, {}, {}).chat_template == own
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    change(copy / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(copy, {}, {}).chat_template == "d"
    (copy / "chat_template.jinja").write_text("file")
    assert load_tokenizer(copy, {}, {}).chat_template == "file"
    assert load_tokenizer(copy, {}, {}, chat_template="given").chat_template == "given"


def test_template_tokens_have_their_names(copy: Path) -> None:
    change(copy / "tokenizer_config.json", chat_template="{{ bos_token }}|{{ eos_token }}|{{ pad_token }}")
    rendered = load_tokenizer(copy, {}, {}).render_chat([{"role": "user", "content": ""}])
    assert rendered == "<|im_start|>|<|im_end|>|<|endoftext|>"


def test_older_files_are_converted_by_transformers(copy: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 has them. The ids must be those of the same vocabulary."""
    whole = load_tokenizer(copy, {}, {})
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in tokenizer["model"]["merges"])
    (copy / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (copy / "tokenizer.json").unlink()
    change(copy / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<|endoftext|>")
    assert load_tokenizer(copy, {}, {}).encode(TEXT) == whole.encode(TEXT)
