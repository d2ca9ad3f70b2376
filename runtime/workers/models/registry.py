"""Which class serves which architecture: ours, and those of installed plugins."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from runtime.workers.models.falcon import Falcon
from runtime.workers.models.family import Family
from runtime.workers.models.gemma import Gemma2, Gemma3
from runtime.workers.models.gpt2 import GPT2
from runtime.workers.models.gpt_neox import GPTNeoX
from runtime.workers.models.granite import Granite
from runtime.workers.models.llama import Llama
from runtime.workers.models.mistral import Ministral, Mistral
from runtime.workers.models.mixtral import Mixtral
from runtime.workers.models.olmo2 import Olmo2
from runtime.workers.models.phi3 import Phi3
from runtime.workers.models.qwen import Qwen2, Qwen3
from runtime.workers.models.qwen_moe import Qwen2Moe, Qwen3Moe
from runtime.workers.models.smollm3 import SmolLM3
from runtime.workers.models.stablelm import StableLm

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
    """Architectures that installed packages bring, not imported yet. Raises `ValueError` when two packages bring
    the same one."""
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
    """Whether there is a class for one of the config's architectures."""
    known = supported()
    return any(name in known for name in config.get("architectures") or [])


def find_model(config: dict[str, Any]) -> type[Family]:
    """The first of the config's architectures that there is; a plugin goes before one of ours of the same name.

    Raises `ValueError` listing all that there are, or saying why a plugin cannot be used.
    """
    names, brought = config.get("architectures") or [], plugins()
    for name in names:
        if name in brought:
            return _load(brought[name])
        if name in REGISTRY:
            return REGISTRY[name]
    asked = ", ".join(map(str, names)) or "none named in config.json"
    raise ValueError(f"architecture not supported: {asked}. Supported are: {', '.join(supported())}")


def _load(entry: EntryPoint) -> type[Family]:
    try:
        model = entry.load()
    except Exception as error:  # whatever a plugin's import raises is the plugin's fault, and to be named
        raise ValueError(
            f"the plugin for {entry.name} ({entry.value}) cannot be used: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(model, type) and issubclass(model, Family)):
        raise ValueError(f"the plugin for {entry.name} ({entry.value}) is no subclass of Family")
    return model
