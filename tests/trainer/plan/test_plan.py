"""From recipe and files to a plan."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.errors import Forbidden, InvalidRequest, ModelNotFound
from runtime.tokenizer import Tokenizer
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.problems import BadRows
from runtime.trainer.plan import Plan, eval_microbatches, feed, prepare
from runtime.trainer.recipe import Document, load_recipe, recipe_from
from runtime.trainer.shape import ModelShape
from runtime.trainer.summary import PlanSummary, summarize
from runtime.workers.loading.hf_tokenizer import load_tokenizer

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=512,
    linears={"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "mlp.down_proj": (128, 64)},
)
EXAMPLES = Path(__file__).parent.parent.parent / "settings" / "recipes"


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

    def plan(self, *, max_len: int = 512, **keys: Any) -> Plan:
        basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "rows.jsonl"}]}
        recipe = recipe_from(Document({**basic, **keys}), max_lora_rank=64)
        files = DataFiles(roots=[self.folder])
        return prepare(recipe, self.tokenizer, files, model_names=("tiny",), max_len=max_len, shape=SHAPE)


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
    assert any("5 rows are longer" in note for note in dropped.notes)
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
    assert any("1 rows have no token to train on" in note for note in plan.notes)


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
        ({"chat_template": "llama3"}, InvalidRequest, "chat_template"),
        ({"chat_template": "vicuna"}, InvalidRequest, "chat_template"),
        ({"chat_template": "jinja", "chat_template_jinja": "{{ 'a' * 10**9 }}"}, InvalidRequest, "chat_template_jinja"),
        ({"datasets": [{"path": "rows.jsonl", "chat_template": "gemma"}]}, InvalidRequest, "datasets[0].chat_template"),
        ({"special_tokens": {"eos_token": "<|endoftext|>"}}, InvalidRequest, "special_tokens.eos_token"),
        ({"special_tokens": {"bos_token": "<s>"}}, InvalidRequest, "special_tokens.bos_token"),
        ({"tokens": ["<new>"]}, InvalidRequest, "tokens"),
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


@pytest.mark.parametrize("name", ["tickets", "newts"])
def test_the_example_recipes(name: str, tokenizer: Tokenizer) -> None:
    text = (EXAMPLES / f"{name}.yaml").read_text()
    assert text.startswith(f"# eft train settings/recipes/{name}.yaml\n")
    recipe = load_recipe(text.encode(), max_lora_rank=64)
    shape = msgspec.structs.replace(SHAPE, linears={**SHAPE.linears, "self_attn.v_proj": (64, 32)})
    files = DataFiles(roots=[EXAMPLES])
    plan = prepare(recipe, tokenizer, files, model_names=("tiny",), max_len=512, shape=shape, tokens_per_second=100.0)
    assert plan.notes == []
    assert plan.test
    assert plan.train_stats.counts.rows == plan.train_stats.counts.used
    assert plan.estimate.seconds == pytest.approx(plan.train_stats.tokens * recipe.num_epochs / 100)


def test_the_starter_is_a_recipe() -> None:
    recipe = load_recipe((EXAMPLES / "starter.yaml").read_bytes(), max_lora_rank=64)
    assert recipe.notes == ()
