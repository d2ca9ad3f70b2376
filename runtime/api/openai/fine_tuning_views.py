"""Fine-tuning jobs in OpenAI's form, and the recipes that their requests become.

A job has one record, that of `/admin/train`: its recipe. The request is the first line of the recipe, as a comment, so
that it is kept, copied and rebuilt with it. Jobs that were posted as recipes are shown too, without a request.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from runtime.trainer.jobs.records import Job, JobCheckpoint, JobEvent, JobProgress, JobState

ORGANIZATION = "eft"
"""Organisation in the names of fine-tuned models and in `organization_id`."""

TRAIN_FILE, VALIDATION_FILE = "train.jsonl", "validation.jsonl"
"""Names that the recipe has for the files of a request."""

LEARNING_RATE = 2e-4
"""Learning rate of a `learning_rate_multiplier` of 1."""

DPO_LEARNING_RATE = 5e-5
"""The same of a job that trains on preferences."""

AUTO_EPOCHS, AUTO_BATCH = 3, 4
"""Values of `n_epochs` and `batch_size` where they are auto."""

MAX_MICRO_BATCH = 4
"""Most examples at once; larger batches are accumulated."""

MAX_BASE_CHARS = 40
"""Characters of the base model's name in the name of a fine-tuned one, which may have 128 in all."""

_MARK = b"# request: "


class Hyperparameters(Struct, frozen=True, kw_only=True):
    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"


class MethodOptions(Struct, frozen=True, kw_only=True):
    hyperparameters: Hyperparameters = Hyperparameters()


class DpoHyperparameters(Struct, frozen=True, kw_only=True):
    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"
    beta: float | Literal["auto"] = "auto"


class DpoOptions(Struct, frozen=True, kw_only=True):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: MethodOptions | None = None
    dpo: DpoOptions | None = None
    reinforcement: dict[str, Any] | None = None


class WandbOptions(Struct, frozen=True, kw_only=True, omit_defaults=True):
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(Struct, frozen=True, kw_only=True):
    type: Literal["wandb"]
    wandb: WandbOptions


class FineTuningRequest(Struct, frozen=True, kw_only=True):
    """OpenAI's request; `recipe` is ours."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[Integration] | None = None
    recipe: dict[str, Any] | None = None
    """Keys of a recipe, which go before what the request would make of them."""

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, from either place."""
        if self.method is not None and self.method.supervised is not None:
            return self.method.supervised.hyperparameters
        if (dpo := self.dpo) is not None and self.hyperparameters is None:
            return Hyperparameters(
                n_epochs=dpo.n_epochs,
                batch_size=dpo.batch_size,
                learning_rate_multiplier=dpo.learning_rate_multiplier,
            )
        return self.hyperparameters or Hyperparameters()

    @property
    def dpo(self) -> DpoHyperparameters | None:
        """Those of a job that trains on preferences; None for any other."""
        if self.method is None or self.method.type != "dpo":
            return None
        return (self.method.dpo or DpoOptions()).hyperparameters


class JobFault(Struct, kw_only=True):
    code: str
    message: str
    param: str | None


class FineTuningJob(Struct, kw_only=True):
    """A job, in OpenAI's form. Times are seconds since the epoch."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION
    status: str
    error: JobFault | None
    hyperparameters: Hyperparameters
    method: Method
    result_files: list[str] = field(default_factory=list)
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int
    integrations: list[Integration] = field(default_factory=list)
    metadata: dict[str, str] | None


class FineTuningEvent(Struct, kw_only=True):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(Struct, kw_only=True, omit_defaults=True):
    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class FineTuningCheckpoint(Struct, kw_only=True):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


RESULTS = "file-results-"
"""Beginning of the id of a result file; the id of its job is the rest."""
RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")

_STATUS: dict[JobState, str] = {"validating": "validating_files", "evaluating": "running", "publishing": "running"}
_requests = msgspec.json.Decoder(FineTuningRequest)


def model_name(base: str, suffix: str | None, job_id: str) -> str:
    """Name of the model that a job makes: `ft:BASE:ORG:SUFFIX:ID`."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-")[:MAX_BASE_CHARS]
    tail = job_id[-8:]
    if tail.isdecimal():  # a number there would be a version
        tail = f"j{tail}"
    return f"ft:{short}:{ORGANIZATION}:{suffix or ''}:{tail}"


