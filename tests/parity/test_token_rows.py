"""Rows of embedding and head against PEFT: `trainable_token_indices`, `modules_to_save`, resized embeddings.

The same logits from the files that PEFT writes, its logits from the files that we write, and in training the same
losses and gradients.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.training import TrainingOps
from runtime.checkpoints.peft import read_adapter, write_adapter
from runtime.model.decoder import Decoder
from runtime.model.families.family import Family
from runtime.model.lora import LoraShape
from runtime.model.lora_base import LoraBase
from runtime.model.vocabulary import RowTargets
from runtime.trainer.data.example import Example, collate
from runtime.trainer.lora import TrainableLora, adapter_of
from runtime.trainer.losses import make_loss
from runtime.trainer.step import MicroStep
from tests.parity.adapted import our_logits
from tests.parity.families import CASES, SHAPE, make_model
from tests.parity.gradients import drive
from tests.parity.packing import load
from tests.parity.peft_training import peft_loss

VOCAB = SHAPE["vocab_size"]
FAMILIES = ["llama", "gemma2", "granite", "gpt2", "gpt-neox"]
SOME, NEW = (3, 70, 100), (VOCAB, VOCAB + 1, VOCAB + 2)
VARIANTS = ["rows", "rows of both", "copies", "copy of the embedding", "copy of the head", "new", "new in copies"]


def config(variant: str, family: type[Family], tied: bool) -> dict[str, Any]:
    """The fields of PEFT's configuration."""
    embed, head = (name.rpartition(".")[2] for name in family.vocabulary())
    ids = list(NEW if variant == "new" else SOME)
    return {
        "rows": {"trainable_token_indices": ids},
        "rows of both": {"trainable_token_indices": {embed: ids, head: ids}},
        "new": {"trainable_token_indices": {embed: ids} if tied else {embed: ids, head: ids}},
        "copies": {"modules_to_save": [embed, head]},
        "new in copies": {"modules_to_save": [embed, head]},
        "copy of the embedding": {"modules_to_save": [embed]},
        "copy of the head": {"modules_to_save": [head]},
    }[variant]


def targets(variant: str, tied: bool) -> RowTargets:
    """The same for our training."""
    return {
        "rows": RowTargets(embedding=SOME, head=SOME if tied else (), tied=tied),
        "rows of both": RowTargets(embedding=SOME, head=SOME, tied=tied),
        "new": RowTargets(embedding=NEW, head=NEW, tied=tied, fresh=NEW, size=VOCAB + 3),
        "copies": RowTargets(copies=("embedding", "head"), size=VOCAB),
        "new in copies": RowTargets(copies=("embedding", "head"), size=VOCAB + 3, fresh=NEW),
        "copy of the embedding": RowTargets(copies=("embedding",), size=VOCAB),
        "copy of the head": RowTargets(copies=("head",), size=VOCAB),
    }[variant]


def examples(variant: str) -> list[Example]:
    """Texts with the rows' tokens among those that are read and those that are trained on, some of them twice."""
    generator = torch.Generator().manual_seed(5)
    special = list(NEW if variant.startswith("new") else SOME)
    made = []
    for length in (25, 9):
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        ids[1:3], ids[-3:] = special[:2], special
        made.append(Example(ids, [place >= 3 for place in range(length)]))
    return made


