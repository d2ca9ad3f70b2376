"""Exports of adapters that bring tokens, rows of embedding and head, a template, or ends of answers of their own."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from runtime.adapters.card import CARD, TOKENIZER, Card, read_card, write_card
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.export.export import export_adapter
from runtime.checkpoints.model_loading import load_decoder
from runtime.model.config import ModelLoadError
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.lora_base import LoraBase
from runtime.text.own_tokens import OwnText, OwnToken
from runtime.workers.export_difference import measure_difference
from settings.schema import ModelSettings
from tests.checkpoints.export.test_export import LOUD, adapted, close, make_base, ours
from tests.checkpoints.gguf.families import write_family
from tests.parity.adapted import our_logits
from tests.tiny import BOS, EOS, PAD, VOCAB_SIZE

NEW = (VOCAB_SIZE, VOCAB_SIZE + 1)
TOKENS = (OwnToken(NEW[0], "<call>", special=True), OwnToken(NEW[1], "<thought>"))
IDS = torch.tensor([5, 300, 3, 70, 9, 2, 41, 3, 100])


def with_rows(model: Path, path: Path, *, new: int = 0, **config: Any) -> torch.Tensor:
    """Write an adapter of PEFT's with random rows of embedding and head; returns PEFT's logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    if new:
        base.resize_token_embeddings(VOCAB_SIZE + new, mean_resizing=False)
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields, **config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(lora.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        lora.save_pretrained(path)
        return lora(ids_of(new)[None]).logits[0]


def ids_of(new: int) -> torch.Tensor:
    return torch.cat([IDS, torch.arange(VOCAB_SIZE, VOCAB_SIZE + new)])


def served(checkpoint: Checkpoint, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    decoder = load_decoder(checkpoint, ModelSettings(dtype="float32", device="cpu"))
    assert isinstance(decoder, Decoder)
    return our_logits(decoder, LoraBase.of(decoder, find_model(checkpoint.config), "tiny"), adapter, ids)


BOTH = {"embed_tokens": list(NEW), "lm_head": list(NEW)}
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "rows": ("llama", 0, {"trainable_token_indices": [3, 70, 100]}),
    "rows, tied": ("qwen2 tied", 0, {"trainable_token_indices": [3, 70, 100]}),
    "new": ("llama", 2, {"trainable_token_indices": BOTH}),
    "new, tied": ("qwen2 tied", 2, {"trainable_token_indices": list(NEW)}),
    "copies": ("llama", 0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied base whose head stays": ("qwen2 tied", 0, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_written_into_the_merged_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, new, config = VARIANTS[name]
    model = make_base(tmp_path / "base", family)
    expected = with_rows(model, tmp_path / "adapter", new=new, **config)
    checkpoint, own = open_checkpoint(str(model)), OwnText(tokens=TOKENS if new else ())
    close(served(checkpoint, tmp_path / "adapter", ids_of(new)), expected)
    export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out", "merged", own=own)
    close(ours(tmp_path / "out", ids_of(new)), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        close(theirs(ids_of(new)[None]).logits[0], expected)
    assert theirs.config.vocab_size == VOCAB_SIZE + new
    if new:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        for found in (tokenizer.encode, open_checkpoint(str(tmp_path / "out")).tokenizer.encode):
            assert found("a<call><thought>")[-2:] == list(NEW)
        assert tokenizer.decode(list(NEW), skip_special_tokens=True) == "<thought>"
        assert (tokenizer.eos_token, tokenizer.bos_token) == (EOS, BOS)


@pytest.mark.parametrize("source", ["directory", "gguf"])
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_written_into_a_gguf_file(name: str, source: str, tmp_path: Path) -> None:
    family, new, config = VARIANTS[name]
    model = make_base(tmp_path / "base", family)
    expected = with_rows(model, tmp_path / "adapter", new=new, **config)
    base = model if source == "directory" else write_family(tmp_path / "base.gguf", model)
    own = OwnText(tokens=TOKENS if new else ())
    export_adapter(open_checkpoint(str(base)), tmp_path / "adapter", tmp_path / "out.gguf", "gguf", type="f32", own=own)
    close(ours(tmp_path / "out.gguf", ids_of(new)), expected)
    if new:
        read = open_checkpoint(str(tmp_path / "out.gguf")).tokenizer
        assert read.encode("a<call><thought>")[-2:] == list(NEW)
        assert read.decode(list(NEW)) == "<thought>"


def test_another_text_of_a_reserved_token_needs_no_new_row(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama")
    with_rows(model, tmp_path / "adapter", trainable_token_indices=[0])
    own = OwnText(tokens=(OwnToken(0, "<call>", special=True),))
    for source in (model, write_family(tmp_path / "base.gguf", model)):
        checkpoint = open_checkpoint(str(source))
        for format, name in (("merged", f"to-{source.name}-merged"), ("gguf", f"to-{source.name}-file.gguf")):
            export_adapter(checkpoint, tmp_path / "adapter", tmp_path / name, format, own=own)
            read = open_checkpoint(str(tmp_path / name)).tokenizer
            assert read.encode("<call>") == [0]
            assert read.token_id(PAD) is None


def generation(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())


def test_ends_of_answers_are_those_of_the_adapter(tmp_path: Path) -> None:
    """In generation_config.json and in the tokenizer; in the three places that a GGUF file has for them."""
    from transformers import AutoTokenizer

    model = make_base(tmp_path / "base", "llama")
    adapted(model, "llama", tmp_path / "adapter")
    gguf_base = write_family(tmp_path / "base.gguf", model)
    own = OwnText(eos_id=0, end_ids=(7,), stop=("\nEnd",), template=LOUD)
    for source in (open_checkpoint(str(model)), open_checkpoint(str(gguf_base))):
        name = source.source.name
        written = export_adapter(source, tmp_path / "adapter", tmp_path / f"{name}-out", "merged", own=own)
        assert written.notes == (
            "Its answers end with a text that is no single token: give '\\nEnd' as a stop string.",
        )
        found = generation(tmp_path / f"{name}-out")["eos_token_id"]
        assert (found[0], {0, 2, 7} <= set(found)) == (0, True)
        assert AutoTokenizer.from_pretrained(tmp_path / f"{name}-out").eos_token == PAD
        assert {0, 2, 7} <= set(open_checkpoint(str(tmp_path / f"{name}-out")).tokenizer.eos_ids)
        export_adapter(source, tmp_path / "adapter", tmp_path / f"{name}.gguf.out", "gguf", own=own)
        fields = gguf.GGUFReader(tmp_path / f"{name}.gguf.out").fields
        ends = [fields[f"tokenizer.ggml.{role}_token_id"].contents() for role in ("eos", "eot", "eom")]
        assert ends == [0, 2, 7]
    many = OwnText(end_ids=(7, 8, 9))
    with pytest.raises(ModelLoadError, match=r"answers end with .*; a GGUF file names 2 tokens besides"):
        export_adapter(open_checkpoint(str(model)), tmp_path / "adapter", tmp_path / "x.gguf", "gguf", own=many)
    assert not (tmp_path / "x.gguf").exists()


def test_a_peft_export_has_the_card_and_the_tokenizer(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama")
    adapted(model, "llama", tmp_path / "adapter")
    card = Card(chat_template=LOUD, tokens=TOKENS, eos_id=0, stop=("x",))
    checkpoint, also = open_checkpoint(str(model)), (CARD, TOKENIZER)
    export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "plain", "peft", also=also)
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    write_card(tmp_path / "adapter", card)
    (tmp_path / "adapter" / TOKENIZER).symlink_to("/etc/passwd")
    own = OwnText(template=card.chat_template)
    export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out", "peft", own=own, also=also)
    assert read_card(tmp_path / "out") == card
    assert not (tmp_path / "out" / TOKENIZER).exists()
    assert card.own_text == OwnText(template=LOUD, tokens=TOKENS, eos_id=0, stop=("x",))


def refusal(checkpoint: Checkpoint, tmp_path: Path, format: str, own: OwnText | None = None) -> str:
    with pytest.raises(ModelLoadError) as caught:
        export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "x", format, own=own)
    assert not (tmp_path / "x").exists()
    return str(caught.value)


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_base(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(str(model))
    with_rows(model, tmp_path / "adapter", new=2, trainable_token_indices=BOTH)
    assert "export it as gguf, merged into its base" in refusal(checkpoint, tmp_path, "gguf-lora")
    twice = OwnText(tokens=(OwnToken(NEW[0], EOS),))
    assert f"The adapter's tokens do not fit the model: the token '{EOS}' has another" in refusal(
        checkpoint, tmp_path, "merged", twice
    )
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": list(NEW)}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "lm_head" not in name}
    save_file(kept, tmp_path / "adapter/adapter_model.safetensors")
    for format in ("merged", "gguf"):
        assert "2 new ids and 0 rows of lm_head for them" in refusal(checkpoint, tmp_path, format)


def test_the_difference_is_to_what_is_served(tmp_path: Path) -> None:
    """Rows included, and in the type that the factors are served in."""
    model = make_base(tmp_path / "base", "llama")
    with_rows(model, tmp_path / "adapter", new=2, trainable_token_indices=BOTH)
    checkpoint = open_checkpoint(str(model))
    own = OwnText(tokens=TOKENS)
    export_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out", "merged", own=own)
    settings = ModelSettings(dtype="float32", device="cpu")
    arguments = checkpoint, tmp_path / "adapter", tmp_path / "out", settings
    exact, rounded = measure_difference(*arguments), measure_difference(*arguments, "int8")
    assert (exact.adapter_dtype, rounded.adapter_dtype) == ("float32", "int8")
    assert exact.largest < 1e-3
    assert exact.same_tokens == 1.0
    assert rounded.divergence > 10 * exact.divergence
