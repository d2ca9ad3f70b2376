"""Interface of losses, the function that applies one to a micro-batch, and the scores of the reference.

A loss is a function of the log-probabilities of the targets. The derivative by each of them is all that the head needs
to go on backwards, so a loss knows neither slices nor ranks nor kernels.
"""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from runtime.trainer.data.example import Example, MicroBatch
from runtime.trainer.losses.logprobs import Head, ScoreBuffer, TargetScores
from runtime.trainer.slices import Sliced


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The targets of one micro-batch: R of them in S sequences, sequence by sequence."""

    logprobs: Tensor
    """[R] float32: log-probability of each target under the model with its adapter."""
    reference: Tensor | None
    """[R] float32: the same under the model without the adapter, for a loss with `needs_reference`."""
    trained: Sequence[int]
    """[S] number of targets of each sequence."""
    weights: Tensor
    """[S] float32: `Example.weight` of each sequence."""
    prompt_targets: Sequence[int] = ()
    """[S] number of each sequence's first targets that lie in its prompt; empty where none do."""

    def sums(self, values: Tensor) -> Tensor:
        """Sums of values [R] over each sequence's answer: [S]. The order of addition is fixed, on a GPU too."""
        parts = torch.split(values, list(self.trained))
        prompts = self.prompt_targets or [0] * len(parts)
        return torch.stack([part[prompt:].sum() for part, prompt in zip(parts, prompts, strict=True)])

    def means(self, values: Tensor) -> Tensor:
        """Means of values [R] over each sequence's answer: [S]; 0 for a sequence without targets in it."""
        prompts = self.prompt_targets or [0] * len(self.trained)
        counts = [count - prompt for count, prompt in zip(self.trained, prompts, strict=True)]
        return self.sums(values) / torch.tensor(counts, device=values.device).clamp(min=1)


@dataclass(frozen=True, eq=False)
class LossValue:
    """A loss of one micro-batch."""

    total: Tensor
    """Sum over the loss's units; a scalar, differentiable by `LossInputs.logprobs`."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further numbers of the loss, each a sum over the same units. Reported as means, under these names."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Number of units that a metric is a sum over, where those are not all."""


class Loss(ABC):
    """A training objective; a frozen dataclass, whose fields are its options."""

    group_size: ClassVar[int] = 1
    """Consecutive sequences that belong together, and so stay in one micro-batch: 2 for pairs."""
    needs_reference: ClassVar[bool] = False
    """True to have `LossInputs.reference`, at the cost of another forward pass."""

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> LossValue:
        """Value for one micro-batch, as a differentiable function of the log-probabilities."""

    def units(self, trained: Sequence[int]) -> int:
        """Number of units that the value is a sum over, for sequences with these numbers of targets. A step's loss is
        the mean over the units of all its micro-batches."""
        return len(trained) // self.group_size

    def summary(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics to report, of the means over a step or an evaluation."""
        return metrics

    def slopes(self, batch: MicroBatch) -> Tensor | None:
        """Derivatives [R] by each log-probability, for a loss that is linear in them: the head is then passed through
        once. None: they depend on the log-probabilities, and the head is passed through twice."""
        return None


@dataclass(slots=True)
class Score:
    """Sums over the micro-batches that were scored."""

    loss: float = 0.0
    """Over the loss's units."""
    units: int = 0
    correct: int = 0
    """Targets that were the likeliest token."""
    tokens: int = 0
    """Targets."""
    further: dict[str, float] = field(default_factory=dict)
    """Sums of the loss's own metrics over its units."""
    counts: dict[str, int] = field(default_factory=dict)
    """Units of each of them."""

    def add(self, other: "Score") -> None:
        self.loss += other.loss
        self.units += other.units
        self.correct += other.correct
        self.tokens += other.tokens
        for name, value in other.further.items():
            self.further[name] = self.further.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.units)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.tokens)

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the loss's own metrics; none of those without a unit."""
        return {name: value / self.counts[name] for name, value in self.further.items() if self.counts[name]}


def score_targets(head: Head, hidden: Tensor, batch: MicroBatch) -> Sliced[Tensor]:
    """Log-probabilities [R] of a micro-batch's targets, from hidden states [T, hidden] after the last layer."""
    buffer = ScoreBuffer(hidden, batch, None)
    yield from head.fill(buffer)
    return buffer.scores.logprobs


@dataclass(frozen=True, eq=False)
class LossTerm:
    """The loss of one micro-batch, which may be one of several in a batch."""

    loss: Loss
    batch: MicroBatch
    reference: Tensor | None
    """[R], for a loss with `needs_reference`."""
    weight: float | None
    """Factor of its total in the gradient; None: no gradient is due."""
    start: int = 0
    """Place of the micro-batch's first token in the batch."""

    def value(self, logprobs: Tensor) -> LossValue:
        """Its value for log-probabilities [R]."""
        batch = self.batch
        return self.loss(LossInputs(logprobs, self.reference, batch.trained, batch.weights, batch.prompt_targets))

    def known_slopes(self) -> Tensor | None:
        """`Loss.slopes` times the weight."""
        if self.weight is None or (slopes := self.loss.slopes(self.batch)) is None:
            return None
        return self.weight * slopes

    def slopes_at(self, logprobs: Tensor) -> Tensor | None:
        """Derivatives [R] of weight times its total by log-probabilities [R]; None without a weight."""
        if self.weight is None:
            return None
        leaf = logprobs.detach().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.value(leaf).total, leaf)
        return found * self.weight

    def score(self, scores: TargetScores) -> Score:
        value, units = self.value(scores.logprobs), self.loss.units(self.batch.trained)
        return Score(
            loss=float(value.total),
            units=units,
            correct=int(scores.correct.sum()),
            tokens=self.batch.num_trained,
            further={name: float(total) for name, total in value.metrics.items()},
            counts={name: value.counts.get(name, units) for name in value.metrics},
        )


