"""/v1/fine_tuning/jobs: OpenAI's view of the jobs of /admin/train."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import msgspec
from litestar import get, post

from runtime.api.admin.train import job_id_of, take_files, training_file
from runtime.api.admin.views import job_item
from runtime.api.docs import BODY, QUERY, page_query
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.auth import TRAIN
from runtime.api.http.query import MAX_PAGE, ObjectPage, check_names, metadata_filter, object_page, page_request, single
from runtime.api.http.record import record_of, visible_to
from runtime.api.openai.batches import check_metadata
from runtime.api.openai.fine_tuning_views import (
    TRAIN_FILE,
    VALIDATION_FILE,
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    FineTuningRequest,
    checkpoint_view,
    event_view,
    job_view,
    model_name,
    recipe_of,
    request_of,
)
from runtime.api.openai.schema import Intake
from runtime.errors import InvalidRequest, ModelNotFound, NotFound, Unsupported
from runtime.support.durable import storage_unavailable
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.records import Job, JobFile, JobSubmission

MAX_SUFFIX = 64
"""Characters of a suffix, OpenAI's."""

MAX_FIRST_LINE = 1024 * 1024
"""Bytes of a file's first row that are looked at for its format."""

PREFERENCE_FIELDS = frozenset({"input", "preferred_output", "non_preferred_output"})
"""Fields of a row of OpenAI's preferences."""

OWN_KEYS = ("name", "base_model", "datasets", "test_datasets")
"""Keys of a recipe that the request itself decides."""

_SUFFIX_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_rows = msgspec.json.Decoder(dict[str, msgspec.Raw])
_intake = Intake(FineTuningRequest, neutral={})


@post("/v1/fine_tuning/jobs", opt={TRAIN: True, BODY: FineTuningRequest}, status_code=200)
async def create_fine_tuning_job(request: AnyRequest) -> FineTuningJob:
    """Train an adapter on a file of /v1/files. It answers as `fine_tuned_model` once the job has succeeded."""
    api = api_of(request)
    jobs, library = api.handle.require_jobs(), api.handle.require_files()
    check_names(request, ())
    asked = await _intake.read(request, api)
    _check(asked, api)
    record = record_of(request)
    files = [await training_file(library, asked.training_file, visible_to(record), "training_file")]
    if asked.validation_file is not None:
        files.append(await training_file(library, asked.validation_file, visible_to(record), "validation_file"))
    job_id = jobs.new_id()
    name = model_name(api.handle.require().model_name, asked.suffix, job_id)
    with jobs.arriving():
        try:
            format = await asyncio.to_thread(_format_of, library.path(files[0]), dpo=asked.dpo is not None)
            recipe = recipe_of(asked, name, format, api.handle.require().max_model_len)
            folder = jobs.directories.incoming(job_id)
            own = [
                JobFile(name=name, stored_as=f"{index:03d}-{name}", bytes=file.bytes)
                for index, (file, name) in enumerate(zip(files, (TRAIN_FILE, VALIDATION_FILE), strict=False))
            ]
            paths = map(library.path, files)
            taken = await asyncio.to_thread(take_files, list(zip(paths, own, strict=True)), folder)
        except OSError as error:
            await jobs.discard(job_id)
            raise storage_unavailable("The files of the job cannot be stored", error) from error
        except BaseException:
            await jobs.discard(job_id)
            raise
    digest = hashlib.blake2b(recipe).hexdigest()
    await jobs.submit(JobSubmission(id=job_id, recipe=recipe, files=taken, digest=digest, owner=record.tenant))
    record.target = job_id
    return await _view(api, jobs, job_id)


@get("/v1/fine_tuning/jobs", opt={TRAIN: True, QUERY: page_query(MAX_PAGE, metadata={"enum": ["null"]})})
async def list_fine_tuning_jobs(request: AnyRequest) -> ObjectPage[FineTuningJob]:
    """The newest jobs first, those of /admin/train too. `after` takes an id, `limit` up to 100, `order` asc or desc;
    with `metadata[key]` only jobs that have it, with `metadata=null` those that have none."""
    api, jobs = api_of(request), _jobs(request)
    wanted, names = metadata_filter(request)
    page = page_request(request, further=("metadata", *names))
    check_metadata(wanted, api.settings.limits)
    without = single(request, "metadata")
    if without is not None and (without != "null" or wanted):
        raise InvalidRequest(
            "metadata: expected null, alone, for jobs without any; metadata[key]=value is for those that have it.",
            param="metadata",
        )

    def matches(job: Job) -> bool:
        asked = request_of(job)
        metadata = (asked and asked.metadata) or {}
        return not metadata if without else wanted.items() <= metadata.items()

    found, more = await jobs.store.page(
        after=page.after,
        limit=page.limit,
        states=(),
        owner=visible_to(record_of(request)),
        newest_first=page.newest_first,
        matches=matches,
    )
    served = api.handle.require_latest().model_name
    data = [job_view(job, progress, served, job_item(job, progress).estimated_finish) for job, progress in found]
    return object_page(data, more)


