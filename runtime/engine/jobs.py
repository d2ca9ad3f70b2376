"""The engine as jobs reach it: reading recipes for the served model, runs on its thread, publishing."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor

from runtime.adapters.card import write_card
from runtime.adapters.library import AdapterLibrary
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.peft import write_adapter
from runtime.engine.answers import AnswerRounds, AnswerSettings
from runtime.engine.devices import training_devices
from runtime.engine.first_weights import (
    BaseWeights,
    Stopped,
    find_origin,
    going_on,
    keep_origin,
    kept_origin,
    made_parameters,
    origin_parameters,
    pinned_origin,
)
from runtime.engine.launched import LaunchedJobs, LaunchedPlan, publish_model, refuse_own_tokens
from runtime.engine.training_pace import TrainingPace, spec_of
from runtime.errors import InvalidRequest, NotFound, RequestError
from runtime.events import (
    AnswersEvent,
    CancelledEvent,
    FailedEvent,
    GenerateEvent,
    PausedEvent,
    ProgressEvent,
    ReadingEvent,
    RunEvent,
    StepEvent,
)
from runtime.model.decoder import Decoder
from runtime.model.lora import Adapter
from runtime.model.model import device_memory
from runtime.support.durable import error_code, patiently, reason
from runtime.support.logs import get_logger
from runtime.support.threads import call_in_fresh_thread
from runtime.support.version import versions
from runtime.text.tool_calls import detect_format
from runtime.trainer.course import Restored, RunProgress, Snapshot, read_snapshot
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.prepared import FOLDER, KeptData, PreparedCache, digest_of_tokenizer
from runtime.trainer.evaluation.scores import make_scoring
from runtime.trainer.host import TrainingHost
from runtime.trainer.jobs.directories import ORIGIN
from runtime.trainer.jobs.records import ADAPTER_FILES, PreparedJob, RunHandle
from runtime.trainer.launched.files import MODEL
from runtime.trainer.optimizer import check_optimizer
from runtime.trainer.plan.plan import AdapterOrigin, Plan, feed, prepare, summarize
from runtime.trainer.plan.served_model import end_ids, shape_of_base, with_template
from runtime.trainer.recipe import Recipe, adapter_name, load_recipe
from runtime.trainer.recipe.launch import wants_launch
from runtime.trainer.run import most_kept_bytes
from runtime.trainer.sliced_run import RunSpec, SlicedRun
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService

MAX_UNTAKEN = 1
"""Snapshots that wait to be written, besides the one that is being written: each is a copy of the adapter and of the
optimiser's state."""

ANSWER_PROGRESS_SECONDS = 5.0
"""Time between two reports of how far the answers of an evaluation are."""

log = get_logger(__name__)


