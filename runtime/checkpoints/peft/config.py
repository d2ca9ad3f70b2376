"""`adapter_config.json`: the fields that we use, and the ones that we refuse because they change the meaning of the
weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from runtime.errors import InvalidRequest
from runtime.model.lora import LoraShape
from runtime.support.module_patterns import MAX_KEYS, ModulePattern, PatternInvalid
from runtime.support.peft_files import CONFIG

# -- errors ----------------------------------------------------------------------------------------
#
# The error of reading an adapter.


class AdapterInvalid(InvalidRequest):
    """An adapter's files are broken, unsafe, or do not fit the base model. The message names files, never folders: it
    goes to the sender of the adapter."""

    default_code = "invalid_adapter"


_UNIMPORTANT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "fan_in_fan_out", "qalora_group_size", "ensure_weight_tying", "runtime_config", "exclude_modules", "layers_pattern",
})  # fmt: skip
"""Ignored keys: about training, files, or the base's storage of its weights (`fan_in_fan_out`), not about the effect of
these weights. Every other unknown key that is set is refused: ignoring a feature of a later PEFT would give wrong
answers."""

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights unchanged. With others (PiSSA, OLoRA, CorDA, LoftQ) the adapter is for
a changed base."""

_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})
_NULLABLE = frozenset({"rank_pattern", "alpha_pattern", "target_modules", "layers_to_transform"})
"""Keys for which null counts as absent."""
MAX_ALPHA = 1e6
"""Largest alpha: with more, finite weights give infinite outputs."""
SHOWN_CHARACTERS = 200


class AdapterConfig(Struct, frozen=True, kw_only=True):
    """The fields of PEFT's `LoraConfig` that determine the effect of the weights."""

    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @property
    def shape(self) -> LoraShape:
        return LoraShape(self.r, self.lora_alpha, self.use_rslora, self.rank_pattern, self.alpha_pattern, self.use_dora)


def parse_config(data: bytes) -> AdapterConfig:
    """The configuration in `data`, JSON. Raises `AdapterInvalid` for malformed or unsupported values."""
    try:
        raw = msgspec.json.decode(data, type=dict[str, Any])
        given = {key: value for key, value in raw.items() if value is not None or key not in _NULLABLE}
        config = msgspec.convert(given, AdapterConfig)
    except RecursionError:
        raise AdapterInvalid(f"{CONFIG} is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdapterInvalid(f"{CONFIG} cannot be read: {_brief(str(error))}.") from None
    _refuse(raw, config)
    try:
        ModulePattern("rank_pattern", config.rank_pattern)
        ModulePattern("alpha_pattern", config.alpha_pattern)
    except PatternInvalid as error:
        raise AdapterInvalid(f"{CONFIG}: {error}") from None
    for name, rank in (("r", config.r), *_entries("rank_pattern", config.rank_pattern)):
        if rank < 1:
            raise AdapterInvalid(f"{CONFIG}: {name} must be at least 1, got {_brief(rank)}.")
    for name, alpha in (("lora_alpha", config.lora_alpha), *_entries("alpha_pattern", config.alpha_pattern)):
        if not 0 < alpha <= MAX_ALPHA:
            raise AdapterInvalid(f"{CONFIG}: {name} must be above 0 and at most {MAX_ALPHA:g}, got {_brief(alpha)}.")
    if isinstance(config.target_modules, list) and len(config.target_modules) > MAX_KEYS:
        raise AdapterInvalid(
            f"{CONFIG}: target_modules must have at most {MAX_KEYS} entries, got {len(config.target_modules)}."
        )
    return config


def _entries(name: str, pattern: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    return ((f"{name}[{_brief(key)}]", value) for key, value in pattern.items())


def _brief(value: object) -> str:
    """A value of the file, cut to the length of a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _refuse(raw: dict[str, Any], config: AdapterConfig) -> None:
    if config.peft_type != "LORA":
        raise AdapterInvalid(f"{CONFIG}: peft_type is {_brief(repr(config.peft_type))}; only LORA is supported.")
    if config.bias != "none":
        raise AdapterInvalid(
            f"{CONFIG}: bias is {_brief(repr(config.bias))}; adapters may not change biases: it must be 'none'."
        )
    if config.init_lora_weights not in _PLAIN_INITS:
        raise AdapterInvalid(
            f"{CONFIG}: init_lora_weights is {_brief(repr(config.init_lora_weights))}, which changes the base model's "
            "weights. "
            "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first."
        )
    known = _UNIMPORTANT.union(AdapterConfig.__struct_fields__)
    wrong = sorted(name for name, value in raw.items() if name not in known and value not in _NEUTRAL)
    if wrong:
        raise AdapterInvalid(f"{CONFIG}: {_brief(wrong[0])} is set, and is not supported.")
