"""`eft train`: a recipe to a server, or to a model loaded here; and what comes of it."""

import asyncio
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter

from runtime.cli import client
from runtime.cli.admin import DEFAULT_URL, AdminKey, admin_client, ask
from runtime.cli.errors import UsageError
from runtime.cli.flags import MODEL_SECTIONS, Config, Json, read_settings, refuse_settings, with_settings
from runtime.cli.follow import follow as follow_job
from runtime.cli.recipe_files import RecipeFiles, read_recipe

UNPUBLISHED = 3
"""Exit code where the job is done and its recipe's gate was not passed."""


@with_settings(*MODEL_SECTIONS, "adapters", "trainer")
def train(
    recipe: Annotated[Path, Parameter(help="The recipe, a YAML file.")],
    /,
    *,
    model: Annotated[
        str | None, Parameter(help="Train here, without a server: what to load, such as `demo`. Implies --follow.")
    ] = None,
    url: Annotated[str | None, Parameter(help=f"The server; default: {DEFAULT_URL}.")] = None,
    admin_key: AdminKey = None,
    name: Annotated[str | None, Parameter(help="Name of the adapter, instead of the recipe's.")] = None,
    follow: Annotated[bool, Parameter(help="Show how it goes, until its end.", negative="")] = False,
    dry_run: Annotated[bool, Parameter(help="Only say what the recipe would do.", negative="")] = False,
    json: Json = False,
    config: Config = None,
    **flags: Any,
) -> int:
    """Returns 1 where the job failed or was cancelled, 3 where it was not good enough to publish."""
    files = read_recipe(recipe, name=name)
    if model is not None:
        if url is not None or admin_key is not None:
            raise UsageError("--url and --admin-key are for a server; with --model, training is done here")
        opened = client.in_process(read_settings(flags, config, model=model), training=True)
    else:
        refuse_settings(flags, config)
        opened = admin_client(url or DEFAULT_URL, admin_key)
    job = asyncio.run(_train(opened, files, dry_run=dry_run, follow=follow or model is not None))
    if json:
        print(msgspec.json.encode(job).decode())
    else:
        print("\n".join(_report(job, url, model)))
    return exit_code(job)


def exit_code(job: dict[str, Any]) -> int:
    """Of a job as it is now, or of a plan."""
    if job.get("status") in ("failed", "cancelled"):
        return 1
    return UNPUBLISHED if job.get("status") == "succeeded" and not job["adapter"] else 0


async def _train(
    opened: AbstractAsyncContextManager[httpx.AsyncClient], files: RecipeFiles, *, dry_run: bool, follow: bool
) -> dict[str, Any]:
    async with opened as http:
        job = await submit(http, files, dry_run=dry_run)
        return await follow_job(http, job) if follow and not dry_run else job


async def submit(http: httpx.AsyncClient, files: RecipeFiles, *, dry_run: bool = False) -> dict[str, Any]:
    """Post a recipe with its files, each read as it is sent: the job, or with `dry_run` the plan."""
    with ExitStack() as stack:
        form = [("recipe", ("recipe.yaml", files.recipe))]
        form += [("file", (name, stack.enter_context(open(path, "rb")))) for name, path in files.data.items()]  # type: ignore[misc]  # noqa: ASYNC230
        params = {"dry_run": "1"} if dry_run else {}
        answer: dict[str, Any] = await ask(http, "POST", "/admin/train", files=form, params=params)
        return answer


def _report(job: dict[str, Any], url: str | None, model: str | None) -> Iterator[str]:
    """What to say of a job, or of a plan, to a person."""
    if job["object"] == "job.plan":
        yield f"{job['name']}: {job['total_steps']} steps"
        yield msgspec.json.format(msgspec.json.encode(job["summary"]), indent=2).decode()
        return
    match job["status"]:
        case "succeeded" if job["adapter"]:
            yield f"Published as {job['adapter']}. Try it:"
            if model:
                yield f"  eft serve {model}"
            yield f"  eft chat {job['name']} --url {url or DEFAULT_URL}"
        case "succeeded":
            yield f"{job['name']} is trained, and was not published; see: eft jobs events {job['id']}"
        case "failed":
            yield f"{job['id']} failed: {job['error']['message']}"
        case "cancelled":
            yield f"{job['id']} was cancelled."
        case status:
            yield f"{job['id']} is {status}. Follow it:"
            yield f"  eft jobs events {job['id']} --follow" + (f" --url {url}" if url else "")