class EngineJobs:
    """`jobs.records.JobEngine` of one served model: recipes are read for it, runs work on the engine's thread, and
    results are published into the library of this server."""

    def __init__(
        self, service: "EngineService", library: AdapterLibrary, settings: Settings, directory: Path, host: TrainingHost
    ) -> None:
        """`directory` is the state directory, whose `data` folder recipes may read as they may the data roots."""
        self._service = service
        self._library = library
        self._settings = settings
        self._host = host
        self._directory = directory
        devices = training_devices(settings)
        self._launched = None if devices is None else LaunchedJobs(service, settings, directory, devices)
        trainer = settings.trainer
        self._cache = PreparedCache(directory / FOLDER, trainer.prepared_cache, trainer.keep_uploads)
        self._cache.prune()
        self._roots = [Path(root).expanduser() for root in settings.trainer.data_roots] + [directory / "data"]
        decoder, base = service.decoder, service.lora_base
        self._shape = shape_of_base(decoder.spec, base, bytes_per_value=decoder.dtype.itemsize)
        self._pace = TrainingPace(service, host)
        self._memory_for_jobs: int | None = None
        """Bytes, as measured when first asked for."""

    @property
    def base_fingerprint(self) -> str:
        """See `jobs.records.JobEngine`."""
        return self._service.lora_base.fingerprint

    # -- recipes -------------------------------------------------------------------------------

    def prepare(
        self,
        recipe: bytes,
        uploads: Mapping[str, Path],
        kept: Path | None,
        on_reading: Callable[[ReadingEvent], None] | None = None,
    ) -> PreparedJob:
        """See `jobs.records.JobEngine`."""
        service, began = self._service, time.monotonic()

        def on_rows(rows: int, tokens: int) -> None:
            if on_reading is not None:
                on_reading(ReadingEvent(rows=rows, tokens=tokens, seconds=time.monotonic() - began))

        names = (service.model_name, self._settings.model.model)
        devices = 0 if self._launched is None else self._launched.devices
        read = load_recipe(recipe, max_lora_rank=self._settings.adapters.max_lora_rank, served=names, devices=devices)
        name = adapter_name(read, "")
        if name:
            self._library.check_free(name, "name")
        deepspeed: dict[str, Any] | None = None
        if self._launched is not None and wants_launch(read):
            deepspeed, notes = self._launched.check(read, uploads)
            read = msgspec.structs.replace(read, notes=(*read.notes, *notes))
        read, origin = self._going_on(read, kept)
        self._check_first_weights(read)
        check_optimizer(read)
        plan = prepare(
            read,
            service.tokenizer,
            DataFiles(uploads, self._roots, hub=self._settings.trainer.hub),
            model_names=names,
            max_len=service.decoder.max_len,
            shape=self._shape,
            kept=KeptData(kept, lambda: self._tokenizer_digest, self._cache),
            max_vocabulary=self._settings.adapters.max_vocabulary_bytes,
            devices=devices,
            nodes=self._settings.trainer.nodes,
            origin=origin,
            on_rows=on_rows,
            riding_bytes=self._riding_bytes,
        )
        if plan.launch is not None:
            refuse_own_tokens(plan)
        if plan.generation:
            self._answers(plan)  # what is wrong with its metrics is said now
        plan = self._pace.timed(plan, trial=kept is None)
        summary: dict[str, Any] = msgspec.to_builtins(summarize(plan))
        summary["total_steps"] = plan.schedule.total_steps
        summary |= {"job_weight": self._weight_of(read), "job_priority": read.job_priority}
        summary["launched"] = plan.launch is not None
        summary["versions"] = versions()
        summary["base_fingerprint"] = self.base_fingerprint
        if read.save_total_limit is not None:
            summary["save_total_limit"] = read.save_total_limit
        return PreparedJob(
            name=name,
            summary=summary,
            total_steps=plan.schedule.total_steps,
            publish=read.publish,
            plan=plan if plan.launch is None else LaunchedPlan(plan, deepspeed),
            result_files=MODEL if plan.launch is not None and plan.launch.full else ADAPTER_FILES,
        )

    def _going_on(self, recipe: Recipe, kept: Path | None) -> tuple[Recipe, AdapterOrigin | None]:
        """The recipe with what the adapter decides that it goes on from, and that adapter: once a job has it, its own
        copy."""
        if recipe.lora_model_dir is None:
            return recipe, None
        base, most = self._service.lora_base, self._settings.adapters.max_lora_rank
        copy = None if kept is None else kept.with_name(ORIGIN)
        origin = None if copy is None else kept_origin(copy)
        if origin is None:
            origin = find_origin(recipe.lora_model_dir, self._library, self._roots, base)
            with pinned_origin(origin) as there:
                decided = going_on(recipe, there, base, self._shape, max_rank=most)
                return decided, origin if copy is None else keep_origin(there, copy, base, max_rank=most)
        return going_on(recipe, origin, base, self._shape, max_rank=most), origin

    def _check_first_weights(self, recipe: Recipe) -> None:
        if recipe.first_weights == "loftq" and self._service.decoder.group.size > 1:
            raise InvalidRequest(
                "peft_init_lora_weights is loftq, which compares the base's files with its weights as one process "
                f"holds them, and here {self._service.decoder.group.size} ranks share them: leave it out, or serve "
                "with parallel.tp 1.",
                param="peft_init_lora_weights",
            )

    @functools.cached_property
    def _riding_bytes(self) -> int:
        """Bytes that the rides of one job keep, at the most."""
        decoder = self._service.decoder
        rides = self._settings.trainer.riding_rows > 1 and self._service.engine.kept_widths is not None
        return most_kept_bytes(decoder) if rides and isinstance(decoder, Decoder) else 0

    @functools.cached_property
    def _tokenizer_digest(self) -> str:
        return digest_of_tokenizer(self._service.tokenizer)

    # -- runs ----------------------------------------------------------------------------------

    def start(
        self, job_id: str, prepared: PreparedJob, resume_from: Path | None, on_event: Callable[[RunEvent], None]
    ) -> RunHandle:
        """See `jobs.records.JobEngine`."""
        if isinstance(prepared.plan, LaunchedPlan):
            assert self._launched is not None, "the plan was made with its devices"
            return self._launched.start(job_id, prepared.plan, on_event)
        assert isinstance(prepared.plan, Plan)

        def note(event: RunEvent) -> None:
            if isinstance(event, StepEvent):
                self._pace.note(event)
            on_event(event)

        plan, rounds = prepared.plan, None
        if plan.generation:
            folder, name = self._directory / "jobs" / job_id, prepared.name or job_id
            rounds = AnswerRounds(self._service, self._answers(plan), job_id=job_id, name=name, folder=folder)
        claim = (self._weight_of(plan.recipe), plan.recipe.job_priority)
        return EngineRun(self._service, self._host, plan, resume_from, note, rounds, claim=claim)

    def _weight_of(self, recipe: Recipe) -> float:
        return self._settings.trainer.job_weight if recipe.job_weight is None else recipe.job_weight

    def memory_for_jobs(self) -> int:
        """See `jobs.records.JobEngine`."""
        if (given := self._settings.trainer.job_memory) is not None:
            return given
        if self._memory_for_jobs is None:
            self._memory_for_jobs = device_memory(self._service.decoder.device).free // 2
        return self._memory_for_jobs

    def _answers(self, plan: Plan) -> AnswerSettings:
        """Raises `InvalidRequest` and `Forbidden` for a metric that cannot be computed here."""
        recipe, own = plan.recipe, plan.vocabulary
        tokenizer = self._service.tokenizer if own is None else own.tokenizer
        if plan.template is not None:
            tokenizer = with_template(tokenizer, plan.template.source)
        return AnswerSettings(
            rows=plan.generation,
            max_tokens=recipe.eval_max_new_tokens,
            num_samples=recipe.num_samples,
            stop_ids=tuple(sorted({*tokenizer.eos_ids, *end_ids(recipe, tokenizer)})),
            stop=plan.stop,
            tokenizer=tokenizer,
            scoring=make_scoring(recipe, detect_format(tokenizer.chat_template), self._settings.trainer.scorers),
        )

    # -- publishing ----------------------------------------------------------------------------

    async def publish(self, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float]) -> str:
        """See `jobs.records.JobEngine`: a job is published once, whatever crashed in between."""
        if source.name == MODEL:
            return await publish_model(
                self._directory,
                name=name,
                source=source,
                job_id=job_id,
                step=step,
                metrics=metrics,
                base=self._service.model_name,
            )
        if (known := self._published(name, job_id)) is not None:
            return known
        version = await self._library.publish(name, source, job=job_id, step=step, metrics=dict(metrics))
        return version.id

    async def offer(self, *, name: str, job_id: str, folders: Mapping[int, Path]) -> None:
        """See `jobs.records.JobEngine`."""
        await self._library.offer(name, job_id, folders)

    def _published(self, name: str, job_id: str) -> str | None:
        try:
            versions = self._library.get(name).versions
        except NotFound:
            return None
        return next((version.id for version in versions.values() if version.job == job_id), None)


