"""Optimisers against torch's, transformers' and PEFT's own, on the matrices of an adapter."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.errors import InvalidRequest
from runtime.events import RunEvent
from runtime.model.decoder import Decoder
from runtime.model.group import SOLO
from runtime.model.split import Split
from runtime.trainer.course import read_snapshot
from runtime.trainer.data.example import Example, collate
from runtime.trainer.lora import mix
from runtime.trainer.optimizer import PACKAGES, Optimizer, check_optimizer
from runtime.trainer.recipe import Dataset, Document, Recipe, RecipeError, recipe_from
from runtime.trainer.run import TrainingRun
from runtime.trainer.shards import Held, Shards
from runtime.trainer.slices import Slices
from runtime.trainer.step import noisy
from tests.trainer.tiny_training import batches_of, drive, examples, load_decoder, run_spec, write_nothing

RANK, STEPS = 4, 5
SHAPES = {"0.qkv.a": (2 * RANK, 12), "0.qkv.b.q": (10, RANK), "0.qkv.b.k": (6, RANK), "1.out.a": (RANK, 8)}


def recipe(**keys: Any) -> Recipe:
    basic = {"learning_rate": 0.02, "max_grad_norm": 0.0, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.99}
    return Recipe(adapter="lora", datasets=(Dataset(path="a"),), **{**basic, **keys})


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(mix(step, len(name)))
    return torch.randn(SHAPES[name], generator=generator)


def optimizer_of(parameters: dict[str, Tensor], made: Recipe) -> Optimizer:
    held = {name: Held(Split.whole(tensor.shape[0]), 0) for name, tensor in parameters.items()}
    return Optimizer(parameters.items(), made, Shards(SOLO, held, torch.device("cpu")))


def finish(slices: Slices) -> None:
    try:
        next(slices)
        while True:
            slices.send(1)
    except StopIteration:
        return


def trained(made: Recipe) -> dict[str, Tensor]:
    """The matrices after `STEPS` steps of ours, at rates that fall."""
    parameters = matrices()
    optimizer = optimizer_of(parameters, made)
    for step in range(STEPS):
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            parameter.grad.copy_(gradient(name, step))
        finish(optimizer.step(1 - step / STEPS))
    return {name: parameter.detach() for name, parameter in parameters.items()}


def pieces(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The matrices as PEFT has them: A of query and key are two."""
    return [piece for name, tensor in tensors.items() for piece in tensor.split(RANK if name == "0.qkv.a" else 99)]


def oracle(made: Recipe, kind: Any, **options: Any) -> list[Tensor]:
    theirs = [piece.detach().clone().requires_grad_() for piece in pieces(matrices())]
    optimizer = kind(theirs, lr=0.02, weight_decay=0.1, **options)
    for step in range(STEPS):
        grads = pieces({name: gradient(name, step) for name in SHAPES})
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / STEPS)
        optimizer.step()
    return [parameter.detach() for parameter in theirs]


def test_adafactor_is_that_of_transformers() -> None:
    from transformers.optimization import Adafactor

    expected = oracle(recipe(), Adafactor, scale_parameter=False, relative_step=False)
    torch.testing.assert_close(pieces(trained(recipe(optimizer="adafactor"))), expected)


def test_muon_is_that_of_torch() -> None:
    expected = oracle(recipe(), torch.optim.Muon)
    torch.testing.assert_close(pieces(trained(recipe(optimizer="muon"))), expected)


def test_came_is_that_of_its_library() -> None:
    library = pytest.importorskip("pytorch_optimizer")
    expected = oracle(recipe(), library.CAME, betas=(0.9, 0.99, 0.999), eps1=1e-30, eps2=1e-16)
    found = trained(recipe(optimizer="came_pytorch", adam_beta3=0.999))
    torch.testing.assert_close(pieces(found), expected)


def test_adopt_is_that_of_its_library() -> None:
    library = pytest.importorskip("pytorch_optimizer")
    expected = oracle(recipe(), library.ADOPT, betas=(0.9, 0.99), eps=1e-8, weight_decouple=True)
    torch.testing.assert_close(pieces(trained(recipe(optimizer="adopt_adamw"))), expected)


@pytest.mark.parametrize("name", ["adamw", "radam", "sgd"])
def test_schedule_free_ones_are_those_of_their_library(name: str) -> None:
    """What is trained on, and what is published; the way there and back changes no bit."""
    library = pytest.importorskip("schedulefree")
    kind = {"adamw": "AdamWScheduleFree", "radam": "RAdamScheduleFree", "sgd": "SGDScheduleFree"}[name]
    options = {} if name == "sgd" else {"betas": (0.9, 0.99)}
    results: list[Tensor] = []

    def theirs(parameters: list[Tensor], **more: Any) -> Any:
        made = getattr(library, kind)(parameters, **more)
        made.train()
        return made

    expected = oracle(recipe(), theirs, **options)
    parameters = matrices()
    optimizer = optimizer_of(parameters, recipe(optimizer=f"schedule_free_{name}"))
    changes: list[None] = []
    for step in range(STEPS):
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            parameter.grad.copy_(gradient(key, step))
        finish(optimizer.step(1 - step / STEPS))
        before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        with optimizer.result_shown(lambda: changes.append(None)), optimizer.result_shown(lambda: changes.append(None)):
            results = pieces({key: parameter.detach().clone() for key, parameter in parameters.items()})
            inside = optimizer.capture()
        assert all(torch.equal(parameter, before[key]) for key, parameter in parameters.items())
        assert all(torch.equal(value, inside[key]) for key, value in optimizer.capture().items())
    assert len(changes) == 2 * STEPS
    torch.testing.assert_close(pieces({key: parameter.detach() for key, parameter in parameters.items()}), expected)
    assert name == "radam" or not torch.equal(results[0], expected[0])  # its first steps change nothing


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_optimizer(recipe())
    with pytest.raises(
        InvalidRequest, match=r"pytorch-optimizer, which is not installed: .*eft-server\[optimizers\]"
    ) as e:
        check_optimizer(recipe(optimizer="came_pytorch"))
    assert e.value.param == "optimizer"


