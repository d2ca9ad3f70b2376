"""Registry of architectures and their classes: ours, and those of installed plugins."""

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from msgspec import ValidationError, convert, to_builtins

from runtime.model.config import architectures
from runtime.model.families.falcon import Falcon
from runtime.model.families.family import Family
from runtime.model.families.gemma import Gemma2, Gemma3
from runtime.model.families.gpt2 import GPT2
from runtime.model.families.gpt_neox import GPTNeoX
from runtime.model.families.llama import Granite, Llama, Olmo2, SmolLM3
from runtime.model.families.mistral import Ministral, Mistral, Mixtral
from runtime.model.families.phi3 import Phi3
from runtime.model.families.qwen import Qwen2, Qwen2Moe, Qwen3, Qwen3Moe
from runtime.model.families.stablelm import StableLm
from runtime.model.spec import DecoderSpec

GROUP = "eft.models"
"""Entry points: the architecture's name in `config.json` = the class in its package."""

REGISTRY: Mapping[str, type[Family]] = {
    "FalconForCausalLM": Falcon,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": GPTNeoX,
    "Gemma2ForCausalLM": Gemma2,
    "Gemma3ForCausalLM": Gemma3,
    "GraniteForCausalLM": Granite,
    "LlamaForCausalLM": Llama,
    "MinistralForCausalLM": Ministral,
    "MistralForCausalLM": Mistral,
    "MixtralForCausalLM": Mixtral,
    "Olmo2ForCausalLM": Olmo2,
    "Phi3ForCausalLM": Phi3,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen2MoeForCausalLM": Qwen2Moe,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "SmolLM3ForCausalLM": SmolLM3,
    "StableLmForCausalLM": StableLm,
}


def plugins() -> dict[str, EntryPoint]:
    """Architectures of installed packages, not imported yet, by name. Raises `ValueError` when two packages have the
    same one."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise ValueError(f"two plugins bring {entry.name!r}: {found[entry.name].value} and {entry.value}")
        found[entry.name] = entry
    return found


def supported() -> list[str]:
    """The names of all architectures, ours and the plugins'."""
    return sorted({*REGISTRY, *plugins()})


def is_native(config: dict[str, Any]) -> bool:
    """True if there is a class for one of the config's architectures."""
    names = architectures(config)
    return any(name in REGISTRY for name in names) or not plugins().keys().isdisjoint(names)


def find_model(config: dict[str, Any]) -> type[Family]:
    """The class of the first supported architecture of the config. A plugin precedes one of ours of the same name.

    Raises `ValueError` with a list of all supported architectures, or with the reason why a plugin cannot be used.
    """
    names, brought = architectures(config), plugins()
    for name in names:
        if name in brought:
            return _load(brought[name])
        if name in REGISTRY:
            return REGISTRY[name]
    asked = ", ".join(names) or "none named in config.json"
    raise ValueError(f"architecture not supported: {asked}. Supported are: {', '.join(supported())}")


def _load(entry: EntryPoint) -> type[Family]:
    try:
        model = entry.load()
    except Exception as error:  # a plugin's import may raise anything; the message names the plugin
        raise ValueError(
            f"the plugin for {entry.name} ({entry.value}) cannot be used: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(model, type) and issubclass(model, Family)):
        raise ValueError(f"the plugin for {entry.name} ({entry.value}) is no subclass of Family")
    return model


# -- validation ------------------------------------------------------------------------------------
#
# Check of a whole spec, for every architecture: types, and numbers that must go together.
#
# Families read their keys with `runtime.model.config`, whose errors name the key. This check covers relations between
# keys, and architectures of installed packages, which may read in other ways.

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "max_position")
FACTORS = ("norm_eps", "scale", "softcap", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap")


def checked_spec(family: type[Family], config: dict[str, Any]) -> DecoderSpec:
    """The family's spec for the config, checked. Raises `ValueError` for a faulty config or family."""
    try:
        spec = family.spec(config)
    except (ValueError, KeyError):
        raise
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{family.__name__} cannot read it: {type(error).__name__}: {error}") from error
    try:
        spec = convert(to_builtins(spec), DecoderSpec)
    except (ValidationError, TypeError) as error:
        raise ValueError(f"{family.__name__} reads it wrongly: {error}") from None
    for problem in _problems(spec):
        raise ValueError(problem)
    return spec


def _problems(spec: DecoderSpec) -> Iterator[str]:
    for name in SIZES:
        if (size := getattr(spec, name)) < 1:
            yield f"{name} must be above 0, got {size}"
    for name in FACTORS:
        if not math.isfinite(value := getattr(spec, name)):
            yield f"{name} must be a finite number, got {value}"
    if spec.num_heads % spec.num_kv_heads:
        yield (
            f"num_attention_heads must be a multiple of num_key_value_heads (num_kv_heads, {spec.num_kv_heads}), got "
            f"{spec.num_heads}"
        )
    if spec.experts is not None and spec.experts.per_token > spec.experts.count:
        yield (
            f"num_experts_per_tok must be at most num_experts (num_local_experts, {spec.experts.count}), got "
            f"{spec.experts.per_token}"
        )
    if not spec.layers:
        yield "there are no layers"
    for rope in spec.ropes:
        turned = int(spec.head_dim * rope.partial)
        of = f"head_dim {spec.head_dim}, partial_rotary_factor {rope.partial:g}"
        if turned < 2 or turned % 2 or turned > spec.head_dim:
            yield f"the dimensions of a head that rope turns must be an even number above 0, got {turned} ({of})"
        for name in ("short_factor", "long_factor") if rope.rope_type == "longrope" else ():
            if len(divisors := getattr(rope, name)) != turned // 2:
                yield f"rope_parameters.{name} must have {turned // 2} entries ({of}), got {len(divisors)}"
    for index, layer in enumerate(spec.layers):
        if layer.window is not None and layer.window < 1:
            yield f"sliding_window must be above 0, got {layer.window} for layer {index}"
        if layer.rope is not None and not 0 <= layer.rope < max(1, len(spec.ropes)):
            yield f"layer {index} uses rope {layer.rope}, and there are {len(spec.ropes)}"
        if layer.moe and spec.experts is None:
            yield f"layer {index} is a mixture of experts, and there are none"
