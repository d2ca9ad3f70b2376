"""Jobs on devices of their own, as the engine's side makes them: the devices, the model's files, the first adapter."""

import asyncio
import importlib.util
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import settings as settings_package
from runtime.adapters.card import write_card
from runtime.checkpoints.model_library import ModelLibrary, ModelRecord
from runtime.checkpoints.peft import write_adapter
from runtime.engine.devices import TrainingDevices
from runtime.errors import InvalidRequest
from runtime.events import RunEvent
from runtime.support.durable import remove, storage_unavailable
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.launched.files import JobFolder, LaunchSpec, ModelFiles
from runtime.trainer.launched.process import LaunchedRun, LaunchJob, Nodes
from runtime.trainer.lora import initial_layers
from runtime.trainer.plan.plan import Plan, feed
from runtime.trainer.plan.served_model import by_linear
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.launch import own_tokens_problem
from runtime.trainer.schedule import ExampleFeed
from runtime.trainer.sliced_run import shape_of_recipe
from runtime.workers.parallel.launch import LOOPBACK, environment
from runtime.workers.parallel.launchers import usable_cores
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService

DEEPSPEED = Path(settings_package.__file__).parent / "deepspeed"
"""Folder of the shipped configurations."""


# -- deepspeed -------------------------------------------------------------------------------------


def deepspeed_config(recipe: Recipe, uploads: Mapping[str, Path]) -> tuple[dict[str, Any], str | None]:
    """DeepSpeed's configuration of a recipe, and a note where a path is read as a shipped one. Raises
    `InvalidRequest`."""
    given = recipe.deepspeed
    if importlib.util.find_spec("deepspeed") is None:
        raise InvalidRequest(
            "deepspeed is not installed on this server: pip install 'eft-server[distributed]', or use fsdp_config or "
            "ddp, which need nothing more.",
            param="deepspeed",
        )
    if isinstance(given, dict):
        return _checked_config(given), None
    assert given is not None
    last = given.rstrip("/").rpartition("/")[2]
    sent = uploads.get(given) or uploads.get(last)
    if sent is not None:
        return _read_config(given, sent), None
    shipped = DEEPSPEED / f"{last.removesuffix('.json')}.json"
    if not shipped.is_file() or shipped.parent != DEEPSPEED:
        known = ", ".join(sorted(path.stem for path in DEEPSPEED.glob("*.json")))
        raise InvalidRequest(
            f"deepspeed is {given[:200]!r}, which is neither a file that was sent along nor a shipped configuration: "
            f"{known}.",
            param="deepspeed",
        )
    note = None if given == shipped.stem else f"deepspeed: {given} is read as the shipped {shipped.stem}."
    return _read_config(given, shipped), note


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise InvalidRequest(f"deepspeed: {name[:200]} must have at most {MAX_CONFIG} bytes.", param="deepspeed")
        return _checked_config(msgspec.json.decode(text, type=dict[str, Any]))
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"deepspeed: {name[:200]} is no JSON object: {error}.", param="deepspeed") from error


def _checked_config(given: dict[str, Any]) -> dict[str, Any]:
    """Raise `InvalidRequest` for parts of a configuration that are not about how a step is computed: DeepSpeed would
    write files and send numbers where they say."""
    for name in given:
        if name not in _COMPUTING:
            raise InvalidRequest(
                f"deepspeed.{name[:100]} is not taken; the parts are {', '.join(sorted(_COMPUTING))}.",
                param="deepspeed",
            )
    zero = given.get("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(offload, dict) and (
            offload.get("device", "cpu") not in ("cpu", "none") or "nvme_path" in offload
        ):
            raise InvalidRequest(
                f"deepspeed.zero_optimization.{name} goes to the CPU only: its device must be cpu or none, without "
                "nvme_path.",
                param="deepspeed",
            )
    return given


# -- jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LaunchedPlan:
    """The plan of a job on devices of its own."""

    plan: Plan
    deepspeed: dict[str, Any] | None


