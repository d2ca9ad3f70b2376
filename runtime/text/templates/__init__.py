"""Chat templates by name, for models that bring none or another one: `NAME.jinja` beside this file.

Each writes what the models of its name were trained on; `tests/text/test_builtin_templates.py` holds them to that.
"""

from importlib.resources import files

BUILTIN_TEMPLATES = (
    "alpaca",
    "chatml",
    "gemma",
    "llama2",
    "llama3",
    "mistral",
    "phi3",
    "qwen2.5",
    "vicuna",
    "zephyr",
)


def builtin_template(name: str) -> str | None:
    """The source of the built-in chat template of this name; None where there is none."""
    if name not in BUILTIN_TEMPLATES:
        return None
    return files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
