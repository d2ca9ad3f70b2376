"""From recipe and files to a plan."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from runtime.adapters.card import Prompt
from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.errors import Forbidden, InvalidRequest, ModelNotFound
from runtime.text.templates import builtin_template
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import BadRows
from runtime.trainer.data.examples import Reader
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.prepared import KeptData, PreparedCache
from runtime.trainer.plan.plan import Plan, PlanSummary, eval_microbatches, feed, prepare, summarize
from runtime.trainer.plan.served_model import ModelShape
from runtime.trainer.recipe import Document, load_recipe, recipe_from

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=512,
    linears={"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "mlp.down_proj": (128, 64)},
)
EXAMPLES = Path(__file__).parents[3] / "settings" / "recipes"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, {}, {})


class Planner:
    """Writes rows to files and makes plans of them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer

    def write(self, name: str, rows: list[Any]) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / name).write_text("".join(line + "\n" for line in lines))

    def plan(
        self,
        *,
        max_len: int = 512,
        files: DataFiles | None = None,
        kept: KeptData | None = None,
        riding_bytes: int = 0,
        devices: int = 0,
        **keys: Any,
    ) -> Plan:
        basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "rows.jsonl"}]}
        recipe = recipe_from(Document({**basic, **keys}), max_lora_rank=64)
        files = files or DataFiles(roots=[self.folder])
        return prepare(
            recipe,
            self.tokenizer,
            files,
            model_names=("tiny",),
            max_len=max_len,
            shape=SHAPE,
            kept=kept,
            devices=devices,
            riding_bytes=riding_bytes,
        )


@pytest.fixture
def planner(tmp_path: Path, tokenizer: Tokenizer) -> Planner:
    planner = Planner(tmp_path, tokenizer)
    planner.write("rows.jsonl", [chat(f"question {number}", "yes " * (number + 1)) for number in range(10)])
    return planner


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_a_plan(planner: Planner) -> None:
    plan = planner.plan(micro_batch_size=2, gradient_accumulation_steps=2, num_epochs=3, lora_r=4)
    assert plan.train_stats.counts.rows == plan.train_stats.examples == 10
    assert plan.train_stats.tokens == sum(map(len, plan.train))
    assert plan.train_stats.trained_tokens == sum(example.num_trained for example in plan.train)
    assert (plan.schedule.microbatches_per_epoch, plan.schedule.steps_per_epoch, plan.schedule.total_steps) == (5, 3, 9)
    assert plan.test == []
    assert plan.schedule.eval_every is None
    # A is [rank, in] and B is [out, rank], in two layers.
    assert plan.estimate.parameters == 2 * 4 * ((64 + 64) + (64 + 32) + (128 + 64))
    patterns = planner.plan(lora_r=4, lora_rank_pattern={"q_proj": 2, r"layers\.1\..*": 8})
    assert patterns.estimate.parameters == (2 + 2) * (64 + 64) + (4 + 8) * ((64 + 32) + (128 + 64))
    for epoch in range(3):
        batches = feed(plan).epoch(epoch)
        assert len(batches) == 5
        assert all(len(batch) == 2 for batch in batches)
        assert sorted(id(example) for batch in batches for example in batch) == sorted(map(id, plan.train))
        assert batches == feed(plan).epoch(epoch)


def test_previews_are_the_text_with_what_is_trained_on(planner: Planner) -> None:
    plan = planner.plan()
    assert len(plan.previews) == 3
    assert [(piece.text, piece.trained) for piece in plan.previews[1]] == [
        ("<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes yes <|im_end|>", True),
        ("\n", False),
    ]


def test_examples_are_listed_with_their_sizes(planner: Planner) -> None:
    plan = planner.plan()
    assert len(plan.listed) == min(100, len(plan.train))
    assert [(one.tokens, one.trained_tokens) for one in plan.listed] == [
        (len(example), example.num_trained) for example in plan.train[:100]
    ]
    assert (plan.listed[1].asks, plan.listed[1].learns) == ("1", "yes yes")  # all ask "question …"