class LaunchedJobs:
    """Starts jobs on the devices that are set aside, and publishes whole models."""

    def __init__(self, service: "EngineService", settings: Settings, directory: Path, devices: TrainingDevices) -> None:
        """`directory` is the state directory."""
        self._service, self._settings, self._directory = service, settings, directory
        self._devices = devices
        self._lock = threading.Lock()

    @property
    def devices(self) -> int:
        """Devices on each node."""
        return len(self._devices.indices)

    def check(self, recipe: Recipe, uploads: Mapping[str, Path]) -> tuple[dict[str, Any] | None, list[str]]:
        """DeepSpeed's configuration of a recipe, if it has one, and notes. Raises `InvalidRequest`."""
        if recipe.adapter is not None and importlib.util.find_spec("peft") is None:
            raise InvalidRequest(
                "peft is not installed on this server: pip install 'eft-server[distributed]', or leave out what asks "
                "for devices of its own, and the adapter is trained inside the server.",
                param="adapter",
            )
        if not recipe.deepspeed:
            return None, []
        config, note = deepspeed_config(recipe, uploads)
        dropped = [f"deepspeed.{name} is ignored: the recipe's own keys decide." for name in _DECIDED if name in config]
        return config, [*([note] if note else []), *dropped]

    def start(self, job_id: str, launched: LaunchedPlan, on_event: Callable[[RunEvent], None]) -> LaunchedRun:
        """See `jobs.records.JobEngine.start`; the ranks look for the newest checkpoint themselves."""
        settings, launch = self._settings.trainer, launched.plan.launch
        assert launch is not None
        per_node = launch.ranks // settings.nodes
        threads = max(1, usable_cores() // per_node)
        interface = self._settings.parallel.interface or (LOOPBACK if settings.nodes == 1 else None)
        job = LaunchJob(
            name=job_id,
            folder=JobFolder(JobDirectories(self._directory).launched(job_id)),
            write=lambda folder: self._write(job_id, launched, folder, threads),
            nodes=Nodes(per_node=per_node, count=settings.nodes, rendezvous=settings.rendezvous),
            environment=environment(threads, interface) | self._devices.visible(per_node),
            devices=self._lock,
            max_restarts=settings.max_restarts,
            stall_timeout=settings.stall_timeout,
            outlives=settings.outlive_server,
        )
        return LaunchedRun(job, on_event)

    def _write(
        self, job_id: str, launched: LaunchedPlan, folder: JobFolder, threads: int
    ) -> tuple[LaunchSpec, ExampleFeed]:
        """The job as ranks read it; writes the adapter that they begin with. Blocks."""
        plan = launched.plan
        assert plan.launch is not None
        if not plan.launch.full:
            self._write_initial(plan, folder.initial)
        spec = LaunchSpec(
            recipe=plan.recipe,
            schedule=plan.schedule,
            launch=plan.launch,
            model=self._model_files(),
            device=self._devices.kind,
            checkpoints=str(JobDirectories(self._directory).checkpoint(job_id, 0).parent),
            vocab_size=self._service.vocab_size,
            deepspeed=launched.deepspeed,
            chat_template=None if plan.template is None else plan.template.source,
            threads=threads,
        )
        return spec, feed(plan)

    def _write_initial(self, plan: Plan, directory: Path) -> None:
        remove(directory)
        base, recipe = self._service.lora_base, plan.recipe
        shape = shape_of_recipe(recipe)
        layers = initial_layers(by_linear(plan.targets, base.places), base, shape, seed=recipe.seed)
        directory.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(directory, layers, shape, base, dropout=recipe.lora_dropout, base_name=recipe.base_model)
        write_card(directory, plan.card)

    def _model_files(self) -> ModelFiles:
        """The served model's files, as transformers reads them."""
        source = self._service.model_source
        if source.is_dir():
            return ModelFiles(directory=str(source))
        return ModelFiles(directory=str(source.parent), gguf=source.name)


async def publish_model(
    directory: Path, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float], base: str
) -> str:
    """Make a whole model the newest version of `name` in the library of the state directory; returns its label. `base`:
    name of the model that it was trained from. Raises `StorageUnavailable`."""
    record = ModelRecord(job=job_id, step=step, metrics=dict(metrics), base=base, created=time.time())
    try:
        return await asyncio.to_thread(ModelLibrary(directory).publish, name, source, record)
    except OSError as error:
        raise storage_unavailable("The model cannot be stored", error) from error


def refuse_own_tokens(plan: Plan) -> None:
    """Raise `InvalidRequest` where a launched job would change the vocabulary. The recipe's other keys for it were
    refused when it was read."""
    own = plan.vocabulary
    if plan.launch is not None and own is not None and (own.tokens or own.rows.kinds or own.eos_id is not None):
        param, message = own_tokens_problem()
        raise InvalidRequest(f"{param}: {message}.", param=param)


_COMPUTING = frozenset(
    {
        "bf16", "communication_data_type", "data_types", "fp16", "gradient_accumulation_steps", "gradient_clipping",
        "gradient_predivide_factor", "optimizer", "prescale_gradients", "scheduler",
        "seq_parallel_communication_data_type", "sparse_gradients", "steps_per_print", "train_batch_size",
        "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "zero_optimization",
    }
)  # fmt: skip
"""Parts of DeepSpeed's configuration that recipes may have."""
MAX_CONFIG = 64 * 1024
"""Bytes of a configuration."""
_DECIDED = ("optimizer", "scheduler")
"""Parts of DeepSpeed's configuration that a recipe has keys for."""
