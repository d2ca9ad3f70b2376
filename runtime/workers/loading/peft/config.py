"""`adapter_config.json`: what of it we act on, and what we refuse because it changes what the weights mean."""

import re
from typing import Any

import msgspec
from msgspec import Struct, field

from runtime.workers.loading.peft.errors import AdapterInvalid
from runtime.workers.loading.peft.names import CONFIG
from runtime.workers.lora import LoraShape

_UNIMPORTANT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "fan_in_fan_out", "qalora_group_size", "ensure_weight_tying", "runtime_config", "exclude_modules", "layers_pattern",
})  # fmt: skip
"""About training, files, or how the base stores its weights (`fan_in_fan_out`), not about what these weights do. What
else is set and not ours is refused: a feature of a later PEFT that was ignored would give wrong answers."""

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that left the base's weights alone. With others (PiSSA, OLoRA, CorDA, LoftQ) the adapter is for a
changed base."""

_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})
_QUANTIFIED_GROUP = re.compile(r"\)[*+?{]")
_MAX_QUANTIFIERS = 3


class AdapterConfig(Struct, frozen=True, kw_only=True):
    """The fields of PEFT's `LoraConfig` that say what the weights do."""

    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True

    @property
    def shape(self) -> LoraShape:
        return LoraShape(self.r, self.lora_alpha, self.use_rslora, self.rank_pattern, self.alpha_pattern)


def parse_config(data: bytes) -> AdapterConfig:
    """The configuration in `data`. Raises `AdapterInvalid` for what is malformed or not supported."""
    try:
        raw = msgspec.json.decode(data, type=dict[str, Any])
        config = msgspec.convert(raw, AdapterConfig)
    except RecursionError:
        raise AdapterInvalid(f"{CONFIG} is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdapterInvalid(f"{CONFIG} cannot be read: {error}.") from None
    _refuse(raw, config)
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            _check_pattern(name, key)
    if not 0 < config.lora_alpha < float("inf") or any(not 0 < a < float("inf") for a in config.alpha_pattern.values()):
        raise AdapterInvalid(f"{CONFIG}: lora_alpha and the values of alpha_pattern must be above 0 and finite.")
    if config.r < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
        raise AdapterInvalid(f"{CONFIG}: r and the values of rank_pattern must be at least 1.")
    return config


def lookup(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is the end of `module`, or a regular expression for it, as PEFT has it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _refuse(raw: dict[str, Any], config: AdapterConfig) -> None:
    if config.peft_type != "LORA":
        raise AdapterInvalid(f"{CONFIG}: peft_type is {config.peft_type!r}; only LORA is supported.")
    if raw.get("use_dora"):
        raise AdapterInvalid(f"{CONFIG}: use_dora (DoRA) is not supported; only plain LoRA is.")
    if config.bias != "none":
        raise AdapterInvalid(f"{CONFIG}: bias is {config.bias!r}; adapters may not change biases: it must be 'none'.")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise AdapterInvalid(
            f"{CONFIG}: init_lora_weights is {config.init_lora_weights!r}, which changes the base model's weights. "
            "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first."
        )
    known = _UNIMPORTANT.union(AdapterConfig.__struct_fields__)
    wrong = sorted(name for name, value in raw.items() if name not in known and value not in _NEUTRAL)
    if wrong:
        raise AdapterInvalid(f"{CONFIG}: {wrong[0]} is set, and is not supported.")


def _check_pattern(name: str, key: str) -> None:
    """Raise for an expression that could take for ever: a repeated group, or many repetitions."""
    try:
        re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterInvalid(f"{CONFIG}: {name} has the key {key[:100]!r}, no regular expression: {error}.") from None
    if len(key) > 200 or _QUANTIFIED_GROUP.search(key) or sum(map(key.count, "*+?{")) > _MAX_QUANTIFIERS:
        raise AdapterInvalid(
            f"{CONFIG}: {name} has the key {key[:100]!r}, too complex an expression: at most 200 characters, "
            f"{_MAX_QUANTIFIERS} repetitions, and no repeated group."
        )