def peft_model(base: Any, family: type[Family], layers: int, variant: str, tied: bool) -> Any:
    """PEFT over `base`; its LoRA factors, rows and copies are random."""
    from peft import LoraConfig, get_peft_model

    if variant.startswith("new"):
        base.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    modules = [f"{family.layers()}.{layer}.{one}" for layer in range(layers) for one in family.LORA_TARGETS]
    fields = config(variant, family, tied)
    oracle = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=modules, **fields)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(oracle.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return oracle


def own_module(oracle: Any, name: str) -> Tensor:
    """The trained tensor of the embedding or the head in PEFT's model."""
    module = oracle.get_submodule(f"base_model.model.{name}")
    if hasattr(module, "token_adapter"):
        found: Tensor = module.token_adapter.trainable_tokens_delta["default"]
        return found
    saved: Tensor = module.modules_to_save["default"].weight
    return saved


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_saves_is_served_and_what_we_write_peft_loads(name: str, variant: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = make_model(tmp_path, *CASES[name])
    decoder, family = load(tmp_path)
    oracle = peft_model(base, family, decoder.spec.num_layers, variant, decoder.spec.tied)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    oracle.save_pretrained(theirs)
    ids = torch.tensor(examples(variant)[0].token_ids)
    with torch.no_grad():
        expected = oracle(ids.unsqueeze(0)).logits[0]
    described = LoraBase.of(decoder, family, "tiny")
    served = our_logits(decoder, described, theirs, ids)
    assert (served - expected).abs().max() < 1e-4
    read = read_adapter(theirs, described, max_rank=64)
    write_adapter(ours, read.layers, read.shape, described, vocabulary=read.vocabulary)
    again = type(base).from_pretrained(tmp_path, dtype=torch.float32)
    if variant.startswith("new"):
        again.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    with torch.no_grad():
        got = PeftModel.from_pretrained(again, ours).eval()(ids.unsqueeze(0)).logits[0]
    assert (got - expected).abs().max() < 1e-4
    assert torch.equal(our_logits(decoder, described, ours, ids), served)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_equal_pefts(name: str, variant: str, tmp_path: Path) -> None:
    base = make_model(tmp_path, *CASES[name])
    decoder, family = load(tmp_path)
    tied, rows = decoder.spec.tied, targets(variant, decoder.spec.tied)
    oracle = peft_model(base, family, decoder.spec.num_layers, variant, tied)
    oracle.save_pretrained(tmp_path / "theirs")
    described = LoraBase.of(decoder, family, "tiny")
    lora = trainable(decoder, family, rows, tmp_path / "theirs", described)
    data = examples(variant)
    trained = sum(example.num_trained for example in data)
    loss = peft_loss(oracle, data)
    loss.backward()
    micro = MicroStep(decoder, TrainingOps(), lora, collate(data, decoder.device), checkpointing=variant != "new")
    drive(micro.forward_backward(1 / trained), "odd")
    assert micro.score.mean == pytest.approx(loss.item(), abs=1e-4)
    assert lora.vocabulary is not None
    for kind, values in lora.vocabulary.values.items():
        theirs = own_module(oracle, family.vocabulary()[kind == "head"])
        assert values.grad is not None
        torch.testing.assert_close(values.grad, theirs.grad, atol=1e-4, rtol=1e-3)
        assert values.grad.abs().max() > 1e-4
    first = next(iter(lora.linears.values()))
    assert first.a.grad is not None
    places = {place: module for module, place in family.LORA_TARGETS.items()}
    module = oracle.get_submodule(
        f"base_model.model.{family.layers()}.0.{places[next(iter(lora.linears))[1], first.parts[0]]}"
    )
    torch.testing.assert_close(first.a.grad[:4], module.lora_A["default"].weight.grad, atol=1e-4, rtol=1e-3)


def trainable(
    decoder: Decoder, family: type[Family], rows: RowTargets, path: Path, described: LoraBase
) -> TrainableLora:
    """Our parameters with PEFT's values, by way of its files."""
    read = read_adapter(path, described, max_rank=64)
    places: dict[tuple[int, str], list[str]] = {}
    for layer in range(decoder.spec.num_layers):
        for linear, part in family.LORA_TARGETS.values():
            places.setdefault((layer, linear), []).append(part)
    lora = TrainableLora(decoder, places, LoraShape(rank=4, alpha=12), seed=3, rows=rows)
    assert read.vocabulary is not None
    assert lora.vocabulary is not None
    with torch.no_grad():
        for place, linear in lora.linears.items():
            linear.a.copy_(torch.cat([part.a for part in read.layers[place]]))
            for b, part in zip(linear.b, read.layers[place], strict=True):
                b.copy_(part.b)
        for kind, values in lora.vocabulary.values.items():
            found = read.vocabulary.embedding if kind == "embedding" else read.vocabulary.head
            assert found is not None
            values.copy_(found.rows[torch.isin(found.ids, torch.tensor(rows.ids(kind)))])
    captured = adapter_of(lora.capture(), places, lora.shape, rows)
    assert captured.vocabulary is not None
    return lora


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_reference_of_preferences_has_new_rows_as_they_began(name: str, tmp_path: Path) -> None:
    """The base without the adapter knows the new tokens by their first rows, whatever was trained since."""
    base = make_model(tmp_path, *CASES[name])
    decoder, _ = load(tmp_path)
    places = {(layer, "qkv"): ["q"] for layer in range(decoder.spec.num_layers)}
    rows = targets("new", decoder.spec.tied)
    lora = TrainableLora(decoder, places, LoraShape(rank=4, alpha=12), seed=3, rows=rows)
    assert lora.vocabulary is not None
    first = {kind: values.detach().clone() for kind, values in lora.vocabulary.values.items()}
    with torch.no_grad():
        for values in lora.vocabulary.values.values():
            values.add_(1.0)
    data = examples("new")
    micro = MicroStep(decoder, TrainingOps(), lora, collate(data, decoder.device), loss=make_loss("dpo", {}))
    drive(micro.evaluate(), "whole")
    base.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[VOCAB:] = first["embedding"]
        base.get_output_embeddings().weight[VOCAB:] = first.get("head", first["embedding"])
        expected = []
        for example in data:
            scores = base(input_ids=torch.tensor([example.token_ids])).logits[0, :-1].log_softmax(-1)
            found = scores.gather(1, torch.tensor(example.token_ids[1:]).unsqueeze(1)).squeeze(1)
            expected.append(found[torch.tensor(example.trained[1:])])
    assert micro.reference is not None
    torch.testing.assert_close(micro.reference, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert first["embedding"].std() < 0.5 * decoder.embedding.weight.data.std()  # near the mean of all rows