def test_packing(planner: Planner) -> None:
    plan = planner.plan(sample_packing=True, sequence_len=128, micro_batch_size=2)
    assert plan.schedule.microbatches_per_epoch == -(-len(plan.bins) // 2)
    assert len(plan.bins) < 10
    for epoch in range(3):
        batches = feed(plan).epoch(epoch)
        assert len(batches) == plan.schedule.microbatches_per_epoch
        assert all(sum(map(len, batch)) <= 2 * 128 for batch in batches)
        assert sorted(map(id, (example for batch in batches for example in batch))) == sorted(map(id, plan.train))


def test_held_out_rows(planner: Planner) -> None:
    plan = planner.plan(val_set_size=0.2, eval_batch_size=3)
    again, other = planner.plan(val_set_size=2), planner.plan(val_set_size=2, seed=7)
    assert (len(plan.train), len(plan.test)) == (8, 2)
    assert (plan.train, plan.test) == (again.train, again.test)
    assert plan.test != other.test
    assert not [example for example in plan.test if example in plan.train]
    assert eval_microbatches(plan) == [plan.test]
    assert plan.schedule.eval_every == plan.schedule.steps_per_epoch
    with pytest.raises(InvalidRequest, match="holds out 10 of 10") as caught:
        planner.plan(val_set_size=10)
    assert caught.value.param == "val_set_size"


def test_files_for_evaluation(planner: Planner) -> None:
    planner.write("test.jsonl", [chat("a", "b"), chat("c", "d"), chat("e", "f")])
    plan = planner.plan(test_datasets=[{"path": "test.jsonl", "type": "chat_template"}], micro_batch_size=2)
    assert (len(plan.train), len(plan.test)) == (10, 3)
    assert [len(batch) for batch in eval_microbatches(plan)] == [2, 1]


def test_duplicates(planner: Planner) -> None:
    planner.write("rows.jsonl", [chat("a", "b"), chat("c", "d"), chat("a", "b")])
    planner.write("test.jsonl", [chat("a", "b"), chat("e", "f")])
    tests = {"test_datasets": [{"path": "test.jsonl"}]}
    plan = planner.plan(dataset_exact_deduplication=True, **tests)
    assert (len(plan.train), len(plan.test)) == (2, 1)
    assert (plan.train_stats.counts.duplicates, plan.test_stats.counts.duplicates) == (1, 1)
    assert len(planner.plan(**tests).train) == 3


def test_rows_that_are_too_long(planner: Planner) -> None:
    lengths = [len(example) for example in planner.plan().train]
    limit = sorted(lengths)[4]
    dropped = planner.plan(sequence_len=limit)
    assert len(dropped.train) == 5
    assert dropped.train_stats.counts.too_long == 5
    rows = ", ".join(f"{row} ({lengths[row - 1]} tokens)" for row in range(6, 11))
    assert dropped.notes == [f"5 rows are longer than sequence_len ({limit}) and left out: rows.jsonl rows {rows}."]
    cut = planner.plan(sequence_len=limit, excess_length_strategy="truncate")
    assert [len(example) for example in cut.train] == [min(length, limit) for length in lengths]
    assert cut.train_stats.counts.truncated == 5
    with pytest.raises(BadRows, match=rf"rows.jsonl, row 6: has {lengths[5]} tokens, more than sequence_len"):
        planner.plan(sequence_len=limit, excess_length_strategy="raise")
    with pytest.raises(InvalidRequest, match="None of 10 rows is left: 10 have more than sequence_len"):
        planner.plan(sequence_len=2)


def test_rows_that_are_too_short_or_untrained(planner: Planner) -> None:
    question = {"messages": [{"role": "user", "content": "a"}]}
    planner.write("rows.jsonl", [chat("a", "b"), question, chat("a", "b " * 50)])
    plan = planner.plan(min_sample_len=30)
    assert (len(plan.train), plan.train_stats.counts.too_short) == (1, 2)
    plan = planner.plan()
    assert (len(plan.train), plan.train_stats.counts.untrained) == (2, 1)
    (note,) = plan.notes
    assert note.startswith("1 rows have no token to train on")
    assert "rows.jsonl row 2 (" in note


def test_bad_rows_are_listed_with_their_numbers(planner: Planner) -> None:
    planner.write("rows.jsonl", [chat("a", "b"), "nonsense", chat("a", "b"), {"messages": []}, "[1]"])
    with pytest.raises(BadRows) as caught:
        planner.plan(datasets=[{"path": "rows.jsonl", "type": "chat_template"}])
    assert caught.value.status == 400
    assert caught.value.param == "datasets[0]"
    for part in ("rows.jsonl, row 2: is not JSON", "row 4: messages is empty", "row 5: is not an object"):
        assert part in caught.value.message
    planner.write("rows.jsonl", ["nonsense"] * 1000)
    with pytest.raises(BadRows) as caught:
        planner.plan()
    assert caught.value.message.count("\n") == 10
    assert "row 11:" not in caught.value.message


def test_rows_of_all_files_are_listed_by_number(planner: Planner) -> None:
    long = chat("a", "b " * 300)
    planner.write("a.jsonl", [chat("a", "b"), long, long])
    planner.write("b.jsonl", [*[long] * 30, chat("c", "d")])
    planner.write("t.jsonl", [long, chat("e", "f")])
    plan = planner.plan(
        datasets=[{"path": "a.jsonl"}, {"path": "b.jsonl"}], test_datasets=[{"path": "t.jsonl"}], sequence_len=64
    )
    training, test = plan.notes
    assert re.sub(r" \(\d+ tokens\)", "", training) == (
        "32 rows are longer than sequence_len (64) and left out: a.jsonl rows 2, 3; b.jsonl rows 1, 2, 3, 4, 5, 6, 7, "
        "8 and 22 more."
    )
    assert test.startswith("1 rows of test_datasets are longer than sequence_len (64) and left out: t.jsonl row 1 (")
    cut = planner.plan(datasets=[{"path": "a.jsonl"}], sequence_len=64, excess_length_strategy="truncate")
    assert cut.notes[0].startswith("2 rows are longer than sequence_len (64) and cut, their ends with it: a.jsonl rows")


EMPTY = [
    ("chat_template", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}),
    ("chat_template.alpaca", {"instruction": "a", "output": ""}),
    ("alpaca", {"instruction": "a", "output": ""}),
    ("prompt_completion", {"prompt": "a", "completion": ""}),
    ("completion", {"text": ""}),
]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("kind", "row"), EMPTY)
def test_an_empty_answer_is_a_row_error_in_every_format(
    planner: Planner, kind: str, row: dict[str, Any], everything: bool
) -> None:
    good = json.loads(json.dumps(row).replace('""', '"b"'))
    planner.write("rows.jsonl", [good, row])
    with pytest.raises(BadRows, match=r"rows\.jsonl, row 2: .*is empty"):
        planner.plan(datasets=[{"path": "rows.jsonl", "type": kind}], train_on_inputs=everything)


