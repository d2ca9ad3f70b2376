"""A decoder's architecture as data. Each architecture's file fills it in."""

from dataclasses import dataclass
from typing import Literal

from kernels.stack import PLACES
from runtime.model.rope import RopeSpec

LINEARS = PLACES
"""A layer's linears that adapters may change; each may be fused of parts (`Linear.parts`)."""


@dataclass(frozen=True)
class LayerSpec:
    """The properties in which the layers of a model differ."""

    window: int | None = None
    """Number of tokens that a token attends to, itself included; None: all tokens up to it."""
    rope: int | None = 0
    """Index in `DecoderSpec.ropes` of the rope of queries and keys; None: no rope."""
    moe: bool = False
    """Its MLP is a mixture of experts, `DecoderSpec.experts`, and not a dense one."""


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts: a router picks some small gated MLPs for every token."""

    count: int
    per_token: int
    intermediate_size: int
    """Intermediate size of one expert."""
    normalise: bool
    """The shares of the chosen experts add up to 1."""
    shared_size: int = 0
    """Intermediate size of a shared expert for every token, behind a gate of its own; 0: none."""


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. The defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence that the checkpoint was made for, in tokens."""
    norm_eps: float
    tied: bool
    """The logits use the embedding's weight."""
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    """The tables of angles that layers choose from; all turn the same number of dimensions."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qkv: Literal["parts", "fused", "grouped"] = "parts"
    """The checkpoint's layout of the query, key and value projections: as three tensors; as one, all rows of q, then of
    k, then of v; or as one, by key/value head: the rows of its query heads, then its k, then its v."""
    qk_norm: Literal["none", "head", "projection", "per_head"] = "none"
    """A norm of queries and keys before rope: over each head with one weight for all heads; over the whole
    projection; or over each head with a weight for every head."""
    attention_scale: float | None = None
    """Factor of attention scores; None: head_dim to the power of -1/2."""
    softcap: float = 0.0
    """Attention scores are squashed to between this and its negative by tanh; 0: they are not."""

    gated: bool = True
    """The MLP's inner part is act(gate) * up, and not act(up)."""
    gate_up_fused: bool = False
    """The checkpoint stores gate and up as one tensor, gate first."""
    activation: str = "silu"
    """Name of the activation in a Hugging Face config; see `mlp.ACTIVATIONS`."""
    experts: ExpertsSpec | None = None
    """The mixture in the layers that are `LayerSpec.moe`."""

    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    pre_norm: bool = True
    """The input of attention and of the MLP is the normed residual stream."""
    post_norm: bool = False
    """The outputs of attention and MLP are normed before they are added to the residual stream."""
    parallel: bool = False
    """Attention and MLP both get the layer's input; the MLP does not get attention's output."""
    shared_norm: bool = False
    """Attention and MLP have the same input: one norm for both. Only in parallel layers."""

    learned_positions: bool = False
    """A learned embedding of its position is added to every token's."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor of the outputs of attention and MLP before they are added to the residual stream."""
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    """Logits are squashed to between this and its negative by tanh; 0: they are not."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def window(self) -> int | None:
        """Largest number of tokens that any layer attends to, the token itself included; None: some layer attends to
        all."""
        windows = [layer.window for layer in self.layers]
        return None if None in windows else max(window for window in windows if window is not None)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(kv_heads, head_dim) of every layer in the cache."""
        return ((self.num_kv_heads, self.head_dim),) * self.num_layers

    @property
    def scale(self) -> float:
        """Factor of attention scores."""
        return float(self.head_dim**-0.5) if self.attention_scale is None else self.attention_scale

    @property
    def sizes(self) -> str:
        """The configuration's numbers that determine the shapes of weights, for messages."""
        return (
            f" (vocab_size {self.vocab_size}, hidden_size {self.hidden_size}, intermediate_size "
            f"{self.intermediate_size}, {self.num_heads} heads, {self.num_kv_heads} key/value heads, head_dim "
            f"{self.head_dim})"
        )

    @property
    def max_context(self) -> int:
        """Longest supported context, in tokens: some rope scalings reach past `max_position`."""
        return max([self.max_position, *(rope.reach for rope in self.ropes)])
