"""Probe of a transformers model: run it on a few tokens to find its structure, and to check that we can serve it.

Two short sequences in one flat batch must give the same as each alone with transformers' own attention. A model fails
if it mixes tokens elsewhere (state, convolutions), counts positions by itself, or has an attention that is more than
scores, softmax and values.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.reference import ReferenceOps
from runtime.model.fallback.linears import NAME, Stand, attending, replaced
from runtime.model.layers import WeightError

LENGTHS = (5, 7)
ROUNDING = 0.05
"""Largest distance of equal hidden states, as a share of their length. bfloat16 stays below it; a missing operation
goes far above."""
SINKS = ("s_aux", "sinks")
"""Attributes of modules for learned keys, which belong to no token."""
SMALL = 4
"""Window for the probe that finds the layers with a window, in tokens."""


@dataclass(frozen=True)
class AttentionFacts:
    """One layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    """Head size of queries and keys."""
    value_dim: int
    scale: float
    softcap: float
    window: int | None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Paths of a model's parts."""

    base: str
    """Attribute that holds the model without its head."""
    layers: str
    """Path of the layers in the whole model, such as `model.layers`."""
    attention: tuple[AttentionFacts, ...]
    gives_tuple: bool
    """True if a layer returns a tuple, hidden states first."""

    @property
    def layers_in_base(self) -> str:
        return self.layers.removeprefix(f"{self.base}.")


def examine(model: Any) -> Anatomy:
    """Probe a model. Raises `WeightError` with the reason why it cannot be served."""
    ids = _some_tokens(model)
    calls: list[tuple[nn.Module, AttentionFacts]] = []
    sinks: set[str] = set()

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Mapping[str, Any]) -> Tensor:
        one = facts(q, k, v, scale, options)
        calls.append((module, one))
        sinks.update(name for name in SINKS if options.get(name) is not None)
        return packed(q, k, v, list(LENGTHS), one)

    base = model.base_model_prefix
    if not isinstance(getattr(model, base, None), nn.Module):
        raise _cannot("its head and its base model are one")
    inner = getattr(model, base)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in LENGTHS])
    with torch.inference_mode():
        with attending(attend):
            together = run_base(inner, ids, positions)
        with _eager(model):
            parts = torch.split(ids, list(LENGTHS))
            alone = torch.cat([run_base(inner, part, torch.arange(len(part))) for part in parts])
    layers = _layers_path(model, [module for module, _ in calls])
    if sinks:
        raise _cannot("its attention has sinks")
    if not alike(together, alone):
        raise _cannot("it computes more from other tokens than attention over keys and values does")
    stack = model.get_submodule(layers)
    outputs: list[bool] = []
    hook = stack[0].register_forward_hook(lambda module, args, out: outputs.append(isinstance(out, tuple)))
    try:
        with torch.inference_mode(), attending(attend):
            run_base(inner, ids, positions)
    finally:
        hook.remove()
    count = len(stack)
    anatomy = Anatomy(base, layers, tuple(one for _, one in calls[:count]), outputs[0])
    return _with_windows(model, anatomy)


def facts(q: Tensor, k: Tensor, v: Tensor, scale: float, options: Mapping[str, Any]) -> AttentionFacts:
    """Facts of one call of the attention function."""
    return AttentionFacts(
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        scale,
        float(options.get("softcap") or 0.0),
        options.get("sliding_window"),
    )


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], one: AttentionFacts) -> Tensor:
    """Attention without a cache, by the reference ops; `v` may be narrower than `q`."""
    wide = torch.nn.functional.pad(v, (0, one.head_dim - one.value_dim))
    out = ReferenceOps().packed_attention(q, k, wide, lengths, one.scale, window=one.window, softcap=one.softcap)
    return out[..., : one.value_dim]


def run_base(base: nn.Module, token_ids: Tensor, positions: Tensor) -> Tensor:
    """token_ids, positions [T] → the hidden states that the head gets, [T, hidden]."""
    out = base(
        input_ids=token_ids.unsqueeze(0), position_ids=positions.to(token_ids.device).unsqueeze(0), use_cache=False
    )
    hidden: Tensor = out[0][0]
    return hidden


def alike(a: Tensor, b: Tensor) -> bool:
    """True if two tensors [T, n] are equal but for rounding."""
    if a.shape != b.shape:
        return False
    apart, lengths = (a.float() - b.float()).norm(dim=-1), b.float().norm(dim=-1)
    return bool((apart <= ROUNDING * lengths + 1e-3 * lengths.max()).all())


def stands(model: Any, anatomy: Anatomy) -> tuple[nn.Module, list[Stand]]:
    """The base model with stand-ins for its layers, and the stand-ins."""
    base, layers = getattr(model, anatomy.base), model.get_submodule(anatomy.layers)
    instead = [Stand(layer) for layer in layers]
    for one in instead:
        one.tuple = anatomy.gives_tuple
    return replaced(base, anatomy.layers_in_base, nn.ModuleList(instead)), instead


def _some_tokens(model: Any) -> Tensor:
    count = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, count, (sum(LENGTHS),), generator=generator).to(model.device)


def _layers_path(model: Any, modules: list[nn.Module]) -> str:
    """Common prefix of the attention modules' names before the layer's number."""
    names = {module: name for name, module in model.named_modules()}
    found = [names[module].split(".") for module in modules]
    numbered = [(".".join(parts[:place]), parts[place]) for parts in found if (place := _number(parts)) < len(parts)]
    paths = {path for path, _ in numbered}
    path = min(paths, default="")
    count = len(model.get_submodule(path)) if path else 0
    if len(paths) != 1 or [int(number) for _, number in numbered] != list(range(count)):
        raise _cannot("not every layer of it calls transformers' attention interface exactly once, in order")
    return path


def _number(parts: list[str]) -> int:
    """Index of a layer's number in a name."""
    return next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))


def _with_windows(model: Any, anatomy: Anatomy) -> Anatomy:
    """Add windows that show only in masks: with a small window set, a layer that has one gets a mask that is not
    causal. Raises `WeightError` where the setting is no window of tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    frame, instead = stands(model, anatomy)
    ids = _some_tokens(model)
    for key in ("sliding_window", "attention_chunk_size"):
        before = getattr(config, key, None)
        if before is None:
            continue
        setattr(config, key, SMALL)
        try:
            with torch.inference_mode(), _eager(model):
                run_base(frame, ids, torch.arange(len(ids)))
        finally:
            setattr(config, key, before)
        seen = [_mask(one) for one in instead]
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()
        windowed = causal & ~causal.tril(-SMALL)
        have = [mask is not None and not torch.equal(mask, causal) for mask in seen]
        windows = [mask is not None and torch.equal(mask, windowed) for mask in seen]
        if any(has and not (key == "sliding_window" and is_one) for has, is_one in zip(have, windows, strict=True)):
            raise _cannot(f"its {key} means something else than a window of tokens")
        attention = [
            replace(one, window=window) if has else one for one, has in zip(anatomy.attention, have, strict=True)
        ]
        anatomy = replace(anatomy, attention=tuple(attention))
    return anatomy


def _mask(stand: Stand) -> Tensor | None:
    """The mask [T, T] of a layer's call, True where a token is seen."""
    assert stand.call is not None
    for value in (*stand.call.args, *stand.call.options.values()):
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == value.shape[-2] == sum(LENGTHS):
            return value[0, 0] if value.dtype == torch.bool else value[0, 0] == 0
    return None


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Context with transformers' own attention."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def _cannot(reason: str) -> WeightError:
    return WeightError(f"transformers' attention interface cannot serve this model: {reason}")