def test_what_nothing_reads_is_noted(planner: Planner) -> None:
    row = {"id": 1, "source": None, **chat("a", "b")}
    row["messages"][1] |= {"train": False, "lang": "en"}
    planner.write("rows.jsonl", [row, {**row, "z": 1}])
    assert planner.plan().notes == [
        "datasets[0]: nothing reads the columns id, z.",
        "datasets[0]: nothing reads the messages' fields lang, train (if train says what is trained on, set "
        "message_field_training: train).",
    ]
    files = DataFiles({"a/rows.jsonl": planner.folder / "rows.jsonl", "b.jsonl": planner.folder / "b"})
    assert "The recipe names no such file, so what was sent is not used: b.jsonl." in planner.plan(files=files).notes


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        (
            {"warmup_steps": 100, "max_steps": 5},
            "All 5 steps are warmup (warmup_steps is 100): the learning rate rises",
        ),
        ({"warmup_steps": 1, "max_steps": 1}, "The only step is warmup (warmup_steps is 1)"),
        ({"warmup_ratio": 1.0, "max_steps": 5}, "All 5 steps are warmup: the learning rate rises from 0 to 8e-05"),
        ({"warmup_steps": 3, "max_steps": 5}, "3 of 5 steps are warmup (warmup_steps is 3): more than half"),
        ({"warmup_steps": 0.8, "max_steps": 5}, "4 of 5 steps are warmup: more than half"),
        ({"warmup_steps": 2, "max_steps": 5}, None),
        ({"warmup_steps": 100, "max_steps": 5, "lr_scheduler": "constant"}, None),
        ({}, None),
    ],
)
def test_a_warmup_that_takes_the_run(planner: Planner, keys: dict[str, Any], warning: str | None) -> None:
    plan = planner.plan(**keys)
    assert [note[: len(warning or "")] for note in plan.warnings] == ([] if warning is None else [warning])
    assert plan.notes[: len(plan.warnings)] == plan.warnings


NEVER_ENDS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def test_an_adapter_that_would_never_stop(planner: Planner, tiny_model: Path) -> None:
    """ChatML on a base model whose vocabulary has no such token: it is several ordinary ones."""
    source = NEVER_ENDS.replace("im_end", "im_stop")
    base = Planner(planner.folder, load_tokenizer(tiny_model, {}, {}, chat_template=source))
    (warning,) = base.plan().warnings
    assert "learn to stop" in warning
    fine = Planner(planner.folder, load_tokenizer(tiny_model, {}, {}, chat_template=NEVER_ENDS))
    assert fine.plan().warnings == []
    (warning,) = fine.plan(datasets=[{"path": "rows.jsonl", "train_on_eos": "none"}]).warnings
    assert warning == (
        "datasets[0].train_on_eos is none: no token that ends a turn is trained on, so the adapter will not learn to "
        "stop."
    )
    assert fine.plan(datasets=[{"path": "rows.jsonl", "train_on_eos": "last"}]).warnings == []
    assert any("learn to stop" in note for note in base.plan(train_on_inputs=True).warnings)


def test_an_end_at_which_serving_does_not_stop(planner: Planner) -> None:
    """An ordinary token that the recipe alone calls the end of a turn."""
    own = planner.tokenizer
    id = own.token_id("?")
    template = (own.chat_template or "").replace("<|im_end|>", "?")
    other = Planner(planner.folder, Tokenizer(own._backend, eos_ids=[0], chat_template=template))
    plan = other.plan(eot_tokens=["?"])
    assert plan.warnings == []
    assert plan.end_ids == (id,)  # with which requests to the adapter end
    assert planner.plan().end_ids == ()


