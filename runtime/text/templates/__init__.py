"""Chat templates by name, for models that bring none or another one: `NAME.jinja` beside this file.

Each writes what the models of its name were trained on; `tests/text/test_builtin_templates.py` holds them to that.
"""

from importlib.resources import files

BUILTIN_TEMPLATES = (
    "alpaca",
    "aya",
    "chatml",
    "cohere",
    "command_a",
    "deepseek_v2",
    "deepseek_v3",
    "exaone",
    "exaone4",
    "falcon_h1",
    "gemma",
    "gemma4",
    "jamba",
    "llama2",
    "llama3",
    "llama4",
    "metharme",
    "mistral",
    "mistral_v1",
    "mistral_v3_tekken",
    "mistral_v7_tekken",
    "phi3",
    "phi_4",
    "qwen2.5",
    "qwen3",
    "vicuna",
    "zephyr",
)

ALIASES = {
    "gemma3": "gemma",
    "gemma3n": "gemma",
    "mistral_v2v3": "mistral",
    "nemotron_h": "chatml",
    "phi_3": "phi3",
    "phi_35": "phi3",
    "qwen_25": "qwen2.5",
}
"""Axolotl's names of templates → ours of one that writes the same."""


def builtin_template(name: str) -> str | None:
    """The source of the built-in chat template of this name, or of an alias; None where there is none."""
    name = ALIASES.get(name, name)
    if name not in BUILTIN_TEMPLATES:
        return None
    return files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
