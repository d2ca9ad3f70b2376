"""One forward for every architecture: it is its parts in turn, and asks for the ops that are fused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.reference import ReferenceOps
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from runtime.model.decoder_layer import LayerContext
from runtime.model.lora import Adaptation
from settings.schema import ModelSettings
from tests.kernels.rows import random
from tests.parity.families import CASES, make_model
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

LENGTHS = [5, 8]


class RecordedOps(ReferenceOps):
    """`calls` are the ops that were called from outside, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._inside = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found) or self._inside:
            return found

        def op(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            self._inside = True
            try:
                return found(*args, **options)
            finally:
                self._inside = False

        return op


class Halved(Adaptation):
    """Half of every linear's input is added to its output, as far as both reach. Records the linears."""

    def __init__(self) -> None:
        self.linears: list[str] = []

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        self.linears.append(linear)
        width = min(x.shape[1], y.shape[1])
        y[:, :width] += x[:, :width] / 2
        return y


def load(tmp_path: Path, family: str) -> Decoder:
    kind, options = CASES[family]
    make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(tmp_path)
    return load_decoder(open_checkpoint(str(tmp_path)), ModelSettings(model=str(tmp_path), kernels="reference"))


def inputs(decoder: Decoder, adaptation: Adaptation | None) -> tuple[RecordedOps, Tensor, LayerContext]:
    ops = RecordedOps()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    hidden = random(len(positions), decoder.spec.hidden_size, seed=1)
    # Attention has ops of its own, so those recorded are the layer's.
    attention = PackedAttention(ReferenceOps(), LENGTHS, decoder.spec)
    return ops, hidden, LayerContext(attention, *decoder.angles(positions), adaptation)


SWIGLU = ["norm_linear", "linear_add", "norm_swiglu", "linear_add"]
UNFUSED = ["rms_norm", "linear", "linear_add", "rms_norm", "linear", "silu_mul", "linear_add"]


@pytest.mark.parametrize(
    ("family", "adapted", "expected"),
    [
        ("llama", False, SWIGLU),
        ("phi3", False, SWIGLU),
        ("qwen3", False, [*SWIGLU[:1], "rms_norm", "rms_norm", *SWIGLU[1:]]),
        ("granite, plain", False, SWIGLU),
        ("llama", True, UNFUSED),
        ("gpt2", False, ["layer_norm", "linear", "linear_add", "layer_norm", "linear", "gelu", "linear_add"]),
        ("falcon 7b", False, ["layer_norm", "linear", "linear_add", "layer_norm", "linear", "gelu", "linear_add"]),
        ("mixtral", False, ["norm_linear", "linear_add", "rms_norm", "linear", "moe"]),
    ],
)
def test_ops_of_a_layer(tmp_path: Path, family: str, adapted: bool, expected: list[str]) -> None:
    """A norm and the next linear are one op where no adapter stands between them, and so are a linear and its sum with
    the residual stream, with adapters too."""
    decoder = load(tmp_path, family)
    ops, hidden, context = inputs(decoder, Halved() if adapted else None)
    decoder.layers[1].forward(ops, hidden, context)
    assert ops.calls == expected


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "falcon 7b", "gpt-neox", "olmo2", "mixtral"])
def test_forward_is_its_parts(tmp_path: Path, family: str, adapted: bool) -> None:
    """The parts that training runs as stages, in slices of tokens where they allow it."""
    decoder = load(tmp_path, family)
    adaptation = Halved() if adapted else None
    ops, hidden, context = inputs(decoder, adaptation)
    layer, before = decoder.layers[1], hidden.clone()
    found = layer.forward(ops, hidden, context)
    called = [] if adaptation is None else adaptation.linears.copy()
    q, k, v = layer.project(ops, hidden, adaptation)
    mixed = context.attention(layer.index, q, k, v, context.cos, context.sin)
    parts = []
    for rows in (slice(0, 6), slice(6, 13)):
        residual = layer.mix(ops, hidden[rows], mixed[rows], adaptation)
        inner = layer.expand(ops, hidden[rows] if decoder.spec.parallel else residual, adaptation)
        parts.append(layer.contract(ops, residual, inner, adaptation))
    torch.testing.assert_close(torch.cat(parts), found)
    assert torch.equal(hidden, before)
    assert called == ([name for name in ("qkv", "out", "gate_up", "down") if name in layer.linears] if adapted else [])


def test_an_adapted_sum_is_the_sum_of_an_adapted_output(tmp_path: Path) -> None:
    """An adapter changes the residual stream, after the linear's output is added: as if it changed the output."""
    decoder = load(tmp_path, "llama")
    out, adaptation = decoder.layers[0].linears["out"], Halved()
    x, residual = random(7, 64, seed=2), random(7, 64, seed=3)
    adapt = adaptation.at(0, "out")
    found = out.residual_add(ReferenceOps(), residual, x, adapt)
    torch.testing.assert_close(found, residual + out(ReferenceOps(), x, adapt))
    assert not torch.isclose(found, out.residual_add(ReferenceOps(), residual, x)).all(1).any()