@pytest.mark.parametrize(
    "answer", [{"content": "b", "weight": 0}, {"content": [{"type": "text", "text": "b", "train": 0}]}]
)
def test_flags_that_train_on_inputs_overrides(planner: Planner, answer: dict[str, Any]) -> None:
    masked = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]}
    planner.write("rows.jsonl", [masked, chat("a", "b")])
    (masked_out,) = planner.plan().warnings
    assert masked_out.startswith("1 rows have no token to train on")
    (warning,) = planner.plan(train_on_inputs=True).warnings
    assert warning.startswith("datasets[0]: train_on_inputs trains on every token, also on messages and parts whose")


def test_texts_without_an_end(planner: Planner) -> None:
    planner.write("rows.jsonl", [{"prompt": "a", "completion": "b"}])
    endless = Planner(planner.folder, Tokenizer(planner.tokenizer._backend))
    (warning,) = endless.plan().warnings
    assert "no token that ends a text: the adapter will not learn to stop" in warning


def test_chats_without_the_token_that_texts_begin_with(planner: Planner) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_str(planner.tokenizer.definition)
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    template = planner.tokenizer.chat_template or ""
    without = Planner(planner.folder, Tokenizer(backend, bos_id=0, eos_ids=[2], chat_template=template))
    (warning,) = without.plan().warnings
    assert "<|endoftext|>" in warning
    written = Tokenizer(backend, bos_id=0, eos_ids=[2], chat_template="<|endoftext|>" + template)
    assert Planner(planner.folder, written).plan().warnings == []
    planner.write("rows.jsonl", [{"prompt": "a", "completion": "b"}])
    assert without.plan().warnings == []


def test_how_an_adapter_is_asked(planner: Planner) -> None:
    plan = planner.plan()
    assert plan.prompt == Prompt(format="chat")
    assert plan.how_to_ask == "in /v1/chat/completions."
    assert planner.plan(default_system_message="Be brief.").prompt == Prompt(format="chat", system="Be brief.")
    with_system = [{"system": name, **chat("a", "b")} for name in ("Be brief.", "Be long.")]
    planner.write("two.jsonl", with_system)
    assert planner.plan(datasets=[{"path": "two.jsonl"}]).prompt == Prompt(format="chat")
    planner.write("one.jsonl", with_system[:1] * 3)
    one = planner.plan(datasets=[{"path": "one.jsonl"}])
    assert one.prompt == Prompt(format="chat", system="Be brief.")
    assert "'Be brief.'" in one.how_to_ask
    planner.write("alpaca.jsonl", [{"instruction": "Add.", "output": "3"}] * 20)
    alpaca = planner.plan(datasets=[{"path": "alpaca.jsonl"}, {"path": "one.jsonl"}])
    assert alpaca.prompt.format == "alpaca"
    assert "Rows are rendered in several ways (20 as alpaca, 3 as chat): a request has one of them." in alpaca.notes
    assert (alpaca.prompt.template or "").replace("{instruction}", "Add.") == alpaca.previews[0][0].text
    assert "/v1/completions" in alpaca.how_to_ask
    assert "chat_template.alpaca" in alpaca.how_to_ask