@get("/v1/fine_tuning/jobs/{job_id:str}", opt={TRAIN: True})
async def retrieve_fine_tuning_job(request: AnyRequest) -> FineTuningJob:
    """One job."""
    check_names(request, ())
    return await _view(api_of(request), _jobs(request), await job_id_of(request))


@post("/v1/fine_tuning/jobs/{job_id:str}/cancel", opt={TRAIN: True}, status_code=200)
async def cancel_fine_tuning_job(request: AnyRequest) -> FineTuningJob:
    """Cancel a job: at once, or after the step that runs. 409 for one that has ended."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    await jobs.cancel(job_id)
    return await _view(api_of(request), jobs, job_id)


@post("/v1/fine_tuning/jobs/{job_id:str}/pause", opt={TRAIN: True}, status_code=200)
async def pause_fine_tuning_job(request: AnyRequest) -> FineTuningJob:
    """Pause a job that is queued or runs. 409 for any other."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    await jobs.pause(job_id)
    return await _view(api_of(request), jobs, job_id)


@post("/v1/fine_tuning/jobs/{job_id:str}/resume", opt={TRAIN: True}, status_code=200)
async def resume_fine_tuning_job(request: AnyRequest) -> FineTuningJob:
    """Resume a paused job, or a failed one that has a checkpoint. 409 for any other."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    await jobs.resume(job_id)
    return await _view(api_of(request), jobs, job_id)


@get("/v1/fine_tuning/jobs/{job_id:str}/events", opt={TRAIN: True, QUERY: page_query(MAX_PAGE)})
async def fine_tuning_events(request: AnyRequest) -> ObjectPage[FineTuningEvent]:
    """Events of a job, the newest first. `after` takes an event's id, `limit` up to 100, `order` asc or desc."""
    jobs, job_id, page = _jobs(request), await job_id_of(request), page_request(request)
    after = _number(page.after, f"ftevent-{job_id}-")
    if page.newest_first:
        found = await jobs.store.latest_events(job_id, before=after, limit=page.limit + 1)
    else:
        _, found = await jobs.store.events(job_id, after=after or 0, limit=page.limit + 1)
    return object_page([event_view(job_id, event) for event in found[: page.limit]], len(found) > page.limit)


@get("/v1/fine_tuning/jobs/{job_id:str}/checkpoints", opt={TRAIN: True, QUERY: page_query(MAX_PAGE)})
async def fine_tuning_checkpoints(request: AnyRequest) -> ObjectPage[FineTuningCheckpoint]:
    """Checkpoints of a job, the newest first. While it runs they answer by their `fine_tuned_model_checkpoint`."""
    jobs, job_id, page = _jobs(request), await job_id_of(request), page_request(request, default=10)
    job = await jobs.store.get(job_id)
    after = _number(page.after, f"ftckpt-{job_id}-")
    stored = await jobs.store.checkpoints(job_id)
    if page.newest_first:
        stored.reverse()
    behind = [one for one in stored if after is None or (one.step < after if page.newest_first else one.step > after)]
    shown = behind[: page.limit]
    data = [checkpoint_view(job, one, await jobs.store.gate_metrics(job_id, one.step)) for one in shown]
    return object_page(data, len(behind) > page.limit)


ROUTES = (
    create_fine_tuning_job,
    list_fine_tuning_jobs,
    retrieve_fine_tuning_job,
    cancel_fine_tuning_job,
    pause_fine_tuning_job,
    resume_fine_tuning_job,
    fine_tuning_events,
    fine_tuning_checkpoints,
)


