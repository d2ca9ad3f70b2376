"""`eft recipe`: check a recipe and show its plan, start a new one, and print what keys there are."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from runtime.cli.errors import CommandError, UsageError
from runtime.cli.flags import Config, Json, read_settings, with_settings
from runtime.cli.recipe_plan import print_plan
from runtime.errors import RequestError
from settings.load import Loaded

if TYPE_CHECKING:
    from runtime.trainer.recipe import Recipe
    from runtime.trainer.shape import ModelShape
    from runtime.trainer.summary import PlanSummary
    from runtime.workers.loading import Checkpoint
    from settings.schema import Settings


class RecipeRefused(UsageError):
    """The recipe or its data cannot be used."""


@with_settings("model", "adapters", "trainer")
def check(
    file: Annotated[Path, Parameter(help="The recipe.")],
    model: Annotated[
        str | None, Parameter(help="Model to train on, as for `eft serve`; default: that of the settings.")
    ] = None,
    *,
    keys_only: Annotated[
        bool, Parameter(help="Check the keys alone: load no model, read no data.", negative="", show_default=False)
    ] = False,
    json: Json = False,
    config: Config = None,
    **flags: Any,
) -> int:
    """Print the plan of a recipe, or all that is wrong with it."""
    loaded = read_settings(flags, config, model=model)
    try:
        recipe = _load(file, loaded)
        summary = None if keys_only else _plan(recipe, file, loaded)
    except RequestError as error:
        if not json:
            raise RecipeRefused(f"{file}: {error.message}") from error
        print(msgspec.json.format(msgspec.json.encode(_as_error(error))).decode())
        return RecipeRefused.exit_code
    if json:
        print(msgspec.json.format(msgspec.json.encode(summary or {"notes": recipe.notes})).decode())
    elif summary is None:
        print("\n".join([f"{file}: the keys are fine.", *recipe.notes]))
    else:
        print_plan(summary)
    return 0


def schema() -> None:
    """Print the JSON schema of recipes."""
    from runtime.trainer.recipe.reference import json_schema

    print(msgspec.json.format(msgspec.json.encode(json_schema())).decode())


def docs() -> None:
    """Print the reference page of recipes, in Markdown."""
    from runtime.trainer.recipe.reference import reference

    print(reference(), end="")


def new(*, output: Annotated[Path | None, Parameter(help="File to write; default: print it.")] = None) -> None:
    """Print a commented recipe to start from, or write it to a file that is not there yet."""
    text = (resources.files("settings") / "recipes" / "starter.yaml").read_text(encoding="utf-8")
    if output is None:
        print(text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{output} is there already; it is left as it is") from None
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error


def _load(file: Path, loaded: Loaded) -> "Recipe":
    from runtime.trainer.recipe import load_recipe

    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    return load_recipe(data, max_lora_rank=loaded.settings.adapters.max_lora_rank)


def _plan(recipe: "Recipe", file: Path, loaded: Loaded) -> "PlanSummary":
    """Needs the model's files, and none of its weights. Whoever calls may read what lies beside the recipe, in
    the working directory, and under the data roots of the settings."""
    from runtime.trainer.data.files import DataFiles
    from runtime.trainer.plan import prepare
    from runtime.trainer.summary import summarize
    from runtime.workers.loading import open_checkpoint

    settings = loaded.settings
    checkpoint = open_checkpoint(
        settings.model.model, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    longest, shape = _shape(checkpoint, settings)
    names = [settings.model.served_model_name, checkpoint.name, settings.model.model]
    plan = prepare(
        recipe,
        checkpoint.tokenizer,
        DataFiles(roots=[file.resolve().parent, Path.cwd(), *map(Path, settings.trainer.data_roots)]),
        model_names=tuple(name for name in names if name),
        max_len=settings.model.max_model_len or longest,
        shape=shape,
    )
    return summarize(plan)


def _shape(checkpoint: "Checkpoint", settings: "Settings") -> tuple[int, "ModelShape"]:
    """The model's longest sequence, and its shape. One that is served through transformers has to be loaded for it."""
    from runtime.trainer.shape import shape_of, shape_of_base
    from runtime.workers.models import find_model, is_native

    size = 2 if settings.model.dtype == "bfloat16" else 4
    if is_native(checkpoint.config):
        architecture = find_model(checkpoint.config)
        spec = architecture.spec(checkpoint.config)
        shape = shape_of(spec, architecture.LORA_TARGETS, bytes_per_value=size, prefix=architecture.layers())
        return spec.max_position, shape
    from runtime import logs
    from runtime.model_loading import base_of, load_model

    logs.configure(settings.observability)  # to stderr: what is printed is the plan
    model = load_model(checkpoint, settings.model)
    return model.max_len, shape_of_base(model.spec, base_of(model, checkpoint, checkpoint.name), bytes_per_value=size)


def _as_error(error: RequestError) -> dict[str, Any]:
    from runtime.trainer.recipe import RecipeError

    problems = error.problems if isinstance(error, RecipeError) else ()
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
        "problems": problems,
    }
