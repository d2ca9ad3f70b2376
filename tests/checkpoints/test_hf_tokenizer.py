"""Tokenizers of Hugging Face directories, against transformers' AutoTokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.model.config import ModelLoadError

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


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
TOOL = {"content": "<tool>", **FLAGS}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "spelling",
    [
        {"additional_special_tokens": ["<tool>"]},
        {"additional_special_tokens": [TOOL]},
        {"extra_special_tokens": ["<tool>"]},
        {"extra_special_tokens": [TOOL]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"extra_special_tokens": {"tool_token": TOOL}},
        {"model_specific_special_tokens": {"tool_token": "<tool>"}},
        {"extra_special_tokens": [], "additional_special_tokens": ["<tool>"]},
        {"tool_token": "<tool>"},
        {"pad_token": "<tool>"},
        {"added_tokens_decoder": {"512": TOOL | {"special": True}}},
    ],
    ids=str,
)
def test_a_special_token_is_special_in_every_spelling(copy: Path, spelling: dict[str, Any], file: str) -> None:
    """Clients cannot write it, and outputs leave it out; templates print it where it has a name."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 512, **TOOL})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    ordinary = load_tokenizer(copy, {}, {})
    assert 512 in ordinary.encode_chat([{"role": "user", "content": "a <tool> b"}])
    if "pad_token" in spelling and file == "special_tokens_map.json":
        change(copy / "tokenizer_config.json", pad_token="<tool>")
    change(copy / file, **spelling)
    ours = load_tokenizer(copy, {}, {})
    assert 512 not in ours.encode_chat([{"role": "user", "content": "a <tool> b"}])
    assert ours.encode("a <tool> b").count(512) == 1
    assert "<tool>" not in ours.decode([70, 512, 71])
    if "tool_token" in str(spelling):
        change(copy / "tokenizer_config.json", chat_template="{{ tool_token }}{{ messages[0].content }}")
        assert load_tokenizer(copy, {}, {}).render_chat([{"role": "user", "content": ""}]) == "<tool>"


def test_a_token_that_becomes_special_keeps_its_whitespace_rules(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 512, **TOOL, "lstrip": True})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    before = load_tokenizer(copy, {}, {}).encode("a   <tool> b")
    change(copy / "tokenizer_config.json", extra_special_tokens=["<tool>"])
    assert load_tokenizer(copy, {}, {}).encode("a   <tool> b") == before


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("tokenizer_config.json", "eos_token", 5, r"eos_token must be a token's text.*, got 5"),
        (
            "tokenizer_config.json",
            "extra_special_tokens",
            "<tool>",
            'extra_special_tokens must be a list.*, got "<tool>"',
        ),
        (
            "tokenizer_config.json",
            "additional_special_tokens",
            [1],
            r"additional_special_tokens\[0\] must be .*, got 1",
        ),
        ("tokenizer_config.json", "chat_template", 3, "chat_template must be a text.*, got 3"),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            {"x": 1},
            "added_tokens_decoder must be an object",
        ),
        ("tokenizer_config.json", "added_tokens_decoder", {"1" * 5000: "x"}, "added_tokens_decoder must be an object"),
        ("tokenizer_config.json", "image_token", "\ud800", r"image_token must be a token's text.*, got"),
        ("tokenizer_config.json", "extra_special_tokens", ["\ud800"], r"extra_special_tokens\[0\] must be"),
        ("tokenizer_config.json", "chat_template", "\udfff", "chat_template must be a text"),
        ("special_tokens_map.json", "unk_token", {"content": "\ud800"}, "unk_token must be a token's text"),
    ],
)
def test_wrong_values_are_named(copy: Path, file: str, key: str, value: Any, message: str) -> None:
    change(copy / file, **{key: value})
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(copy, {}, {})


@pytest.mark.parametrize("value", ["2", [2, "x"], True, 2.5, [-1], {"a": 1}, -2])
@pytest.mark.parametrize("generation", [True, False])
def test_ends_that_are_no_ids_are_refused(tiny_model: Path, value: Any, generation: bool) -> None:
    configs: list[dict[str, Any]] = [{}, {"eos_token_id": value}]
    file = "generation_config.json" if generation else "config.json"
    with pytest.raises(ModelLoadError, match=rf"{file}: eos_token_id must be a token id, a list of them"):
        load_tokenizer(tiny_model, *(configs if generation else configs[::-1]))


def test_the_last_of_several_templates_with_the_name_default_counts(copy: Path) -> None:
    named = [{"name": ["odd"], "template": 1}, *({"name": "default", "template": text} for text in "ab"), {"x": 1}]
    change(copy / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(copy, {}, {}).chat_template == "b"


def test_a_bos_that_the_configuration_asks_for_in_vain_is_said(copy: Path) -> None:
    change(copy / "tokenizer_config.json", add_bos_token=True)
    assert any("add_bos_token" in problem for problem in load_tokenizer(copy, {}, {}).turn_end.problems)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, (2,)),
        ({"eos_token_id": 7}, {}, (7, 2)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 2]}, (9, 2, 7)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": -1}, {"eos_token_id": []}, (2,)),
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