def apply_losses(
    terms: Sequence[LossTerm], head: Head, hidden: Tensor, batch: MicroBatch
) -> Sliced[tuple[list[Score], Tensor | None]]:
    """Compute losses from hidden states [T, hidden] after the last layer, each of its own tokens of the batch, and the
    gradient of the sum of weight times total with respect to them, [T, hidden]; None where no gradient is due."""
    for term in terms:
        assert len(term.batch.sequences) % term.loss.group_size == 0, "what belongs together is in one micro-batch"
    slopes = [term.known_slopes() for term in terms]
    found: list[TargetScores | None] = [None for _ in terms]
    unknown = [index for index, known in enumerate(slopes) if known is None]
    if unknown:
        buffer = ScoreBuffer(hidden, _targets_of([terms[index] for index in unknown], batch), None)
        yield from head.fill(buffer)
        for index, scores in zip(unknown, _split(buffer.scores, [terms[index] for index in unknown]), strict=True):
            found[index], slopes[index] = scores, terms[index].slopes_at(scores.logprobs)
    sloping = [(term, slope) for term, slope in zip(terms, slopes, strict=True) if slope is not None]
    grad = None
    if sloping:
        some = [term for term, _ in sloping]
        buffer = ScoreBuffer(hidden, _targets_of(some, batch), torch.cat([slope for _, slope in sloping]))
        yield from head.fill(buffer)
        grad, parts = buffer.grad, iter(_split(buffer.scores, some))
        found = [scores if slope is None else next(parts) for scores, slope in zip(found, slopes, strict=True)]
    return [term.score(scores) for term, scores in zip(terms, found, strict=True) if scores is not None], grad


def _targets_of(terms: Sequence[LossTerm], batch: MicroBatch) -> MicroBatch:
    """The batch with the targets of these terms alone."""
    rows = torch.cat([term.batch.rows + term.start for term in terms])
    return replace(batch, rows=rows, targets=torch.cat([term.batch.targets for term in terms]))


def _split(scores: TargetScores, terms: Sequence[LossTerm]) -> list[TargetScores]:
    counts = [term.batch.num_trained for term in terms]
    parts = zip(torch.split(scores.logprobs, counts), torch.split(scores.correct, counts), strict=True)
    return [TargetScores(logprobs, correct) for logprobs, correct in parts]


def apply_loss(
    loss: Loss, head: Head, hidden: Tensor, batch: MicroBatch, *, reference: Tensor | None, weight: float | None
) -> Sliced[tuple[Score, Tensor | None]]:
    """`apply_losses` of a batch that is one micro-batch."""
    scores, grad = yield from apply_losses([LossTerm(loss, batch, reference, weight)], head, hidden, batch)
    return scores[0], grad


# -- reference -------------------------------------------------------------------------------------
#
# Log-probabilities of rows under the reference, each computed once in a job. The reference never changes, so neither do
# they. They are kept with checkpoints: computed again beside other rows, they would be rounded otherwise, and a run
# that goes on would not end as the one that was not stopped.

_KEY_BYTES = 16


class ReferenceScores:
    """Log-probabilities of targets by the tokens of their row, on the CPU."""

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor] = {}

    def find(self, examples: Sequence[Example], device: torch.device) -> Tensor | None:
        """[R] of all targets of a micro-batch; None where some of its rows are not known."""
        found = [self._known.get(_key(example)) for example in examples]
        if any(one is None for one in found):
            return None
        return torch.cat([one for one in found if one is not None]).to(device)

    def add(self, examples: Sequence[Example], logprobs: Tensor) -> None:
        """Keep [R] of a micro-batch. Rows that are known stay as they are."""
        parts = torch.split(logprobs.cpu(), [example.num_trained for example in examples])
        for example, part in zip(examples, parts, strict=True):
            self._known.setdefault(_key(example), part.clone())

    def capture(self) -> dict[str, Tensor]:
        """All of it in three tensors; none where nothing is known."""
        if not self._known:
            return {}
        return {
            "keys": torch.tensor([list(key) for key in self._known], dtype=torch.uint8),
            "lengths": torch.tensor([len(part) for part in self._known.values()]),
            "logprobs": torch.cat(list(self._known.values())),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`."""
        if not tensors:
            return
        parts = torch.split(tensors["logprobs"], tensors["lengths"].tolist())
        for key, part in zip(tensors["keys"].tolist(), parts, strict=True):
            self._known[bytes(key)] = part


def _key(example: Example) -> bytes:
    words = array("q", example.token_ids).tobytes() + bytes(example.trained)
    return hashlib.blake2b(words, digest_size=_KEY_BYTES).digest()