def test_adamw_is_that_of_torch() -> None:
    expected = oracle(recipe(), torch.optim.AdamW, betas=(0.9, 0.99))
    torch.testing.assert_close(pieces(trained(recipe())), expected)


def test_lion_is_that_of_the_paper() -> None:
    """Algorithm 2 of arXiv:2302.06675."""
    found = trained(recipe(optimizer="lion_8bit"))
    for name, start in matrices().items():
        value, mean = start.detach(), torch.zeros(SHAPES[name])
        for step in range(STEPS):
            grad, rate = gradient(name, step), 0.02 * (1 - step / STEPS)
            value = value - rate * (torch.sign(0.9 * mean + 0.1 * grad) + 0.1 * value)
            mean = 0.99 * mean + 0.01 * grad
        torch.testing.assert_close(found[name], value)


def test_lora_plus_raises_the_rate_of_b_matrices() -> None:
    """As PEFT's `create_loraplus_optimizer` groups them: the same as a run of its own at that rate."""
    plain, fast = trained(recipe()), trained(recipe(learning_rate=0.02 * 16))
    found = trained(recipe(loraplus_lr_ratio=16.0))
    for name in SHAPES:
        torch.testing.assert_close(found[name], (fast if ".b." in name else plain)[name])


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "lion"},
        {"optimizer": "adafactor"},
        {"optimizer": "muon"},
        {"loraplus_lr_ratio": 8.0},
        {"loraplus_lr_ratio": 8.0, "optimizer": "muon"},
        {"neftune_noise_alpha": 5.0},
        {"optimizer": "came_pytorch"},
        {"optimizer": "adopt_adamw"},
        {"optimizer": "schedule_free_adamw"},
        {"optimizer": "schedule_free_sgd"},
        {"optimizer": "schedule_free_radam", "loraplus_lr_ratio": 8.0},
    ],
    ids=str,
)
def test_a_run_that_goes_on_ends_the_same(keys: dict[str, Any], decoder: Decoder, tmp_path: Path) -> None:
    """Bit by bit: each slice is the whole of its work."""
    if (package := PACKAGES.get(recipe(**keys).optimizer_family)) is not None:
        pytest.importorskip(package)
    spec = run_spec(decoder, total_steps=3, save_every=2, **keys)

    def made(events: list[RunEvent], **options: Any) -> TrainingRun:
        batches = batches_of(examples(10))
        return TrainingRun(decoder, spec, batches, [], events.append, write_nothing, whole=True, **options)

    straight = made([])
    drive(straight)
    directory = tmp_path / "snapshot"
    directory.mkdir()
    straight.take_snapshot(2).write(directory)
    resumed = made([], restored=read_snapshot(directory))
    drive(resumed)
    expected = straight._lora.capture()
    assert all(torch.equal(found, expected[name]) for name, found in resumed._lora.capture().items())
    assert straight.step == resumed.step == 3


def test_noise_is_within_its_bound_for_each_sequence_and_drawn_from_the_seed() -> None:
    batch = collate(
        [Example([1] * 4, [False] + [True] * 3), Example([1] * 16, [False] + [True] * 15)], torch.device("cpu")
    )
    hidden = torch.zeros(20, 64)
    noise = noisy(hidden, batch, 5.0, seed=3)
    for part, length in ((slice(0, 4), 4), (slice(4, 20), 16)):
        bound = 5 / math.sqrt(length * 64)
        assert 0.95 * bound < float(noise[part].abs().max()) <= bound
        assert float(noise[part].mean()) == pytest.approx(0, abs=bound / 4)
    assert torch.equal(noise, noisy(hidden, batch, 5.0, seed=3))
    assert not torch.equal(noise, noisy(hidden, batch, 5.0, seed=4))
    assert noisy(hidden, batch, 0.0, seed=3) is hidden


def test_names_of_optimisers() -> None:
    def family(name: str) -> str:
        keys = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}], "optimizer": name}
        return recipe_from(Document(keys), max_lora_rank=64).optimizer_family

    assert family("paged_lion_8bit") == "lion"
    assert family("optimi_adamw") == "adamw"
    assert family("adopt_adamw") == "adopt"
    assert family("schedule_free_sgd") == "schedule_free_sgd"
    keys = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}], "optimizer": "schedule_free_adamw"}
    (note,) = [note for note in recipe_from(Document(keys), max_lora_rank=64).notes if "schedule" in note]
    assert "lr_scheduler constant_with_warmup goes with it, and cosine falls besides" in note
    with pytest.raises(RecipeError, match="adam_beta1: must be above 0 with schedule_free_adamw"):
        recipe_from(Document(keys | {"adam_beta1": 0.0}), max_lora_rank=64)