def _check(asked: FineTuningRequest, api: Api) -> None:
    """Raise for what a job cannot do."""
    served = api.handle.require().model_name
    if asked.model != served:
        raise ModelNotFound(
            f"The model `{asked.model[:200]}` cannot be fine-tuned here: it can be `{served}`, the base model.",
            param="model",
        )
    _check_method(asked)
    if len(asked.integrations or ()) > 1:
        raise Unsupported("integrations must hold one at most: a job logs to one run.", param="integrations")
    if any(one.wandb.tags for one in asked.integrations or ()):
        raise Unsupported("Tags are not supported: put them into the run's name.", param="integrations[0].wandb.tags")
    suffix = asked.suffix or ""
    if len(suffix) > MAX_SUFFIX or not _SUFFIX_CHARS.issuperset(suffix):
        raise InvalidRequest(
            f"suffix must have at most {MAX_SUFFIX} letters, digits, `.`, `_` or `-`, got `{suffix[:100]}`.",
            param="suffix",
        )
    if asked.seed is not None and not 0 <= asked.seed < 2**31:
        raise InvalidRequest(f"seed must be from 0 to 2147483647, got {asked.seed}.", param="seed")
    chosen = asked.chosen
    bounds: dict[str, tuple[Any, float]] = {
        "n_epochs": (chosen.n_epochs, 1000),
        "batch_size": (chosen.batch_size, 1024),
        "learning_rate_multiplier": (chosen.learning_rate_multiplier, 1000),
    }
    if asked.dpo is not None:
        bounds["beta"] = (asked.dpo.beta, 1000)
    for name, (value, most) in bounds.items():
        least = 1 if name in ("n_epochs", "batch_size") else 0.0001
        if value != "auto" and not least <= value <= most:
            raise InvalidRequest(f"{name} must be auto, or from {least:g} to {most:g}, got {value}.", param=name)
    if own := [key for key in OWN_KEYS if key in (asked.recipe or {})]:
        raise InvalidRequest(
            f"recipe must not have `{own[0]}`, which the request decides; post such a recipe to /admin/train.",
            param=f"recipe.{own[0]}",
        )
    check_metadata(asked.metadata, api.settings.limits)


def _check_method(asked: FineTuningRequest) -> None:
    method = asked.method
    if method is None:
        return
    if method.type == "reinforcement":
        raise Unsupported(
            "method.type reinforcement is not supported by these jobs: send supervised, or dpo with answers that were "
            "judged before.",
            param="method.type",
        )
    for name in ("supervised", "dpo", "reinforcement"):
        if name != method.type and getattr(method, name) is not None:
            raise InvalidRequest(f"method.{name} is given, and method.type is {method.type}.", param=f"method.{name}")
    if method.dpo is not None and asked.hyperparameters is not None:
        raise InvalidRequest(
            "hyperparameters and method.dpo.hyperparameters are given: send the latter.", param="hyperparameters"
        )


def _format_of(path: Path, *, dpo: bool) -> str:
    """Type of a training file's rows, for a recipe: of its first one; `dpo`: they are to be preferences. Raises
    `InvalidRequest`, `OSError`."""
    with open(path, "rb") as file:
        line = file.readline(MAX_FIRST_LINE)
    try:
        row = _rows.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(
            "training_file: line 1 is not a JSON object; a file has one row a line.", param="training_file"
        ) from None
    preferences = row.keys() >= PREFERENCE_FIELDS
    if dpo and not preferences:
        raise InvalidRequest(
            "training_file: method.type is dpo, and line 1 has no `input`, `preferred_output` and "
            "`non_preferred_output`.",
            param="training_file",
        )
    if dpo:
        return "openai"
    if preferences:
        raise InvalidRequest(
            "training_file: line 1 is a preference, and method.type is supervised: send dpo.", param="training_file"
        )
    if "messages" in row:
        return "chat_template"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    raise InvalidRequest(
        "training_file: line 1 has neither `messages` nor `prompt` and `completion`.", param="training_file"
    )


async def _view(api: Api, jobs: JobManager, job_id: str) -> FineTuningJob:
    job, progress = await jobs.store.describe(job_id)
    return job_view(job, progress, api.handle.require_latest().model_name, job_item(job, progress).estimated_finish)


def _number(after: str | None, prefix: str) -> int | None:
    """The number at the end of an id in `after`. Raises `NotFound`."""
    if after is None:
        return None
    digits = after.removeprefix(prefix)
    if not after.startswith(prefix) or not (digits.isascii() and digits.isdigit()) or len(digits) > 15:
        raise NotFound(f"This job has no `{after[:100]}`.", param="after")
    return int(digits)


def _jobs(request: AnyRequest) -> JobManager:
    return api_of(request).handle.require_jobs()