def test_alpacas_rows_as_chats(planner: Planner) -> None:
    planner.write("a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    plan = planner.plan(datasets=[{"path": "a.jsonl", "type": "chat_template.alpaca"}], default_system_message="S")
    assert "".join(piece.text for piece in plan.previews[0]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert [piece.text for piece in plan.previews[0] if piece.trained] == ["3<|im_end|>"]
    assert plan.prompt == Prompt(format="chat", system="S")


def test_types_are_told_by_the_first_row(planner: Planner) -> None:
    planner.write("a.jsonl", [{"instruction": "Add.", "output": "3"}])
    planner.write("b.jsonl", [{"prompt": "One", "completion": " two"}])
    planner.write("c.jsonl", [{"text": "One two three"}])
    plan = planner.plan(datasets=[{"path": name} for name in ("a.jsonl", "b.jsonl", "c.jsonl")])
    texts = [["".join(piece.text for piece in pieces), pieces[-1].text] for pieces in plan.previews]
    assert texts[0][0].startswith("Below is an instruction")
    assert texts[1] == ["One two<|im_end|>", " two<|im_end|>"]
    assert texts[2][0] == "One two three<|im_end|>"
    planner.write("a.jsonl", [{"foo": 1}])
    with pytest.raises(BadRows, match=r"a.jsonl, row 1: has the fields foo, by which no type"):
        planner.plan(datasets=[{"path": "a.jsonl"}])


def test_slices_formats_and_folders(planner: Planner) -> None:
    (planner.folder / "more").mkdir()
    planner.write("more/rows", [chat("a", "b"), chat("c", "d")])
    plan = planner.plan(
        datasets=[
            {"path": "rows.jsonl", "split": "train[:20%]"},
            {"path": "rows.jsonl", "split": "train[-1:]"},
            {"path": "more", "data_files": ["rows"], "ds_type": "json"},
            {"path": "json", "data_files": "more/rows"},
        ]
    )
    assert len(plan.train) == 2 + 1 + 2 + 2
    with pytest.raises(InvalidRequest, match="data_files is missing"):
        planner.plan(datasets=[{"path": "json"}])
    with pytest.raises(InvalidRequest, match=r"no rows in rows\.jsonl"):
        planner.plan(datasets=[{"path": "rows.jsonl", "split": "train[50:]"}])


@pytest.mark.parametrize(
    ("keys", "error", "param"),
    [
        ({"base_model": "other"}, ModelNotFound, "base_model"),
        ({"sequence_len": 513}, InvalidRequest, "sequence_len"),
        ({"lora_target_modules": ["foo"]}, InvalidRequest, "lora_target_modules"),
        ({"chat_template": "lama3"}, InvalidRequest, "chat_template"),
        ({"chat_template": "gemma4_unified"}, InvalidRequest, "chat_template"),
        ({"chat_template": "jinja", "chat_template_jinja": "{% if %}"}, InvalidRequest, "chat_template_jinja"),
        ({"datasets": [{"path": "rows.jsonl", "chat_template": "jinja"}]}, InvalidRequest, "datasets[0].chat_template"),
        (
            {"datasets": [{"path": "rows.jsonl", "chat_template": "gemma"}, {"path": "rows.jsonl"}]},
            InvalidRequest,
            "chat_template",
        ),
        ({"special_tokens": {"bos_token": "<s>"}}, InvalidRequest, "special_tokens.bos_token"),
        ({"tokens": ["<new>"]}, InvalidRequest, "tokens"),  # SHAPE has no vocabulary, as transformers' own modules
        ({"lora_target_parameters": ["experts.down_proj"]}, InvalidRequest, "lora_target_parameters"),
        ({"lora_rank_pattern": {"q_prj": 4}}, InvalidRequest, "lora_rank_pattern.q_prj"),
        (
            {"lora_target_modules": ["q_proj"], "lora_alpha_pattern": {"q_proj": 4, "down_proj": 4}},
            InvalidRequest,
            "lora_alpha_pattern.down_proj",
        ),
        ({"peft_layers_to_transform": [0, 2]}, InvalidRequest, "peft_layers_to_transform"),
        ({"eot_tokens": ["<new>"]}, InvalidRequest, "eot_tokens"),
        ({"datasets": [{"path": "/etc/passwd"}]}, Forbidden, "datasets[0].path"),
        ({"test_datasets": [{"path": "tatsu-lab/alpaca"}]}, Forbidden, "test_datasets[0].path"),
        ({"datasets": [{"path": "absent.jsonl"}]}, InvalidRequest, "datasets[0].path"),
        ({"datasets": [{"path": "rows.jsonl", "split": "test"}]}, InvalidRequest, "datasets[0].split"),
    ],
)
def test_what_cannot_be_planned(planner: Planner, keys: dict[str, Any], error: type[Exception], param: str) -> None:
    with pytest.raises(error) as caught:
        planner.plan(**keys)
    assert caught.value.param == param  # type: ignore[attr-defined]


def shown(plan: Plan) -> str:
    return "".join(piece.text for piece in plan.previews[0])


ROW = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"chat_template": "gemma3"},
         "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"),
        ({"chat_template": "phi_4"},
         "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>Hi<|im_end|>"),
        ({"datasets": [{"path": "rows.jsonl", "chat_template": "exaone"}]},
         "[|system|][|endofturn|]\n[|user|]Hello\n[|assistant|]Hi[|endofturn|]\n"),
        ({"chat_template_jinja": "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"},
         "user=Hello;assistant=Hi;"),
    ],
)  # fmt: skip
def test_a_template_of_the_recipes_goes_with_the_adapter(planner: Planner, keys: dict[str, Any], text: str) -> None:
    planner.write("rows.jsonl", [ROW])
    plan = planner.plan(**keys)
    assert shown(plan).removeprefix("<|im_start|>") == text.removeprefix("<|im_start|>")
    assert plan.template is not None
    assert planner.tokenizer.with_template(plan.template.source).encode_chat(
        ROW["messages"], add_generation_prompt=False
    ) == list(plan.train[0].token_ids)
    assert any("goes with the adapter" in note for note in plan.notes)


@pytest.mark.parametrize(
    "keys",
    [
        {"chat_template": "chatml"},
        {"chat_template": "nemotron_h"},
        {"chat_template": "tokenizer_default"},
        {"chat_template": "tokenizer_default_fallback_gemma"},
        {"datasets": [{"path": "rows.jsonl", "chat_template": "chatml"}, {"path": "rows.jsonl"}]},
        {"chat_template_jinja": "{# mine #}" + str(builtin_template("chatml"))},
    ],
)
def test_a_template_that_writes_the_same_is_the_models_own(planner: Planner, keys: dict[str, Any]) -> None:
    plan = planner.plan(**keys)
    assert plan.template is None
    assert plan.train[:10] == planner.plan().train