# -- a run -----------------------------------------------------------------------------------------
#
# A run is built on a thread of its own (it reads checkpoints and allocates), works on the engine thread, and reports
# on the event loop.


class EngineRun:
    """`jobs.records.RunHandle`. Event loop only."""

    def __init__(
        self,
        service: "EngineService",
        host: TrainingHost,
        plan: Plan,
        resume_from: Path | None,
        on_event: Callable[[RunEvent], None],
        rounds: AnswerRounds | None = None,
        *,
        claim: tuple[float, int] = (1.0, 0),
    ) -> None:
        """`rounds`: where evaluations generate answers. `claim`: weight and priority, see `FairQueue`."""
        self._claim = claim
        self._service = service
        self._host = host
        self._plan = plan
        self._on_event = on_event
        self._run: SlicedRun | None = None
        self._paused = False
        self._cancelled = False
        self._closed = False
        self._rounds = rounds
        self._answering: asyncio.Task[None] | None = None
        self._building = asyncio.create_task(self._build(resume_from))

    # -- requests to it ------------------------------------------------------------------------

    def pause(self) -> None:
        self._paused = True
        if self._run is not None:
            self._run.pause()

    def resume(self) -> None:
        self._paused = False
        if self._run is not None:
            self._run.resume()
            self._service.on_engine_thread(_wake)

    def cancel(self) -> None:
        self._cancelled = True
        if self._run is not None:
            self._run.cancel()
            self._service.on_engine_thread(_wake)

    async def take_snapshot(self, step: int) -> Callable[[Path], None]:
        assert self._run is not None, "there was an event, so there is a run"
        snapshot = self._run.take_snapshot(step)
        self._service.on_engine_thread(_wake)  # it may have waited for this one to be taken
        return snapshot.write

    def close(self) -> None:
        self._closed = True
        self._building.cancel()
        self._stop_answering()
        run = self._run
        if run is not None:
            self._service.on_engine_thread(lambda: self._host.detach(run))

    # -- its making ----------------------------------------------------------------------------

    async def _build(self, resume_from: Path | None) -> None:
        try:
            run = await patiently(lambda: call_in_fresh_thread(self._make, resume_from))
        except Stopped:
            self._report(CancelledEvent(step=0))
            return
        except RequestError as error:
            self._report(FailedEvent(step=0, code=error.code or error.type, message=error.message))
            return
        except ValueError as error:
            self._report(FailedEvent(step=0, code="bad_checkpoint", message=f"The job cannot go on: {error}."))
            return
        except OSError as error:
            message = f"The job cannot start: {reason(error)}."
            self._report(FailedEvent(step=0, code=error_code(error), message=message))
            return
        except Exception:
            log.exception("cannot_build_run")
            message = "An internal error kept this job from starting; the server's log has it."
            self._report(FailedEvent(step=0, code="internal_error", message=message))
            return
        if self._cancelled:
            self._report(CancelledEvent(step=run.step))
            return
        run.bound_untaken(MAX_UNTAKEN)
        if self._paused:
            run.pause()
        self._run = run
        weight, priority = self._claim
        self._service.on_engine_thread(
            lambda: self._host.attach(run, self._from_engine, weight=weight, priority=priority)
        )

    def _make(self, resume_from: Path | None) -> SlicedRun:
        plan, service = self._plan, self._service
        spec = spec_of(service, plan)
        restored = self._first(spec) if resume_from is None else read_snapshot(resume_from)

        def write(directory: Path, adapter: Adapter) -> None:
            write_adapter(
                directory,
                adapter.layers,
                adapter.shape,
                service.lora_base,
                vocabulary=adapter.vocabulary,
                dropout=spec.recipe.lora_dropout,
                base_name=plan.recipe.base_model,
            )
            write_card(directory, plan.card)

        return service.make_run(spec, feed(plan), self._from_engine, write, restored)

    def _first(self, spec: RunSpec) -> Restored | None:
        """The state that the run begins with, where its first weights are not drawn."""
        plan, service = self._plan, self._service
        parameters: Mapping[str, Tensor] | None = None
        if plan.origin is not None:
            most = service.settings.adapters.max_lora_rank
            parameters = origin_parameters(plan.origin, service.lora_base, max_rank=most)
        elif plan.recipe.is_made_of_base:
            model = service.settings.model
            checkpoint = open_checkpoint(model.model, revision=model.revision, chat_template=model.chat_template)
            weights = BaseWeights(checkpoint, service.lora_base, service.decoder)
            parameters = made_parameters(plan.recipe, spec.shape, spec.targets, weights, lambda: self._cancelled)
        return None if parameters is None else Restored(RunProgress(), parameters, {}, None)

    # -- its reports ---------------------------------------------------------------------------

    def _from_engine(self, event: RunEvent) -> None:
        self._service.on_event_loop(self._report, event)

    def _report(self, event: RunEvent) -> None:
        if self._closed:
            return
        if isinstance(event, GenerateEvent):
            self._begin_answering(event.step)
            return
        if isinstance(event, PausedEvent | CancelledEvent | FailedEvent):
            self._stop_answering()
        self._on_event(event)

    # -- generated answers ---------------------------------------------------------------------

    def _begin_answering(self, step: int) -> None:
        assert self._run is not None
        assert self._rounds is not None, "the plan has rows to answer"
        self._stop_answering()
        snapshot = self._run.take_snapshot(step)  # now: the next event may be about another one of this step
        self._answering = asyncio.create_task(self._answer(self._run, self._rounds, step, snapshot))

    def _stop_answering(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            self._answering = None

    async def _answer(self, run: SlicedRun, rounds: AnswerRounds, step: int, snapshot: Snapshot) -> None:
        progress = _AnswerProgress(step, self._plan.schedule.total_steps, self._report)
        try:
            evaluated = await rounds.run(step, snapshot, progress.note)
        except Exception:
            log.exception("evaluation_failed")
            problem = "No answers could be generated: an internal error; the server's log has it."
            self._report(AnswersEvent(step=step, rows=0, tokens=0, seconds=0.0, problems=[problem]))
            run.answer({})
        else:
            self._report(evaluated.event)
            run.answer(evaluated.metrics)
        self._service.on_engine_thread(_wake)


class _AnswerProgress:
    """Reports how far a round of answers is, every few seconds."""

    def __init__(self, step: int, total_steps: int, report: Callable[[RunEvent], None]) -> None:
        self._step, self._total_steps, self._report = step, total_steps, report
        self._began = self._said = time.monotonic()

    def note(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self._said < ANSWER_PROGRESS_SECONDS or fraction >= 1:
            return
        self._said = now
        self._report(
            ProgressEvent(
                step=self._step,
                total_steps=self._total_steps,
                activity="eval",
                fraction=fraction,
                seconds=now - self._began,
                seconds_left=None,
            )
        )


def _wake() -> None:
    """A message is enough: the engine thread looks at its background after it."""
