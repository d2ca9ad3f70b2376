"""`eft recipe`: check a recipe and show its plan, start a new one, and print the reference of its keys."""

import asyncio
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import yaml
from cyclopts import Parameter

from runtime.cli.client import DEFAULT_URL, AdminKey, ServerRefusal, admin_client, answers
from runtime.cli.flags import ConfigFile, Json, read_settings, with_settings
from runtime.cli.output import CommandError, UsageError
from runtime.cli.recipe_files import RecipeFiles, read_recipe
from runtime.cli.recipe_plan import print_job_plan
from runtime.cli.train import submit
from runtime.errors import RequestError
from settings.load import Loaded

if TYPE_CHECKING:
    from runtime.checkpoints import Checkpoint
    from runtime.trainer.plan.served_model import ModelShape
    from runtime.trainer.recipe import Recipe
    from settings.schema import Settings


class RecipeRefused(UsageError):
    """The recipe or its data cannot be used."""


@with_settings("model", "adapters", "trainer")
def check(
    file: Annotated[Path, Parameter(help="The recipe.")],
    /,
    model: Annotated[
        str | None,
        Parameter(help="Check here, without a server: the model to train on, as for `eft serve`."),
    ] = None,
    *,
    url: Annotated[
        str | None, Parameter(help=f"Server that checks it; default: {DEFAULT_URL} if one answers there.")
    ] = None,
    admin_key: AdminKey = None,
    keys_only: Annotated[
        bool, Parameter(help="Check the keys alone: load no model, read no data.", negative="", show_default=False)
    ] = False,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Print the plan of a recipe, or all that is wrong with it. By a server that runs, since it knows the model that it
    serves; else by what is read here."""
    here = keys_only or model is not None or config is not None or any(value is not None for value in flags.values())
    if url is not None and here:
        raise UsageError("--url is for a check by a server, which has a model and settings of its own")
    files = read_recipe(file)
    try:
        plan = None if here else _by_server(files, url, admin_key)
        if plan is None:
            loaded = read_settings(flags, config, model=model)
            if keys_only:
                return _check_keys(file, loaded, json=json)
            plan = _plan(_load(file, loaded), files, file, loaded)
    except RequestError as error:
        message = files.explain(error.message)
        if not json:
            raise RecipeRefused(f"{file}: {message}") from error
        print(msgspec.json.format(msgspec.json.encode(_as_error(error))).decode())
        return RecipeRefused.exit_code
    except ServerRefusal as error:
        if not error.names_a_field:
            raise
        if not json:
            raise RecipeRefused(f"{file}: {files.explain(error.message)}") from error
        print(msgspec.json.format(msgspec.json.encode({"error": error.detail, "problems": ()})).decode())
        return RecipeRefused.exit_code
    for notice in files.notices:
        print(f"eft: {notice}", file=sys.stderr)
    print_job_plan(plan, json=json)
    return 0


def schema() -> None:
    """Print the JSON schema of recipes."""
    from runtime.trainer.recipe.reference import json_schema

    print(msgspec.json.format(msgspec.json.encode(json_schema())).decode())


def explain(key: Annotated[str, Parameter(help="The key; datasets.KEY for one of an entry of datasets.")], /) -> None:
    """Print what a key does here: its type and default, why it makes no difference, or what to do instead."""
    from runtime.trainer.recipe.verdicts import explain as explanation
    from runtime.trainer.recipe.verdicts import nearest_key

    text = explanation(key)
    if text is None:
        near = nearest_key(key)
        raise UsageError(f"{key[:64]} is no key of a recipe" + (f"; did you mean {near}?" if near else ""))
    print(text)


def convert(
    file: Annotated[Path, Parameter(help="LLaMA-Factory's YAML, or the JSON of an OpenAI fine-tuning job.")],
    /,
    *,
    output: Annotated[Path | None, Parameter(help="File to write; default: print it.")] = None,
) -> None:
    """Print another trainer's job as a recipe, or write it to a file that is not there yet. What has no counterpart
    stands in comments at its beginning."""
    from runtime.trainer.recipe.convert import convert as converted
    from runtime.trainer.recipe.document import read_document

    try:
        values = read_document(_bytes(file)).values
        found = converted(values, _dataset_info(values, file.parent))
    except RequestError as error:
        raise RecipeRefused(f"{file}: {error.message}") from error
    head = [f"# From {file.name}.", *(f"# {note}" for note in found.notes)]
    _write("\n".join(head) + "\n" + yaml.safe_dump(found.values, sort_keys=False, allow_unicode=True), output)


def _dataset_info(values: dict[str, Any], beside: Path) -> dict[str, Any]:
    """LLaMA-Factory's descriptions of data sets, where they are at hand."""
    folder = Path(str(values.get("dataset_dir") or "data"))
    for place in (folder, beside / folder, beside):
        try:
            return dict(msgspec.json.decode((place / "dataset_info.json").read_bytes(), type=dict[str, Any]))
        except (OSError, msgspec.MsgspecError):
            continue
    return {}


def docs() -> None:
    """Print the reference page of recipes, in Markdown."""
    from runtime.trainer.recipe.reference import reference

    print(reference(), end="")


def new(*, output: Annotated[Path | None, Parameter(help="File to write; default: print it.")] = None) -> None:
    """Print a commented recipe to start from, or write it to a file that is not there yet."""
    _write((resources.files("settings") / "recipes" / "starter.yaml").read_text(encoding="utf-8"), output)


def _write(text: str, output: Path | None) -> None:
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

    settings = loaded.settings
    rank, devices = settings.adapters.max_lora_rank, len(settings.trainer.devices)
    return load_recipe(_bytes(file), max_lora_rank=rank, devices=devices)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error


def _by_server(files: RecipeFiles, url: str | None, admin_key: str | None) -> dict[str, Any] | None:
    """The plan of a server; None if none was named and none answers, or it denies access."""

    async def ask() -> dict[str, Any] | None:
        async with admin_client(url or DEFAULT_URL, admin_key) as http:
            if url is None and not await answers(http):
                return None
            try:
                return await submit(http, files, dry_run=True)
            except ServerRefusal as error:
                if url is not None or error.names_a_field:
                    raise
                print(f"eft: {DEFAULT_URL} does not check it ({error.message}); checking here", file=sys.stderr)
                return None

    return asyncio.run(ask())


def _check_keys(file: Path, loaded: Loaded, *, json: bool) -> int:
    """Print the verdict of each key, and the notes. Raises `RecipeError` for a recipe that is refused, after the
    verdicts."""
    from runtime.trainer.recipe.document import read_document
    from runtime.trainer.recipe.load import recipe_from
    from runtime.trainer.recipe.verdicts import verdicts

    document = read_document(_bytes(file))
    found = verdicts(document.values)
    if not json:
        width = max((len(one.key) for one in found), default=0)
        print("\n".join(f"{one.key:{width}}  {one.verdict:8}  {one.why}".rstrip() for one in found))
    rank, devices = loaded.settings.adapters.max_lora_rank, len(loaded.settings.trainer.devices)
    recipe = recipe_from(document, max_lora_rank=rank, devices=devices)
    if json:
        print(msgspec.json.format(msgspec.json.encode({"keys": found, "notes": recipe.notes})).decode())
    else:
        print("\n".join([f"{file}: the keys are fine.", *recipe.notes]))
    return 0


def _plan(recipe: "Recipe", files: RecipeFiles, file: Path, loaded: Loaded) -> dict[str, Any]:
    """The plan, as a server answers a dry run. Needs the model's files, but no weights. The caller may read files
    beside the recipe, in the working directory, and under the data roots of the settings."""
    from runtime.checkpoints import open_checkpoint
    from runtime.trainer.data.files import DataFiles
    from runtime.trainer.plan.plan import prepare, summarize
    from runtime.trainer.recipe import adapter_name

    settings = loaded.settings
    if recipe.lora_model_dir is not None:
        note = "lora_model_dir is looked up by the server alone: what the adapter decides is not known to this plan."
        recipe = msgspec.structs.replace(recipe, notes=(*recipe.notes, note))
    checkpoint = open_checkpoint(
        settings.model.model, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    longest, shape = _shape(checkpoint, settings)
    names = [settings.model.served_model_name, checkpoint.name, settings.model.model]
    roots = [file.resolve().parent, Path.cwd(), *map(Path, settings.trainer.data_roots)]
    plan = prepare(
        recipe,
        checkpoint.tokenizer,
        DataFiles(files.data, roots, hub=settings.trainer.hub),
        model_names=tuple(name for name in names if name),
        max_len=settings.model.max_model_len or longest,
        shape=shape,
        max_vocabulary=settings.adapters.max_vocabulary_bytes,
        devices=len(settings.trainer.devices),
        nodes=settings.trainer.nodes,
        on_rows=lambda rows, tokens: print(f"eft: {rows:,} rows read", file=sys.stderr),
    )
    return {
        "object": "job.plan",
        "name": adapter_name(recipe, ""),
        "total_steps": plan.schedule.total_steps,
        "summary": msgspec.to_builtins(summarize(plan)),
    }


def _shape(checkpoint: "Checkpoint", settings: "Settings") -> tuple[int, "ModelShape"]:
    """The model's longest sequence, and its shape. A model that is served through transformers is loaded for it."""
    from runtime.checkpoints.model_loading import spec_of
    from runtime.model.families import find_model, is_native
    from runtime.model.lora_base import vocabulary_base
    from runtime.trainer.plan.served_model import shape_of, shape_of_base

    size = 2 if settings.model.dtype == "bfloat16" else 4
    if is_native(checkpoint.config):
        architecture, spec = find_model(checkpoint.config), spec_of(checkpoint)
        vocabulary = vocabulary_base(spec, architecture, bytes_per_value=size)
        shape = shape_of(
            spec,
            architecture.LORA_TARGETS,
            bytes_per_value=size,
            prefix=architecture.layers(),
            vocabulary=vocabulary,
        )
        return spec.max_position, shape
    from runtime.checkpoints.model_loading import base_of, load_model
    from runtime.support import logs

    logs.configure(settings.observability)  # to stderr: stdout is for the plan
    model = load_model(checkpoint, settings.model)
    return model.max_len, shape_of_base(model.spec, base_of(model, checkpoint, checkpoint.name), bytes_per_value=size)


def _as_error(error: RequestError) -> dict[str, Any]:
    from runtime.trainer.recipe import RecipeError

    problems = error.problems if isinstance(error, RecipeError) else ()
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
        "problems": problems,
    }