def recipe_of(asked: FineTuningRequest, name: str, format: str, context: int) -> bytes:
    """The recipe of a request, as JSON, which is YAML. `format`: type of the training rows; `context`: most tokens of a
    sequence."""
    chosen = asked.chosen
    epochs = AUTO_EPOCHS if chosen.n_epochs == "auto" else chosen.n_epochs
    batch = AUTO_BATCH if chosen.batch_size == "auto" else chosen.batch_size
    multiplier = 1.0 if chosen.learning_rate_multiplier == "auto" else chosen.learning_rate_multiplier
    micro = max(size for size in range(1, MAX_MICRO_BATCH + 1) if batch % size == 0)
    recipe: dict[str, Any] = {
        "name": name,
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "datasets": [{"path": TRAIN_FILE, "type": format}],
        "sequence_len": min(context, 2048),
        "micro_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "num_epochs": epochs,
        "learning_rate": LEARNING_RATE * multiplier,
        "lr_scheduler": "cosine",
    }
    if (dpo := asked.dpo) is not None:
        recipe |= {"rl": "dpo", "learning_rate": DPO_LEARNING_RATE * multiplier}
        if dpo.beta != "auto":
            recipe["rl_beta"] = dpo.beta
    if asked.validation_file is not None:
        recipe["test_datasets"] = [{"path": VALIDATION_FILE, "type": format}]
    if asked.seed is not None:
        recipe["seed"] = asked.seed
    for one in asked.integrations or ():
        keys = {"wandb_project": one.wandb.project, "wandb_name": one.wandb.name, "wandb_entity": one.wandb.entity}
        recipe |= {key: value for key, value in keys.items() if value is not None}
    text = msgspec.json.format(msgspec.json.encode(recipe | (asked.recipe or {})), indent=2)
    return _MARK + msgspec.json.encode(asked) + b"\n" + text + b"\n"


def request_of(job: Job) -> FineTuningRequest | None:
    """The request that a job was made by; None for one that was posted as a recipe."""
    line = job.recipe.partition(b"\n")[0]
    if not line.startswith(_MARK):
        return None
    try:
        return _requests.decode(line.removeprefix(_MARK))
    except msgspec.MsgspecError:  # the comment is a user's: this recipe was not made here
        return None


def job_view(job: Job, progress: JobProgress, served: str, estimated_finish: int | None) -> FineTuningJob:
    """A job, whichever way it was posted. `served`: name of the base model."""
    asked = request_of(job) or FineTuningRequest(model=served, training_file="")
    error, chosen = job.error, asked.chosen
    method = Method(type="supervised", supervised=MethodOptions(hyperparameters=chosen))
    if (dpo := asked.dpo) is not None:
        method = Method(type="dpo", dpo=DpoOptions(hyperparameters=dpo))
    published = job.adapter.partition("@")[0] if job.adapter is not None else None
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        estimated_finish=estimated_finish,
        model=asked.model,
        fine_tuned_model=published,
        status="queued" if job.state == "interrupted" else _STATUS.get(job.state, job.state),
        error=None if error is None else JobFault(code=error.code, message=error.message, param=error.param),
        hyperparameters=chosen,
        method=method,
        result_files=[f"{RESULTS}{job.id}"] if job.state == "succeeded" else [],
        trained_tokens=progress.trained_tokens if job.ended else None,
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        seed=asked.seed or 0,
        integrations=asked.integrations or [],
        metadata=asked.metadata,
    )


def results_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The result file of a job, with OpenAI's columns: a line for each step, out of rows of steps and evaluations."""
    lines: dict[int, dict[str, Any]] = {}
    for row in rows:
        loss, accuracy = RESULT_COLUMNS[3:] if row["type"] == "eval" else RESULT_COLUMNS[1:3]
        line = lines.setdefault(row["step"], {"step": row["step"]})
        line |= {loss: row.get("loss"), accuracy: row.get("accuracy")}
    text = io.StringIO()
    writer = csv.DictWriter(text, RESULT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(line for _, line in sorted(lines.items()))
    return text.getvalue().encode()


def event_view(job_id: str, event: JobEvent) -> FineTuningEvent:
    """An event in OpenAI's shape."""
    return FineTuningEvent(
        id=f"ftevent-{job_id}-{event.number}",
        created_at=int(event.created_at),
        level="warn" if event.level == "warning" else event.level,
        message=event.message,
        type="metrics" if event.kind in ("step", "eval") else "message",
        data=event.data,
    )


def checkpoint_view(job: Job, checkpoint: JobCheckpoint, metrics: dict[str, float]) -> FineTuningCheckpoint:
    """A checkpoint in OpenAI's shape."""
    return FineTuningCheckpoint(
        id=f"ftckpt-{job.id}-{checkpoint.step}",
        created_at=int(checkpoint.created_at),
        fine_tuned_model_checkpoint=f"{job.name or job.id}:ckpt-step-{checkpoint.step}",
        fine_tuning_job_id=job.id,
        step_number=checkpoint.step,
        metrics=CheckpointMetrics(
            step=checkpoint.step,
            train_loss=metrics.get("train_loss"),
            train_mean_token_accuracy=metrics.get("train_accuracy"),
            full_valid_loss=metrics.get("eval_loss"),
            full_valid_mean_token_accuracy=metrics.get("eval_accuracy"),
        ),
    )
