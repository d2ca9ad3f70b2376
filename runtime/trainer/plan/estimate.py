"""Rough cost of a job: memory from the model's shape, time from a rate that was measured elsewhere."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from runtime.trainer.plan.served_model import ModelShape, TargetKey
from runtime.trainer.recipe import Recipe

_STATE_BYTES = {
    "adamw": 8, "adamw_8bit": 2, "sgd": 0, "lion": 4, "muon": 4, "adafactor": 1, "adopt": 8, "came": 5,
    "schedule_free_adamw": 12, "schedule_free_radam": 12, "schedule_free_sgd": 8,
}  # fmt: skip
"""Bytes of optimiser state for each parameter: two moments in 32 or in 8 bits, one, or a row and a column; a second
set of weights, and in evaluations a third."""
LOSS_CHUNK = 256
"""Tokens whose logits are in memory at once, as float32, with their gradients."""


class Estimate(Struct, frozen=True, kw_only=True):
    """Bytes and seconds, in the right order of magnitude; nothing is allotted by it."""

    parameters: int
    """Trained parameters."""
    weight_bytes: int
    """The adapter, in float32."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Activations that the largest micro-batch keeps for its backward pass."""
    tokens: int
    """Tokens that the training steps compute in all, and besides them what a pass of a reference or an evaluation takes
    as long as."""
    riding_bytes: int = 0
    """What tokens that ride in steps of requests keep, at the most."""
    seconds: float | None = None
    """Undisturbed by requests; None where no rate is known."""
    basis: Literal["jobs", "trial"] | None = None
    """What the rate was measured by: jobs on this machine, or some steps of this plan."""

    @property
    def memory_bytes(self) -> int:
        """All of it, beside the base model, which is served anyway."""
        state = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return state + self.activation_bytes + self.riding_bytes

    def at(self, tokens_per_second: float, basis: Literal["jobs", "trial"]) -> "Estimate":
        """The estimate with its time."""
        return replace(self, seconds=self.tokens / tokens_per_second, basis=basis)


def estimate(
    recipe: Recipe,
    shape: ModelShape,
    targets: Sequence[TargetKey],
    ranks: Sequence[int],
    *,
    largest: int,
    tokens: int,
    rows: int = 0,
    riding_bytes: int = 0,
) -> Estimate:
    """`ranks` are those of the targets, `rows` is the number of trained rows of embedding and head, `largest` that of
    the tokens of the largest micro-batch, `tokens` that of the whole job; `riding_bytes`: what rides of a job that can
    ride keep."""
    if recipe.adapter is None:
        layer = sum(inputs * outputs for inputs, outputs in shape.linears.values())
        factors = shape.num_layers * layer + shape.vocab_size * shape.hidden_size
    else:
        factors = sum(rank * sum(shape.linears[name]) for rank, (_, name) in zip(ranks, targets, strict=True))
    magnitudes = sum(shape.linears[name][1] for _, name in targets) if recipe.peft_use_dora else 0
    parameters = factors + magnitudes + (rows * shape.hidden_size if recipe.adapter is not None else 0)
    kept = factors if recipe.begins_in_base else 0  # beside them, the first weights
    return Estimate(
        parameters=parameters,
        weight_bytes=4 * (parameters + kept),
        gradient_bytes=4 * parameters,
        optimizer_bytes=_STATE_BYTES[recipe.optimizer_family] * parameters,
        activation_bytes=_activations(recipe, shape, largest),
        tokens=tokens,
        riding_bytes=riding_bytes if _rides(recipe) else 0,
    )


def _rides(recipe: Recipe) -> bool:
    """True if tokens of the job can ride in steps of requests."""
    return not (recipe.adapter is None or recipe.peft_use_dora or recipe.begins_in_base or recipe.neftune_noise_alpha)


def _activations(recipe: Recipe, shape: ModelShape, tokens: int) -> int:
    """A layer keeps its inputs of norms, linears, attention and activation function: about eight of the hidden size
    and three of the inner one a token. With checkpointing, one layer does, and the others only their input."""
    layer = 8 * shape.hidden_size + 3 * shape.intermediate_size
    values = layer + shape.num_layers * shape.hidden_size
    if not recipe.gradient_checkpointing:
        values = shape.num_layers * layer
    logits = 2 * 4 * min(tokens, LOSS_CHUNK) * shape.vocab_size
    return tokens * values * shape.bytes_per_value + logits
