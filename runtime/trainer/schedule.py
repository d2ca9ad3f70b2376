"""The schedule of a run: its micro-batches in each epoch, and its steps.

Micro-batches come in another order each epoch, the same for the same seed, and as many every time. Nothing is padded:
attention keeps the examples of a micro-batch apart. So a packed bin is no more than a group of examples that have room
in `sequence_len` tokens together. Bins are made once; epochs differ in their order.
"""

import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from runtime.trainer.data.example import Example
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.rules import beta_of

# Examples that are packed at a time: packing all at once would put all long ones first.
PACKING_WINDOW_EXAMPLES = 2048
# Micro-batches within which examples are sorted by length: of like length, and still in no order.
MEGABATCH_MICRO_BATCHES = 50

Bin = tuple[int, ...]
"""Indices of examples."""


def pack(lengths: Sequence[int], capacity: int, *, window: int = PACKING_WINDOW_EXAMPLES) -> list[Bin]:
    """Bins of at most `capacity` tokens that hold every example once: longest first, each into the fullest
    bin that has room for it, by windows.

    An example that is longer than `capacity` has a bin of its own.
    """
    bins: list[Bin] = []
    for start in range(0, len(lengths), window):
        bins += _pack_window(lengths, range(start, min(start + window, len(lengths))), capacity)
    return bins


def pack_in_order(lengths: Sequence[int], capacity: int) -> list[Bin]:
    """Bins of neighbours: an example that has no room in the last bin begins the next."""
    bins: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not bins or length > room:
            bins.append([])
            room = capacity
        bins[-1].append(index)
        room -= length
    return [tuple(bin) for bin in bins]


def grouped(lengths: Sequence[int], group_size: int, capacity: int | None, *, in_order: bool = False) -> list[Bin]:
    """Bins of whole groups of `group_size` examples that follow each other: packed where there is a `capacity`, else
    a bin each. `in_order`: neighbours share a bin."""
    starts = range(0, len(lengths), group_size)
    groups = [tuple(range(start, start + group_size)) for start in starts]
    if capacity is None:
        return groups
    packed = (pack_in_order if in_order else pack)([sum(lengths[i] for i in group) for group in groups], capacity)
    return [tuple(index for number in bin for index in groups[number]) for bin in packed]


def _pack_window(lengths: Sequence[int], indices: range, capacity: int) -> list[Bin]:
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            filled.append([index])
            insort(room, (max(0, capacity - lengths[index]), len(filled) - 1))
        else:
            free, number = room.pop(at)
            filled[number].append(index)
            insort(room, (free - lengths[index], number))
    return [tuple(bin) for bin in filled]


def epoch_order(
    bins: Sequence[Bin],
    lengths: Sequence[int],
    *,
    micro_batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    by_length: bool,
) -> list[list[int]]:
    """The micro-batches of an epoch (from 0), as indices of examples."""
    order = list(range(len(bins)))
    if shuffle:
        random.Random(f"epoch {epoch} of {seed}").shuffle(order)
    if by_length:
        order = _by_length(order, bins, lengths, micro_batch_size)
    groups = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    return [[index for number in group for index in bins[number]] for group in groups]


def _by_length(order: list[int], bins: Sequence[Bin], lengths: Sequence[int], micro_batch_size: int) -> list[int]:
    """Sorted by length within megabatches, longest first: what does not fit in memory fails at once."""
    size = MEGABATCH_MICRO_BATCHES * micro_batch_size
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        number for part in parts for number in sorted(part, key=lambda n: -sum(lengths[index] for index in bins[n]))
    ]


