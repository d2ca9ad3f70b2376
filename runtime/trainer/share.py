"""Time that training may take between two inference steps, so that requests keep their latency targets.

A token of a stream takes the time of its step and of the training before it. The target bounds that sum; the time that
it leaves beside the step is the slack, and training gets it, less a reserve that grows with every token that was late
and shrinks with every other: as large as the percentile of the target requires. A prompt that waits gets all of the
time for a while; after that, training has its least share again. Counts seconds only, and uses no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

from runtime.events import LatencyTarget
from settings.schema import SchedulerSettings

# Weight of the newest value in smoothed times.
EMA_WEIGHT = 0.1
# Part of a budget that a later one may exceed its own by, where no slice was small enough to use it.
MAX_SAVED_GAPS = 0.2
# A step counts as at most this many times the typical one.
MAX_RISE_RATIO = 1.25
# Once in this number of tokens no training precedes one, to measure what a step takes without it.
PROBE_STEPS = 64
# Part of the slack by which the reserve grows with a late token, at the most.
RESERVE_STEP = 0.05
# Part of the time without waiting prompts that refills the time of undisturbed prefill.
PATIENCE_REFILL = 0.5


@dataclass(frozen=True, kw_only=True)
class LatencyTargets:
    """Targets of requests that training must leave room for. Times in seconds."""

    tpot: float | None = None
    """Time per output token; None: `tpot_ratio` decides."""
    tpot_ratio: float = 1.3
    """Time per output token, in times of what it is without training."""
    ttft: float = 1.0
    """Time to first token."""
    percentile: float = 0.95
    """Share of tokens for which the time per output token holds."""

    @classmethod
    def of(cls, settings: SchedulerSettings) -> "LatencyTargets":
        """The targets of the settings."""
        return cls(
            tpot=settings.tpot_target,
            tpot_ratio=settings.tpot_ratio,
            ttft=settings.ttft_target,
            percentile=settings.tpot_percentile,
        )


class TrainingShare:
    """Budgets for one engine. `budget` and `settle` are called in turns, once a step."""

    def __init__(
        self,
        targets: LatencyTargets,
        *,
        min_share: float,
        on_miss: Callable[[LatencyTarget], None] = lambda target: None,
    ) -> None:
        """`min_share`: share of the time that training gets in any case. `on_miss` is called for a token that was late,
        and would have been in time without training."""
        self._targets = targets
        self._floor = min_share / (1 - min_share)
        self._on_miss = on_miss
        self._typical: float | None = None
        """Seconds of a step that only decodes: smoothed."""
        self._slowdown = 1.0
        """Times that a step takes after training (caches are cold) what it takes without: smoothed."""
        self._since_probe = 0
        self._reserve = 0.0
        """Part of the slack that is not used."""
        self._saved = 0.0
        self._spent = 0.0
        """Seconds of training before the step that comes next."""
        self._patience = targets.ttft
        """Seconds of prefill that training still leaves undisturbed."""
        self._waiting = _Waiting()
        self.slack_used = 0.0
        """Part of the slack that training used: smoothed; above 1 where its least share exceeds the slack."""

    def budget(self, step_seconds: float, *, decoding: bool, waiting_since: float | None, now: float) -> float:
        """Seconds for the gap after a step, savings and debts included; may be negative.

        Args:
            step_seconds: time of the step.
            decoding: True if the step did nothing but decode, so that it is one between two tokens.
            waiting_since: arrival of the oldest request without a token, on the clock of `now`; None: there is none.
        """
        if decoding:
            self._judge(step_seconds)
        if self._waiting.look(waiting_since, now, self._targets.ttft):
            self._on_miss("ttft")
        if waiting_since is not None:
            return self._budget_beside_prefill(step_seconds, now - waiting_since)
        self._patience = min(self._targets.ttft, self._patience + PATIENCE_REFILL * step_seconds)
        self._since_probe += 1
        if self._since_probe > PROBE_STEPS and decoding:
            self._since_probe = 0
            return min(0.0, self._saved)
        least = self._floor * step_seconds
        gap = max(self._slack(step_seconds) * (1 - self._reserve), least)
        self._saved = min(self._saved, MAX_SAVED_GAPS * gap)
        return gap + self._saved

    def settle(self, budget: float, spent: float) -> None:
        """Save what is left of a budget, owe what is missing."""
        self._saved = budget - spent
        self._spent = spent
        self._waiting.trained += spent
        if budget > 0 and self._typical is not None and (slack := self._slack(self._typical)) > 0:
            self.slack_used += EMA_WEIGHT * (spent / slack - self.slack_used)

    def _budget_beside_prefill(self, step_seconds: float, waited: float) -> float:
        """Nothing, until prefill has had all of the time for long enough; then, and where a first token is late
        already, the least share. Debts stay, savings go: they are for gaps between tokens."""
        self._saved = min(self._saved, 0.0)
        self._patience -= step_seconds
        if self._patience > 0 and waited <= self._targets.ttft:
            return self._saved
        self._patience = max(self._patience, 0.0)
        return self._floor * step_seconds + self._saved

    def _slack(self, step_seconds: float) -> float:
        """Seconds that the target leaves beside a step; negative where a step alone exceeds it."""
        typical = self._typical or step_seconds
        if self._targets.tpot is not None:
            return self._targets.tpot - max(step_seconds, typical)  # more requests make steps longer at once
        return (self._targets.tpot_ratio / self._slowdown - 1) * typical

    def _judge(self, step_seconds: float) -> None:
        """Learn from a token: what its step took, and whether the training before it made it late."""
        known = self._typical or step_seconds
        if self._spent == 0.0 and self._since_probe == 0 and self._typical is not None:
            seen = min(MAX_RISE_RATIO, max(1.0, known / step_seconds))
            self._slowdown += EMA_WEIGHT * (seen - self._slowdown)
        target = self._targets.tpot or self._targets.tpot_ratio * known / self._slowdown
        late = self._spent + step_seconds > target
        if step_seconds <= target:  # else training is not the cause
            part = self._targets.percentile if late else self._targets.percentile - 1
            self._reserve = min(1.0, max(0.0, self._reserve + RESERVE_STEP * part))
            if late:
                self._on_miss("tpot")
        # One step that took ten times as long, because something else ran, is not typical.
        self._typical = known + EMA_WEIGHT * (min(step_seconds, MAX_RISE_RATIO * known) - known)


class _Waiting:
    """The oldest request without a token, and the training while it waits."""

    def __init__(self) -> None:
        self._since: float | None = None
        self.trained = 0.0
        """Seconds."""

    def look(self, since: float | None, now: float, target: float) -> bool:
        """True if the request that waited so far has its token, late because of training. Then another one waits."""
        if since == self._since:
            return False
        waited = 0.0 if self._since is None else now - self._since
        missed = waited > target >= waited - self.trained
        self._since, self.trained = since, 0.0
        return missed