def test_a_model_without_a_template_is_taught_one(planner: Planner) -> None:
    """Its end of turn included: <|im_end|> is a token of this vocabulary, and ends nothing in this model."""
    bare = Planner(planner.folder, Tokenizer(planner.tokenizer._backend, eos_ids=[0]))
    for name in ("chatml", "tokenizer_default_fallback_chatml"):
        plan = bare.plan(chat_template=name)
        assert plan.warnings == []
        assert plan.template is not None
        assert shown(plan).endswith("yes <|im_end|>\n")
        served = bare.tokenizer.with_template(plan.template.source)
        assert bare.tokenizer.token_id("<|im_end|>") in served.eos_ids
        assert bare.tokenizer.eos_ids == (0,)
        assert plan.stop == ()
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.plan(chat_template="tokenizer_default")


def test_an_end_of_several_tokens_is_a_text_at_which_requests_stop(planner: Planner) -> None:
    planner.write("rows.jsonl", [ROW])
    plan = planner.plan(chat_template="exaone4")
    assert plan.stop == ("[|endofturn|]",)
    assert plan.warnings == []
    pieces = plan.previews[0]
    assert (pieces[-1].text, pieces[-1].trained) == ("Hi[|endofturn|]\n", True)


def test_variables_of_the_template_go_with_the_adapter(planner: Planner) -> None:
    planner.write("rows.jsonl", [ROW])
    source = "{% for m in messages %}{{ m.role }}{{ mark }} {{ m.content }}<|im_end|>{% endfor %}"
    plan = planner.plan(chat_template_jinja=source, chat_template_kwargs={"mark": '"\\n', "other": False})
    assert shown(plan) == 'user"\\n Hello<|im_end|>assistant"\\n Hi<|im_end|>'
    assert plan.template is not None
    served = planner.tokenizer.with_template(plan.template.source)
    assert served.render_chat(ROW["messages"], add_generation_prompt=False) == shown(plan)
    asked = served.render_chat(ROW["messages"], add_generation_prompt=False, template_kwargs={"mark": "?"})
    assert asked == "user? Hello<|im_end|>assistant? Hi<|im_end|>"
    # Without an effect, the model's own template stays.
    assert planner.plan(chat_template_kwargs={"enable_thinking": False}).template is None
    off = planner.plan(chat_template="qwen3", chat_template_kwargs={"enable_thinking": False})
    assert off.template is not None
    served = planner.tokenizer.with_template(off.template.source)
    assert served.render_chat(ROW["messages"][:1]).endswith("<think>\n\n</think>\n\n")


def test_templates_that_differ(planner: Planner) -> None:
    with pytest.raises(InvalidRequest, match=r"datasets\[1\].chat_template is another template than datasets\[0\]"):
        planner.plan(
            datasets=[
                {"path": "rows.jsonl", "chat_template": "gemma"},
                {"path": "rows.jsonl", "chat_template": "zephyr"},
            ]
        )
    with pytest.raises(InvalidRequest, match="did you mean llama3"):
        planner.plan(chat_template="lama3")