def chosen(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> list[list[Example]]:
    """The micro-batches themselves."""
    return [[examples[index] for index in batch] for batch in batches]


def step_groups(
    epoch: Callable[[int], Sequence[Sequence[Example]]], size: int, *, total: int, done: int
) -> Iterator[tuple[float, Sequence[Sequence[Example]]]]:
    """The micro-batches of each step after the first `done` of `total`, and the epoch that the step ends at. `epoch`
    gives the micro-batches of an epoch (from 0), of which `size` make a step."""
    step = number = 0
    while step < total:
        batches = epoch(number)
        groups = [batches[first : first + size] for first in range(0, len(batches), size)]
        for index, group in enumerate(groups[: total - step], 1):
            if step + index > done:
                yield number + index / len(groups), group
        step += len(groups)
        number += 1


# -- feed ------------------------------------------------------------------------------------------
#
# The data of a run: examples, and their order in each epoch. Can be sent to another process.


@dataclass(frozen=True, kw_only=True)
class ExampleFeed:
    """The data of one run."""

    train: list[Example] = field(repr=False)
    bins: list[Bin] = field(repr=False)
    """Examples that are packed together."""
    recipe: Recipe = field(repr=False)
    """Size and order of the micro-batches."""
    test: list[list[Example]] = field(repr=False)
    """Micro-batches to evaluate on."""

    def epoch(self, number: int) -> Sequence[Sequence[Example]]:
        """The micro-batches of an epoch, from 0. The same for the same feed and epoch, whatever ran before."""
        recipe = self.recipe
        order = epoch_order(
            self.bins,
            [len(example) for example in self.train],
            micro_batch_size=recipe.micro_batch_size,
            seed=recipe.seed,
            epoch=number,
            shuffle=recipe.shuffle_merged_datasets,
            by_length=recipe.group_by_length,
        )
        return chosen(self.train, order)


# -- steps -----------------------------------------------------------------------------------------
#
# Number of a job's steps, the steps at which something happens besides training, the learning rate over them, and the
# loss at which they end.

DEFAULT_WARMUP = 0.03
MOST_DEFAULT_WARMUP = 100
"""Axolotl's defaults, for recipes without warmup settings."""


class Schedule(Struct, frozen=True, kw_only=True):
    """Schedule in steps of the optimiser, counted from 1. The last step of an epoch may have fewer micro-batches."""

    microbatches_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    epochs: float
    """Passes over the data: total steps through steps of an epoch."""
    warmup_steps: int
    eval_every: int | None
    """Steps between evaluations; None: at the end alone, if there is test data."""
    save_every: int | None
    """Steps between checkpoints; None: none, but when the job is paused."""


def make_schedule(recipe: Recipe, microbatches: int, *, evaluates: bool, ranks: int = 1) -> Schedule:
    """The schedule of a recipe whose epochs have `microbatches` micro-batches, of which each of `ranks` computes
    `gradient_accumulation_steps` in a step."""
    per_epoch = math.ceil(microbatches / (recipe.gradient_accumulation_steps * ranks))
    # A hair less, so that 0.1 × 30 is 3 steps and not 4.
    total = recipe.max_steps or max(1, math.ceil(per_epoch * recipe.num_epochs - 1e-9))
    eval_every = None
    if evaluates and recipe.eval_strategy != "no":
        eval_every = _every(recipe.eval_steps, recipe.evals_per_epoch, per_epoch, total)
    save_every = eval_every if recipe.save_strategy == "best" else None  # every checkpoint has the best weights, too
    if recipe.save_strategy not in ("no", "best"):
        save_every = _every(recipe.save_steps, recipe.saves_per_epoch, per_epoch, total)
    return Schedule(
        microbatches_per_epoch=microbatches,
        steps_per_epoch=per_epoch,
        total_steps=total,
        epochs=total / per_epoch,
        warmup_steps=_warmup(recipe, total),
        eval_every=eval_every,
        save_every=save_every,
    )


def rate_factor(recipe: Recipe, schedule: Schedule, step: int) -> float:
    """Factor of the learning rate at step `step` (from 1): warmup, then `lr_scheduler`. The values of transformers'
    `get_scheduler`, of torch's `OneCycleLR`, and of Axolotl's own for the constant tail, quadratic warmup and rex."""
    done, warmup = step - 1, schedule.warmup_steps
    if recipe.lr_scheduler == "one_cycle":
        return _one_cycle(recipe, schedule, done)
    if done < warmup:
        return (done / max(1, warmup)) ** (2 if recipe.lr_quadratic_warmup else 1)
    return _DECAYS[recipe.lr_scheduler](recipe, schedule, done - warmup)


# -- decays ----------------------------------------------------------------------------------------
#
# Factors after `done` steps since the warmup.


def _constant(recipe: Recipe, schedule: Schedule, done: int) -> float:
    return 1.0


def _linear(recipe: Recipe, schedule: Schedule, done: int) -> float:
    return max(0.0, 1.0 - _progress(schedule, done))


def _cosine(recipe: Recipe, schedule: Schedule, done: int) -> float:
    """Half a wave, down to a least share; with `cosine_constant_lr_ratio` over that share of the steps alone."""
    end = schedule.total_steps
    if recipe.cosine_constant_lr_ratio is not None:
        end = int(end * recipe.cosine_constant_lr_ratio)
    progress = min(1.0, done / max(1, end - schedule.warmup_steps))
    least, waves = least_share(recipe), recipe.lr_scheduler_kwargs.get("num_cycles", 0.5)
    return max(0.0, least + (1 - least) * 0.5 * (1 + math.cos(2 * math.pi * waves * progress)))


def _cosine_with_restarts(recipe: Recipe, schedule: Schedule, done: int) -> float:
    progress = _progress(schedule, done)
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (recipe.lr_scheduler_kwargs.get("num_cycles", 1) * progress % 1)))


