"""What a job will take, roughly: memory from the model's shape, time from a rate that was measured elsewhere."""

from collections.abc import Sequence

from msgspec import Struct

from runtime.trainer.recipe import Recipe
from runtime.trainer.shape import ModelShape
from runtime.trainer.targets import Target

_STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}
"""Bytes of optimiser state for each parameter: two moments in 32 or in 8 bits, or none."""
LOSS_CHUNK = 256
"""Tokens whose logits are in memory at once, as float32, with their gradients."""


class Estimate(Struct, frozen=True, kw_only=True):
    """Bytes and seconds, in the right order of magnitude; nothing is allotted by it."""

    parameters: int
    """Trained ones."""
    weight_bytes: int
    """The adapter, in float32."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """What the largest micro-batch keeps for its backward pass."""
    seconds: float | None = None
    """Undisturbed by requests; None where no rate is known."""

    @property
    def memory_bytes(self) -> int:
        """All of it, beside the base model, which is served anyway."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def estimate(
    recipe: Recipe,
    shape: ModelShape,
    targets: Sequence[Target],
    *,
    largest: int,
    tokens: int,
    tokens_per_second: float | None,
) -> Estimate:
    """`largest` is the number of tokens of the largest micro-batch, `tokens` of the whole job."""
    parameters = sum(recipe.lora_r * sum(shape.linears[name]) for _, name in targets)
    return Estimate(
        parameters=parameters,
        weight_bytes=4 * parameters,
        gradient_bytes=4 * parameters,
        optimizer_bytes=_STATE_BYTES[recipe.optimizer_family] * parameters,
        activation_bytes=_activations(recipe, shape, largest),
        seconds=tokens / tokens_per_second if tokens_per_second else None,
    )


def _activations(recipe: Recipe, shape: ModelShape, tokens: int) -> int:
    """A layer keeps its inputs of norms, linears, attention and activation function: about eight of the hidden size
    and three of the inner one a token. With checkpointing, one layer does, and the others only their input."""
    layer = 8 * shape.hidden_size + 3 * shape.intermediate_size
    values = layer + shape.num_layers * shape.hidden_size
    if not recipe.gradient_checkpointing:
        values = shape.num_layers * layer
    logits = 2 * 4 * min(tokens, LOSS_CHUNK) * shape.vocab_size
    return tokens * values * shape.bytes_per_value + logits
