"""Makes the plan of a training run from a recipe and its data. Trains nothing, and needs no engine and no torch."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from runtime.adapters.card import Card, Prompt
from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.data.examples import Reader, RowCounts, names_of, without_duplicates
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.preferences import with_companions
from runtime.trainer.data.prepared import KeptData, PreparedData
from runtime.trainer.evaluation.rows import GenerationRow, generation_rows
from runtime.trainer.plan.estimate import Estimate, estimate
from runtime.trainer.plan.notes import (
    end_warnings,
    format_notes,
    generation_notes,
    how_to_ask,
    mask_warnings,
    prompt_of,
    row_notes,
    schedule_warnings,
    stop_texts,
    template_notes,
    unread_notes,
)
from runtime.trainer.plan.preview import LISTED, ExampleLine, PreviewPiece, example_lines, preview
from runtime.trainer.plan.served_model import (
    ModelShape,
    TargetKey,
    TemplateChoice,
    choose_template,
    end_ids,
    ranks_of,
    resolve_targets,
    with_template,
)
from runtime.trainer.plan.vocabulary import VocabularyPlan, plan_vocabulary
from runtime.trainer.recipe import Recipe, check_base_model
from runtime.trainer.recipe.launch import Launch, launch_of
from runtime.trainer.recipe.schema import DATA_GROUPS
from runtime.trainer.schedule import Bin, ExampleFeed, Schedule, grouped, make_schedule, watchdog_threshold

PREVIEWS = 3
TRAINING_PASSES = 3
"""Cost of training on a token, in forward passes of it."""


class DataStats(Struct, frozen=True, kw_only=True):
    """One set of rows, for training or for evaluation, with the numbers by outcome."""

    counts: RowCounts
    examples: int
    """Examples of the set, of preferences pairs: rows that are used, less duplicates, and less the rows of the other
    set."""
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest example."""


class AdapterOrigin(NamedTuple):
    """The adapter that a job goes on from."""

    directory: Path
    """Folder with its files, in PEFT's format."""
    label: str
    """`name@version`, or the name of the folder that the recipe gave."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A job that is ready to run."""

    recipe: Recipe
    model_name: str
    targets: list[TargetKey]
    """Linears to adapt: (layer, name in the checkpoint)."""
    train: list[Example]
    test: list[Example]
    """Empty: nothing is evaluated."""
    schedule: Schedule
    train_stats: DataStats
    test_stats: DataStats
    estimate: Estimate
    watchdog_threshold: float
    previews: list[list[PreviewPiece]]
    """The first examples, with what is trained on marked."""
    listed: list[ExampleLine]
    """The first examples in short."""
    prompt: Prompt
    """Form of requests to the adapter."""
    how_to_ask: str
    """The same in words, after "ask it"."""
    warnings: list[str]
    """Likely mistakes. They are logged, and stand in the job's events."""
    notes: list[str]
    """All notes on the plan, the warnings first."""
    bins: list[Bin] = field(repr=False)
    """Examples that are packed together; each by itself without sample_packing."""
    template: TemplateChoice | None = None
    """Chat template that goes with the adapter; None: the served model's own."""
    end_ids: tuple[int, ...] = ()
    """Ids that end the adapter's answers, besides those of the model and its template."""
    stop: tuple[str, ...] = ()
    """Texts that do, where the template that goes with the adapter ends a turn with no single token."""
    generation: list[GenerationRow] = field(default_factory=list, repr=False)
    """Rows that evaluations generate answers for."""
    vocabulary: VocabularyPlan | None = None
    """Tokens of the adapter's own, and rows of embedding and head that are trained; None: all are the model's."""
    launch: Launch | None = None
    """The processes that the job runs in; None: the serving one."""
    origin: AdapterOrigin | None = None
    """The adapter that the job goes on from."""

    @property
    def card(self) -> Card:
        """The card of the adapters that it makes."""
        own = self.vocabulary
        return Card(
            prompt=self.prompt,
            chat_template=None if self.template is None else self.template.source,
            end_ids=self.end_ids,
            stop=self.stop,
            tokens=() if own is None else own.tokens,
            eos_id=None if own is None else own.eos_id,
            vocab_size=None if own is None else own.size,
            went_on_from=None if self.origin is None else self.origin.label,
        )


def prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    files: DataFiles,
    *,
    model_names: tuple[str, ...],
    max_len: int,
    shape: ModelShape,
    kept: KeptData | None = None,
    max_vocabulary: int | None = None,
    devices: int = 0,
    nodes: int = 1,
    origin: AdapterOrigin | None = None,
    on_rows: Callable[[int, int], None] | None = None,
    riding_bytes: int = 0,
) -> Plan:
    """Read, check and tokenise a recipe's data, and work out its steps. Takes as long as tokenising does.

    `model_names` are those of the served model, its own first; `max_len` is the longest sequence that it can be
    trained on; `kept` has the data of a job that was read before; `max_vocabulary`: most bytes of the adapter's rows
    of embedding and head; `devices` are set aside for jobs on each of `nodes`; `origin` is the adapter to go on from,
    which the recipe agrees with; `on_rows`: see `Reader`; `riding_bytes`: see `estimate`.
    Raises `InvalidRequest` (`BadRows` for rows), `ModelNotFound` and `Forbidden`.
    """
    check_base_model(recipe, model_names)
    if recipe.sequence_len > max_len:
        raise InvalidRequest(
            f"sequence_len must be at most {max_len}, the served model's context, got {recipe.sequence_len}.",
            param="sequence_len",
        )
    launch = launch_of(recipe, devices, nodes)
    full, ranks = (False, 1) if launch is None else (launch.full, launch.ranks)
    targets = [] if full else resolve_targets(recipe, shape)
    ranks_of_targets = [] if full else ranks_of(recipe, shape, targets)
    template = choose_template(recipe, tokenizer)
    vocabulary = None
    if recipe.changes_vocabulary:
        source = None if template is None else template.source
        vocabulary = plan_vocabulary(recipe, tokenizer, shape, template=source, limit=max_vocabulary)
        tokenizer = vocabulary.tokenizer
    if template is not None:
        tokenizer = with_template(tokenizer, template.source)
    ends = end_ids(recipe, tokenizer)
    entries = [entry for group in DATA_GROUPS for entry in getattr(recipe, group)]
    files = files.naming(name for entry in entries for name in names_of(entry))
    data = None if kept is None else kept.read(recipe, tokenizer, ends, files)
    if data is None:
        stops = template is not None and bool(stop_texts(tokenizer, ends))
        data = _read(
            Reader(recipe, tokenizer, files, ends, on_rows), recipe, tokenizer, files, ends, stops_at_text=stops
        )
        if kept is not None:
            kept.write(recipe, tokenizer, ends, data)
    train, test = data.train, data.test
    if recipe.val_set_size > 0:
        train, test = _held_out(train, recipe)
    test, asked = test or data.generation, data.generation or test
    if recipe.rl is not None:
        _check_labels(recipe, train)
        train, test, asked = (with_companions(some, recipe.rl, recipe.sequence_len) for some in (train, test, asked))
    lengths = [len(example) for example in train]
    capacity = recipe.sequence_len if recipe.sample_packing else None
    bins = grouped(lengths, recipe.group_size, capacity, in_order=recipe.sample_packing_sequentially)
    schedule = make_schedule(recipe, -(-len(bins) // recipe.micro_batch_size), evaluates=bool(test), ranks=ranks)
    generation = generation_rows(recipe, asked, tokenizer, max_len=max_len) if recipe.num_generated else []
    sizes = sorted((sum(lengths[index] for index in bin) for bin in bins), reverse=True)
    warnings = [
        *data.warnings,
        *schedule_warnings(recipe, schedule),
        *row_notes(recipe, data.train_counts, "datasets"),
        *row_notes(recipe, data.test_counts, "test_datasets"),
    ]
    return Plan(
        recipe=recipe,
        model_name=model_names[0],
        targets=targets,
        train=train,
        test=test,
        schedule=schedule,
        train_stats=_stats(train, data.train_counts, recipe.group_size),
        test_stats=_stats(test, data.test_counts, recipe.group_size),
        estimate=estimate(
            recipe,
            shape,
            targets,
            ranks_of_targets,
            largest=sum(sizes[: recipe.micro_batch_size]),
            tokens=round(
                sum(lengths) * (schedule.epochs + _reference_passes(recipe, schedule))
                + sum(map(len, test)) * _evaluations(recipe, schedule) / TRAINING_PASSES
            ),
            rows=0 if vocabulary is None else vocabulary.rows.rows,
            riding_bytes=riding_bytes if launch is None else 0,
        ),
        watchdog_threshold=watchdog_threshold(recipe, shape.vocab_size),
        previews=[preview(example, tokenizer) for example in train[: PREVIEWS - PREVIEWS % recipe.group_size]],
        listed=example_lines(train[: LISTED - LISTED % recipe.group_size], tokenizer),
        prompt=data.prompt,
        how_to_ask=how_to_ask(data.prompt, chats=tokenizer.chat_template is not None),
        warnings=warnings,
        notes=[
            *warnings,
            *template_notes(template, data.prompt),
            *([] if vocabulary is None else vocabulary.notes()),
            *generation_notes(recipe, len(generation), len(asked) // recipe.group_size),
            *data.notes,
            *recipe.notes,
        ],
        bins=bins,
        template=None if data.prompt.format != "chat" else template,
        end_ids=tuple(sorted(ends.difference(tokenizer.eos_ids))),
        stop=() if template is None else stop_texts(tokenizer, ends),
        generation=generation,
        vocabulary=vocabulary,
        launch=launch,
        origin=origin,
    )


def _read(
    reader: Reader,
    recipe: Recipe,
    tokenizer: Tokenizer,
    files: DataFiles,
    ends: frozenset[int],
    *,
    stops_at_text: bool,
) -> PreparedData:
    """The examples of the recipe's files, and remarks on them. `stops_at_text`: answers of the adapter end at a text.
    Raises as `prepare`."""
    train_counts, test_counts = RowCounts(), RowCounts()
    train = _shard(reader.read("datasets", recipe.datasets, train_counts), recipe)
    test = reader.read("test_datasets", recipe.test_datasets, test_counts)
    generation_counts = RowCounts()
    generation = reader.read("generation_datasets", recipe.generation_datasets, generation_counts)
    if recipe.dataset_exact_deduplication:
        seen: set[bytes] = set()
        size = recipe.answers_per_row
        train, test = _unique(train, train_counts, seen, size), _unique(test, test_counts, seen, size)
    train_counts.used, test_counts.used = (len(some) // recipe.answers_per_row for some in (train, test))
    if not train:
        raise InvalidRequest(_nothing_left(recipe, train_counts), param="datasets", code="invalid_data")
    if recipe.test_datasets and not test:
        raise InvalidRequest(_nothing_left(recipe, test_counts), param="test_datasets", code="invalid_data")
    if recipe.generation_datasets and not generation:
        text = _nothing_left(recipe, generation_counts)
        raise InvalidRequest(text, param="generation_datasets", code="invalid_data")
    return PreparedData(
        train=train,
        test=test,
        generation=generation,
        train_counts=train_counts,
        test_counts=test_counts,
        prompt=prompt_of(reader.datasets),
        warnings=[
            *end_warnings(reader.datasets, tokenizer, ends, stops_at_text=stops_at_text),
            *mask_warnings(reader.datasets, recipe),
        ],
        notes=[*unread_notes(reader.datasets, files.unused), *format_notes(reader.datasets)],
    )


def feed(plan: Plan) -> ExampleFeed:
    """Data for a run of this plan; every epoch has `schedule.microbatches_per_epoch`."""
    return ExampleFeed(train=plan.train, bins=plan.bins, recipe=plan.recipe, test=eval_microbatches(plan))


def eval_microbatches(plan: Plan) -> list[list[Example]]:
    """The test set in batches of `eval_batch_size`, in its order."""
    size = (plan.recipe.eval_batch_size or plan.recipe.micro_batch_size) * plan.recipe.group_size
    return [plan.test[start : start + size] for start in range(0, len(plan.test), size)]


def _unique(examples: list[Example], counts: RowCounts, seen: set[bytes], size: int) -> list[Example]:
    kept = without_duplicates(examples, seen, size)
    counts.duplicates += (len(examples) - len(kept)) // size
    return kept


def _shard(examples: list[Example], recipe: Recipe) -> list[Example]:
    """The piece of all rows that the recipe asks for; pieces differ by one row at most."""
    if recipe.dataset_shard_num is None or recipe.dataset_shard_idx is None:
        return examples
    count, index = recipe.dataset_shard_num, recipe.dataset_shard_idx
    return examples[len(examples) * index // count : len(examples) * (index + 1) // count]


def _held_out(examples: list[Example], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Training and test set; which rows are held out depends on the seed alone."""
    amount, size = recipe.val_set_size, recipe.answers_per_row
    rows = len(examples) // size
    count = int(amount) if amount >= 1 else max(1, round(amount * rows))
    if count >= rows:
        raise InvalidRequest(
            f"val_set_size ({amount:g}) holds out {count} of {rows} rows, and none is left to train on.",
            param="val_set_size",
        )
    held = set(random.Random(f"held out of {recipe.seed}").sample(range(rows), count))
    train = [example for index, example in enumerate(examples) if index // size not in held]
    return train, [example for index in sorted(held) for example in examples[index * size : (index + 1) * size]]


def _check_labels(recipe: Recipe, train: list[Example]) -> None:
    """Raise `InvalidRequest` where labels are all alike, of which nothing is learned."""
    if recipe.rl == "kto" and len({example.weight for example in train}) < 2:
        label = "desirable" if train[0].weight > 0 else "undesirable"
        raise InvalidRequest(
            f"All {len(train)} answers to train on are {label}, and kto learns by the difference: add others, or "
            "train on the desirable ones without rl.",
            param="datasets",
            code="invalid_data",
        )


def _reference_passes(recipe: Recipe, schedule: Schedule) -> float:
    """Epochs that one pass of the reference over all rows takes as long as."""
    if recipe.rl not in ("dpo", "ipo", "kto"):
        return 0.0
    return min(1.0, schedule.epochs) / TRAINING_PASSES


def _evaluations(recipe: Recipe, schedule: Schedule) -> int:
    """Evaluations of held-out rows: those of the schedule, one at the end, and that of the base."""
    every = schedule.eval_every or schedule.total_steps
    return -(-schedule.total_steps // every) + bool(recipe.measures_base)


def _stats(examples: list[Example], counts: RowCounts, group_size: int) -> DataStats:
    return DataStats(
        counts=counts,
        examples=len(examples) // group_size,
        tokens=sum(map(len, examples)),
        trained_tokens=sum(example.num_trained for example in examples),
        longest=max(map(len, examples), default=0),
    )


def _nothing_left(recipe: Recipe, counts: RowCounts) -> str:
    ties = f", {counts.ties} two answers that are the same" if counts.ties else ""
    return (
        f"None of {counts.rows} rows is left: {counts.too_long} have more than sequence_len ({recipe.sequence_len}) "
        f"tokens, {counts.too_short} fewer than min_sample_len ({recipe.min_sample_len}), "
        f"{counts.untrained} no token to train on{ties}."
    )


# -- summary ---------------------------------------------------------------------------------------
#
# A plan in short, for `?dry_run=1`, the job's record and `eft recipe check`. Encodes to JSON as it is.


class PlanSummary(Struct, frozen=True, kw_only=True):
    """Summary of a plan: adapter, data, steps, memory, warnings."""

    base_model: str
    name: str | None
    """The adapter's name where the recipe gives one."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    ranks: int
    effective_batch: int
    """Examples, or packed bins, in a step: micro-batch × accumulation × ranks."""
    method: str
    """`rl` of the recipe, or supervised."""
    packed_bins: int | None
    """Number of bins that the examples were packed into; None without sample_packing."""
    schedule: Schedule
    train: DataStats
    test: DataStats
    linears: dict[str, int]
    """Linears to adapt: name → number of layers."""
    trained_parameters: int
    optimizer_family: str
    watchdog_threshold: float
    """The job fails when the loss is above this…"""
    watchdog_patience: int
    """…for this many steps in a row."""
    estimate: Estimate
    memory_bytes: int
    """Estimated, beside the base model."""
    prompt: Prompt
    """Form of requests to the adapter."""
    how_to_ask: str
    """The same in words, after "ask it"."""
    warnings: list[str]
    """Notes on likely mistakes."""
    notes: list[str]
    previews: list[list[PreviewPiece]]
    listed: list[ExampleLine]
    """The first examples in short, `LISTED` at most."""


def summarize(plan: Plan) -> PlanSummary:
    """The summary of a plan."""
    recipe = plan.recipe
    return PlanSummary(
        base_model=plan.model_name,
        name=recipe.name,
        micro_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        ranks=1 if plan.launch is None else plan.launch.ranks,
        effective_batch=recipe.effective_batch * (1 if plan.launch is None else plan.launch.ranks),
        method=recipe.rl or "supervised",
        packed_bins=len(plan.bins) if recipe.sample_packing else None,
        schedule=plan.schedule,
        train=plan.train_stats,
        test=plan.test_stats,
        linears=dict(Counter(name for _, name in plan.targets)),
        trained_parameters=plan.estimate.parameters,
        optimizer_family=recipe.optimizer_family,
        watchdog_threshold=plan.watchdog_threshold,
        watchdog_patience=recipe.loss_watchdog_patience,
        estimate=plan.estimate,
        memory_bytes=plan.estimate.memory_bytes,
        prompt=plan.prompt,
        how_to_ask=plan.how_to_ask,
        warnings=plan.warnings,
        notes=plan.notes,
        previews=plan.previews,
        listed=plan.listed,
    )
