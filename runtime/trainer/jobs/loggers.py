"""Loggers of other tools that a recipe asks for: TensorBoard, Weights & Biases, MLflow, trackio.

Each writes files into the job's folder, and none sends anything. They run on a thread of their own, off the path of
steps; one that fails is left out from then on, and the job goes on.
"""

import importlib
import importlib.util
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from runtime.events import EvalEvent, StepEvent
from runtime.support.durable import make_directory
from runtime.support.logs import get_logger
from runtime.trainer.recipe import Recipe

MAX_WAITING = 10_000
"""Most reports that wait to be logged; further ones are left out."""
CLOSE_SECONDS = 30.0
"""Longest wait at a job's end for what was not logged yet."""

_log = get_logger("jobs")


class JobLogger(Protocol):
    """A tool that records numbers. Every method may block, and raise anything."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, recipe: Recipe, job_id: str, folder: Path) -> None:
        self._writer = importlib.import_module("tensorboard.summary").Writer(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run in mode offline; `wandb sync` sends it."""

    def __init__(self, recipe: Recipe, job_id: str, folder: Path) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=recipe.wandb_project or "eft",
            entity=recipe.wandb_entity,
            name=recipe.wandb_name or job_id,
            id=recipe.wandb_run_id or job_id,
            dir=str(folder),
            mode="offline",
            reinit="create_new",
            # Nothing about this process: neither what it prints, nor its code.
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run in a store of files."""

    def __init__(self, recipe: Recipe, job_id: str, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # from version 3.7 on it is refused otherwise
        self._client = importlib.import_module("mlflow").MlflowClient(tracking_uri=folder.absolute().as_uri())
        name = recipe.mlflow_experiment_name or "eft"
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self._run = self._client.create_run(experiment, run_name=recipe.mlflow_run_name or job_id).info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    """A run in a database in the folder; `TRACKIO_DIR=FOLDER trackio show` shows it. In a process of its own: the
    library has one folder a process, and its variables may have it send everything to a Space."""

    _CHILD = """
import json, sys, trackio
run = trackio.init(project=sys.argv[1], name=sys.argv[2], resume="allow", embed=False,
                   auto_log_gpu=False, auto_log_cpu=False)
for line in sys.stdin:
    values, step = json.loads(line)
    run.log(values, step=step)
trackio.finish()
"""

    def __init__(self, recipe: Recipe, job_id: str, folder: Path) -> None:
        if importlib.util.find_spec("trackio") is None:
            raise ModuleNotFoundError("trackio is not installed", name="trackio")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
        names = (recipe.trackio_project_name or "eft", recipe.trackio_run_name or job_id)
        self._child = subprocess.Popen(
            [sys.executable, "-c", self._CHILD, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**kept, "TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"},
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode((values, step)) + b"\n")
        self._child.stdin.flush()

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()  # with it the process ends, as it does with this one
        if self._child.wait(CLOSE_SECONDS):
            raise RuntimeError(f"its process ended with code {self._child.returncode}")


OPENERS: dict[str, Callable[[Recipe, str, Path], JobLogger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
"""Name of a logger → what opens it, in a folder of its own."""


class JobLoggers:
    """The loggers of one job at work. Event loop only, but for the thread's own."""

    def __init__(self, recipe: Recipe, job_id: str, folder: Path, on_problem: Callable[[str], None]) -> None:
        """`folder`: the job's. `on_problem` is called on the loggers' thread, once for each that fails."""
        self._recipe = recipe
        self._job_id = job_id
        self._folder = folder
        self._on_problem = on_problem
        self._waiting: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        if recipe.loggers:
            self._thread = threading.Thread(target=self._work, name="loggers", daemon=True)
            self._thread.start()

    def note(self, event: object) -> None:
        """Log a step or an evaluation, soon. Never blocks."""
        if self._thread is None or not isinstance(event, StepEvent | EvalEvent):
            return
        prefix = "train" if isinstance(event, StepEvent) else "eval"
        values = {f"{prefix}/{name}": value for name, value in event.named.items()}
        if isinstance(event, StepEvent):
            values |= {"train/learning_rate": event.learning_rate, "train/grad_norm": event.grad_norm}
        try:
            self._waiting.put_nowait((values, event.step))
        except queue.Full:
            _log.warning("logger_is_slow", job=self._job_id, step=event.step)

    def end(self) -> threading.Thread | None:
        """Have everything written and closed; the thread that does it, to be joined off the event loop."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:  # it hangs: it ends with the process
                return None
        return thread

    def _work(self) -> None:
        loggers: dict[str, JobLogger] = {}
        for name in self._recipe.loggers:
            self._try(name, loggers, partial(self._open, name, loggers))
        while (item := self._waiting.get()) is not None:
            values, step = item
            for name in list(loggers):
                self._try(name, loggers, partial(loggers[name].log, values, step))
        for name in list(loggers):
            self._try(name, loggers, loggers[name].close)

    def _open(self, name: str, loggers: dict[str, JobLogger]) -> None:
        folder = self._folder / name
        make_directory(folder)
        loggers[name] = OPENERS[name](self._recipe, self._job_id, folder)

    def _try(self, name: str, loggers: dict[str, JobLogger], work: Callable[[], Any]) -> None:
        try:
            work()
        except ModuleNotFoundError:
            self._on_problem(f"Nothing is logged to {name}, which is not installed: pip install 'eft-server[{name}]'.")
        except Exception as error:
            loggers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            _log.warning("logger_failed", job=self._job_id, logger=name, reason=reason)
            self._on_problem(f"The logger {name} failed, and logs nothing more: {reason}"[:500])