def _polynomial(recipe: Recipe, schedule: Schedule, done: int) -> float:
    end = recipe.lr_scheduler_kwargs.get("lr_end", 1e-7) / recipe.learning_rate
    left = max(0.0, 1 - _progress(schedule, done))
    return float(end + (1 - end) * left ** recipe.lr_scheduler_kwargs.get("power", 1.0))


def _inverse_sqrt(recipe: Recipe, schedule: Schedule, done: int) -> float:
    scale = recipe.lr_scheduler_kwargs.get("timescale", schedule.warmup_steps or 10_000)
    return 1 / math.sqrt((done + scale) / scale)


def _rex(recipe: Recipe, schedule: Schedule, done: int) -> float:
    """Reflected exponential (arXiv:2107.04197), with Axolotl's constants: it stays high for longer than a line."""
    left = max(0.0, 1 - _progress(schedule, done))
    least = least_share(recipe)
    return least + (1 - least) * left / (0.1 + 0.9 * left)


def _one_cycle(recipe: Recipe, schedule: Schedule, done: int) -> float:
    """A cosine up from 1 / div_factor, and down to that / final_div_factor (arXiv:1708.07120). Moments stay as they
    are, where torch's scheduler moves them the other way."""
    options, total = recipe.lr_scheduler_kwargs, schedule.total_steps
    first = 1 / options.get("div_factor", 25.0)
    last = first / options.get("final_div_factor", 1e4)
    top = options.get("pct_start", schedule.warmup_steps / total) * total - 1
    if done <= top:
        return _between(first, 1.0, done / top if top > 0 else 1.0)
    return _between(1.0, last, min(1.0, (done - top) / max(1e-9, total - 1 - top)))


def _between(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def _progress(schedule: Schedule, done: int) -> float:
    return done / max(1, schedule.total_steps - schedule.warmup_steps)


def least_share(recipe: Recipe) -> float:
    """Share of the learning rate that cosine and rex end at."""
    options = recipe.lr_scheduler_kwargs
    if "min_lr" in options:
        return options["min_lr"] / recipe.learning_rate
    return options.get("min_lr_rate", recipe.cosine_min_lr_ratio or 0.0)


_DECAYS: dict[str, Callable[[Recipe, Schedule, int], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_min_lr_ratio": _cosine,
    "cosine_with_min_lr": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "rex": _rex,
}


# -- numbers of steps ------------------------------------------------------------------------------


def _every(steps: float | None, times: int | None, per_epoch: int, total: int) -> int | None:
    if steps is not None:
        return _steps(steps, total)
    if times == 0:
        return None
    return max(1, math.ceil(per_epoch / (times or 1)))


def _steps(amount: float, total: int) -> int:
    """A number of steps, or, below 1, a share of all."""
    return int(amount) if amount >= 1 else max(1, math.ceil(amount * total))


def _warmup(recipe: Recipe, total: int) -> int:
    if recipe.lr_scheduler == "constant":
        return 0
    if recipe.warmup_steps is not None:
        share = recipe.warmup_steps < 1
        return min(total, int(recipe.warmup_steps * total) if share else int(recipe.warmup_steps))
    if recipe.warmup_ratio is not None:
        return int(recipe.warmup_ratio * total)
    return min(int(DEFAULT_WARMUP * total), MOST_DEFAULT_WARMUP)


def watchdog_threshold(recipe: Recipe, vocab_size: int) -> float:
    """Loss above which a run is lost: the recipe's, else one nat more than that of guessing evenly among all tokens.
    That of ipo begins at 1 / (2 beta)², so it is four times that where that is more."""
    guessing = math.log(vocab_size) + 1
    if recipe.rl == "ipo":
        guessing = max(guessing, 1 / beta_of(recipe) ** 2)
    return recipe.loss_watchdog_threshold or guessing