def test_tools_are_described_as_in_serving_where_the_template_has_none(planner: Planner) -> None:
    """The tiny model's ChatML prints neither tools nor calls; serving describes them in the system message."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": {"at": "a"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "pond", "tool_call_id": "c"},
        {"role": "assistant", "content": "In the pond."},
    ]
    planner.write("rows.jsonl", [{"messages": messages, "tools": [tool]}])
    (example,) = planner.plan(sequence_len=512).train
    adapted, tools = planner.tokenizer.adapt_tools(messages, [tool])
    assert tools is None
    assert example.token_ids == planner.tokenizer.encode_chat(adapted, add_generation_prompt=False)
    trained = planner.tokenizer.decode([id for id, on in zip(example.token_ids, example.trained, strict=True) if on])
    assert trained == '<tool_call>\n{"name": "look", "arguments": {"at": "a"}}\n</tool_call>In the pond.'


def test_what_is_the_models_own_may_be_named(planner: Planner) -> None:
    own = planner.tokenizer.chat_template
    named = planner.plan(
        base_model="someone/TINY",
        chat_template="jinja",
        chat_template_jinja=f"{own}\n",
        special_tokens={"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<anything>"},
        tokens=["<|im_start|>"],
        eot_tokens=["<|im_end|>"],
        datasets=[{"path": "rows.jsonl", "chat_template": "chatml"}],
    )
    assert named.train == planner.plan().train


def test_a_model_without_a_template(planner: Planner) -> None:
    backend = planner.tokenizer._backend
    bare = Planner(planner.folder, Tokenizer(backend, eos_ids=[2]))
    with pytest.raises(InvalidRequest, match="no chat template: start the server with one") as caught:
        bare.plan()
    assert caught.value.param == "datasets[0].type"
    planner.write("rows.jsonl", [{"prompt": "a", "completion": "b"}])
    assert len(bare.plan().train) == 1


def test_further_ends_of_turns(planner: Planner) -> None:
    """<|endoftext|> ends nothing in ChatML, so naming it changes nothing; a system message does."""
    assert planner.plan(eot_tokens=["<|endoftext|>"]).train == planner.plan().train
    with_system = planner.plan(default_system_message="Be brief.")
    assert with_system.previews[0][0].text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_the_summary_encodes_and_comes_back(planner: Planner) -> None:
    summary = summarize(planner.plan(micro_batch_size=2, gradient_accumulation_steps=3, val_set_size=1))
    assert summary.effective_batch == 6
    assert summary.linears == {"self_attn.q_proj": 2, "self_attn.k_proj": 2, "mlp.down_proj": 2}
    assert msgspec.json.decode(msgspec.json.encode(summary), type=PlanSummary) == summary


def test_memory_falls_with_checkpointing_and_grows_with_the_batch(planner: Planner) -> None:
    plain = planner.plan().estimate
    assert planner.plan(gradient_checkpointing=True).estimate.activation_bytes < plain.activation_bytes
    assert planner.plan(micro_batch_size=4).estimate.activation_bytes > 2 * plain.activation_bytes
    assert planner.plan(optimizer="adamw_8bit").estimate.optimizer_bytes * 4 == plain.optimizer_bytes
    assert planner.plan(optimizer="sgd").estimate.optimizer_bytes == 0
    assert planner.plan(riding_bytes=1000).estimate.memory_bytes == plain.memory_bytes + 1000
    for alone in ({"peft_use_dora": True}, {"neftune_noise_alpha": 5.0}):
        assert planner.plan(riding_bytes=1000, **alone).estimate.riding_bytes == 0
    launched = planner.plan(riding_bytes=1000, devices=2, ddp=True)
    assert launched.launch is not None
    assert launched.estimate.riding_bytes == 0


@pytest.mark.parametrize("name", ["tickets", "newts", "template", "dora"])
def test_the_example_recipes(name: str, tokenizer: Tokenizer) -> None:
    text = (EXAMPLES / f"{name}.yaml").read_text()
    assert text.startswith(f"# eft train settings/recipes/{name}.yaml\n")
    recipe = load_recipe(text.encode(), max_lora_rank=64)
    shape = msgspec.structs.replace(SHAPE, linears={**SHAPE.linears, "self_attn.v_proj": (64, 32)})
    files = DataFiles(roots=[EXAMPLES])
    plan = prepare(recipe, tokenizer, files, model_names=("tiny",), max_len=512, shape=shape)
    assert plan.notes == []
    assert plan.test
    assert plan.train_stats.counts.rows == plan.train_stats.counts.used
    assert (plan.estimate.seconds, plan.estimate.basis) == (None, None)
    evaluated = plan.test_stats.tokens * -(-plan.schedule.total_steps // (plan.schedule.eval_every or 10**9)) / 3
    tokens = plan.train_stats.tokens * recipe.num_epochs + evaluated
    timed = plan.estimate.at(100.0, "jobs")
    assert (timed.seconds, timed.basis) == (pytest.approx(tokens / 100, rel=1e-3), "jobs")


def test_the_starter_is_a_recipe() -> None:
    recipe = load_recipe((EXAMPLES / "starter.yaml").read_bytes(), max_lora_rank=64)
    assert recipe.notes == ()


# -- kept data -------------------------------------------------------------------------------------


def same(one: Plan, other: Plan) -> bool:
    told = msgspec.to_builtins(summarize(one)) == msgspec.to_builtins(summarize(other))
    return told and (one.train, one.test, one.bins) == (other.train, other.test, other.bins)


KEYS: dict[str, Any] = {
    "val_set_size": 3,
    "sample_packing": True,
    "sequence_len": 20,
    "datasets": [{"path": "rows.jsonl", "train_on_eos": "none"}],
    "dataset_exact_deduplication": True,
    "excess_length_strategy": "truncate",
}


def test_data_is_read_once(planner: Planner, tmp_path: Path) -> None:
    """A second plan is made of the kept examples alone, and is the same in all that it says."""
    kept = KeptData(tmp_path / "examples.bin", lambda: "digest")
    first = planner.plan(kept=kept, **KEYS)
    assert any("train_on_eos is none" in warning for warning in first.warnings)
    assert first.train_stats.counts.truncated
    assert same(first, planner.plan(**KEYS))
    again = planner.plan(kept=kept, files=DataFiles(), **KEYS)  # no file may be read
    assert same(first, again)
    assert list(feed(again).epoch(1)) == list(feed(first).epoch(1))


@pytest.mark.parametrize("fault", ["damaged", "tokenizer", "recipe"])
def test_kept_data_that_cannot_be_used_is_made_again(planner: Planner, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "examples.bin"
    first = planner.plan(kept=KeptData(path, lambda: "digest"), **KEYS)
    whole = path.read_bytes()
    digest, keys = "digest", KEYS
    if fault == "damaged":
        path.write_bytes(whole[:-3])
    elif fault == "tokenizer":
        digest = "another"
    else:
        keys = KEYS | {"train_on_inputs": True}
    with capture_logs() as logs:
        found = planner.plan(kept=KeptData(path, lambda: digest), **keys)
    assert "data_is_tokenised_again" in [log["event"] for log in logs]
    assert same(found, planner.plan(**keys))
    assert same(found, first) == (fault != "recipe")
    assert same(found, planner.plan(kept=KeptData(path, lambda: digest), files=DataFiles(), **keys))


def test_a_plan_is_made_where_nothing_can_be_kept(planner: Planner, tmp_path: Path) -> None:
    """The job goes on: a disk that takes no examples is no fault of its recipe."""
    (tmp_path / "file").write_text("")
    kept = KeptData(tmp_path / "file" / "examples.bin", lambda: "digest")
    assert same(planner.plan(kept=kept), planner.plan())


def test_kept_data_is_no_way_around_the_checks(planner: Planner, tmp_path: Path) -> None:
    kept = KeptData(tmp_path / "examples.bin", lambda: "digest")
    planner.plan(kept=kept, **KEYS)
    with pytest.raises(InvalidRequest, match="sequence_len must be at most 16"):
        planner.plan(kept=kept, max_len=16, **KEYS)


# -- data of earlier jobs --------------------------------------------------------------------------


def kept_in(folder: Path, job: str | None, *, most: int = 10**6) -> KeptData:
    path = None
    if job is not None:
        (folder / job).mkdir(exist_ok=True)
        path = folder / job / "examples.bin"
    return KeptData(path, lambda: "digest", PreparedCache(folder / "prepared", most, 3600.0))


def tokenised(logs: Sequence[Any]) -> bool:
    return "data_is_tokenised" in [log["event"] for log in logs]


@pytest.mark.parametrize("first", [None, "a"], ids=["dry run", "job"])
def test_data_is_read_once_for_several_jobs(planner: Planner, tmp_path: Path, first: str | None) -> None:
    """Another learning rate, other steps: the same examples, which the second job has in its own folder."""
    with capture_logs() as logs:
        one = planner.plan(kept=kept_in(tmp_path, first), **KEYS)
    assert tokenised(logs)
    with capture_logs() as logs:
        two = planner.plan(kept=kept_in(tmp_path, "b"), **KEYS)
        three = planner.plan(kept=kept_in(tmp_path, "c"), **{**KEYS, "learning_rate": 3e-4, "sample_packing": False})
    assert not tokenised(logs)
    assert same(one, two)
    assert three.train == one.train
    shutil.rmtree(tmp_path / "prepared")
    assert same(one, planner.plan(kept=kept_in(tmp_path, "b"), files=DataFiles(), **KEYS))  # goes on by itself


@pytest.mark.parametrize("change", ["rows", "key", "damage", "bound"])
def test_data_of_earlier_jobs_is_for_the_same_alone(planner: Planner, tmp_path: Path, change: str) -> None:
    most = 0 if change == "bound" else 10**6
    planner.plan(kept=kept_in(tmp_path, "a", most=most), **KEYS)
    keys = KEYS
    if change == "rows":
        planner.write("rows.jsonl", [chat(f"another {number}", "one") for number in range(9)])
    elif change == "key":
        keys = KEYS | {"sequence_len": 18}
    elif change == "damage":
        (entry,) = (tmp_path / "prepared").iterdir()
        entry.write_bytes(entry.read_bytes()[:-1])
    with capture_logs() as logs:
        found = planner.plan(kept=kept_in(tmp_path, "b", most=most), **keys)
    assert tokenised(logs)
    assert same(found, planner.plan(**keys))


def test_rows_that_change_while_they_are_read_are_not_for_others(
    planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Reader.read

    def changing(self: Reader, group: str, *args: Any) -> Any:
        if group == "datasets":
            planner.write("rows.jsonl", [chat(f"another {number}", "one") for number in range(9)])
        return read(self, group, *args)

    monkeypatch.setattr(Reader, "read", changing)
    planner.plan(kept=kept_in(tmp_path, "a"), **KEYS)
    assert (tmp_path / "a" / "examples.bin").exists()
    assert not (tmp_path / "prepared").exists()


def test_the_rows_read_so_far_are_reported(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.trainer.data.examples.FIRST_REPORT_SECONDS", 0.0)
    monkeypatch.setattr("runtime.trainer.data.examples.MAX_REPORT_SECONDS", 0.0)
    told: list[tuple[int, int]] = []
    recipe = recipe_from(
        Document({"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "rows.jsonl"}]}), max_lora_rank=64
    )
    plan = prepare(
        recipe,
        planner.tokenizer,
        DataFiles(roots=[planner.folder]),
        model_names=("tiny",),
        max_len=512,
        shape=SHAPE,
        on_rows=lambda rows, tokens: told.append((rows, tokens)),
    )
    assert [rows for rows, _ in told] == list(range(1, 11))
    assert told[-1][1] == plan.train_stats.tokens - len(plan.train[-1])
