"""From a recipe and its data to what a training loop runs. Trains nothing, and needs no engine and no torch."""

import random
from dataclasses import dataclass, field

from msgspec import Struct

from runtime.errors import InvalidRequest
from runtime.tokenizer import Tokenizer
from runtime.trainer import batches
from runtime.trainer.data.examples import Counts, Reader, without_duplicates
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.vocabulary import check_templates, end_ids
from runtime.trainer.estimate import Estimate, estimate
from runtime.trainer.examples import Example
from runtime.trainer.feed import Feed
from runtime.trainer.preview import Piece, preview
from runtime.trainer.recipe import Recipe, check_base_model
from runtime.trainer.schedule import Schedule, make_schedule
from runtime.trainer.shape import ModelShape
from runtime.trainer.targets import Target, resolve_targets

PREVIEWS = 3


class DataStats(Struct, frozen=True, kw_only=True):
    """One set of rows, for training or for evaluation, and what became of them."""

    counts: Counts
    examples: int
    """Those of the set: rows that are used, less duplicates, and less those that the other set got."""
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest example."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A job that is ready to run."""

    recipe: Recipe
    model_name: str
    targets: list[Target]
    """Linears to adapt: (layer, name in the checkpoint)."""
    train: list[Example]
    test: list[Example]
    """Empty: nothing is evaluated."""
    schedule: Schedule
    train_stats: DataStats
    test_stats: DataStats
    estimate: Estimate
    previews: list[list[Piece]]
    """The first examples, with what is trained on marked."""
    notes: list[str]
    bins: list[batches.Bin] = field(repr=False)
    """Examples that are packed together; each by itself without sample_packing."""


def prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    files: DataFiles,
    *,
    model_names: tuple[str, ...],
    max_len: int,
    shape: ModelShape,
    tokens_per_second: float | None = None,
) -> Plan:
    """Read, check and tokenise a recipe's data, and work out its steps. Takes as long as tokenising does.

    `model_names` are those of the served model, its own first; `max_len` is the longest sequence that it can be
    trained on; `tokens_per_second` is what training makes here, if that is known. Raises `InvalidRequest`
    (`BadRows` for rows), `ModelNotFound` and `Forbidden`.
    """
    check_base_model(recipe, model_names)
    if recipe.sequence_len > max_len:
        raise InvalidRequest(
            f"sequence_len must be at most {max_len}, the served model's context, got {recipe.sequence_len}.",
            param="sequence_len",
        )
    targets = resolve_targets(recipe, shape)
    check_templates(recipe, tokenizer)
    reader = Reader(recipe, tokenizer, files, end_ids(recipe, tokenizer))
    train_counts, test_counts = Counts(), Counts()
    train = reader.read("datasets", recipe.datasets, train_counts)
    test = reader.read("test_datasets", recipe.test_datasets, test_counts)
    if recipe.dataset_exact_deduplication:
        seen: set[bytes] = set()
        train, test = _unique(train, train_counts, seen), _unique(test, test_counts, seen)
    train_counts.used, test_counts.used = len(train), len(test)
    if not train:
        raise InvalidRequest(_nothing_left(recipe, train_counts), param="datasets", code="invalid_data")
    if recipe.test_datasets and not test:
        raise InvalidRequest(_nothing_left(recipe, test_counts), param="test_datasets", code="invalid_data")
    if recipe.val_set_size > 0:
        train, test = _held_out(train, recipe)
    lengths = [len(example) for example in train]
    bins: list[batches.Bin] = [(index,) for index in range(len(train))]
    if recipe.sample_packing:
        bins = batches.pack(lengths, recipe.sequence_len)
    schedule = make_schedule(recipe, -(-len(bins) // recipe.micro_batch_size), evaluates=bool(test))
    sizes = sorted((sum(lengths[index] for index in bin) for bin in bins), reverse=True)
    return Plan(
        recipe=recipe,
        model_name=model_names[0],
        targets=targets,
        train=train,
        test=test,
        schedule=schedule,
        train_stats=_stats(train, train_counts),
        test_stats=_stats(test, test_counts),
        estimate=estimate(
            recipe,
            shape,
            targets,
            largest=sum(sizes[: recipe.micro_batch_size]),
            tokens=round(sum(lengths) * schedule.epochs),
            tokens_per_second=tokens_per_second,
        ),
        previews=[preview(example, tokenizer) for example in train[:PREVIEWS]],
        notes=[*recipe.notes, *_notes(recipe, tokenizer, train_counts)],
        bins=bins,
    )


def feed(plan: Plan) -> Feed:
    """What a run of this plan is fed with; every epoch has `schedule.microbatches_per_epoch`."""
    recipe = plan.recipe
    return Feed(
        train=plan.train,
        bins=plan.bins,
        micro_batch_size=recipe.micro_batch_size,
        seed=recipe.seed,
        shuffle=recipe.shuffle_merged_datasets,
        by_length=recipe.group_by_length,
        test=eval_microbatches(plan),
    )


def eval_microbatches(plan: Plan) -> list[list[Example]]:
    """The test set in batches of `eval_batch_size`, in its order."""
    size = plan.recipe.eval_batch_size or plan.recipe.micro_batch_size
    return [plan.test[start : start + size] for start in range(0, len(plan.test), size)]


def _unique(examples: list[Example], counts: Counts, seen: set[bytes]) -> list[Example]:
    kept = without_duplicates(examples, seen)
    counts.duplicates += len(examples) - len(kept)
    return kept


def _held_out(examples: list[Example], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Training and test set; which rows are held out depends on the seed alone."""
    amount = recipe.val_set_size
    count = int(amount) if amount >= 1 else max(1, round(amount * len(examples)))
    if count >= len(examples):
        raise InvalidRequest(
            f"val_set_size ({amount:g}) holds out {count} of {len(examples)} rows, and none is left to train on.",
            param="val_set_size",
        )
    held = set(random.Random(f"held out of {recipe.seed}").sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]


def _stats(examples: list[Example], counts: Counts) -> DataStats:
    return DataStats(
        counts=counts,
        examples=len(examples),
        tokens=sum(map(len, examples)),
        trained_tokens=sum(example.num_trained for example in examples),
        longest=max(map(len, examples), default=0),
    )


def _nothing_left(recipe: Recipe, counts: Counts) -> str:
    return (
        f"None of {counts.rows} rows is left: {counts.too_long} have more than sequence_len ({recipe.sequence_len}) "
        f"tokens, {counts.too_short} fewer than min_sample_len ({recipe.min_sample_len}), "
        f"{counts.untrained} no token to train on."
    )


def _notes(recipe: Recipe, tokenizer: Tokenizer, counts: Counts) -> list[str]:
    notes = []
    if counts.untrained:
        notes.append(f"{counts.untrained} rows have no token to train on, such as chats without an answer.")
    if counts.too_long:
        notes.append(f"{counts.too_long} rows are longer than sequence_len ({recipe.sequence_len}) and left out.")
    if not tokenizer.eos_ids:
        notes.append("The model has no token that ends a text: the adapter will not learn to stop.")
    return notes
