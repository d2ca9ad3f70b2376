"""How long training may take between two inference steps.

Requests have targets: a time per output token, and a time to the first one. What the steps leave of the target is
training's; a share of the time is, even where they leave nothing. Time that was not used, because no slice is that
small, is saved up for the next gap; time that was taken too much is owed. Knows no training, only seconds.
"""

TPOT_RATIO = 1.35
"""Without a target, an output token may take so many times what a step takes."""
LONGEST_SAVING = 0.25
"""Savings are at most so many gaps' worth: they must not add up to a pause that somebody sees."""
SMOOTHING = 0.1
LARGEST_RISE = 1.25


class Share:
    """Budgets for one engine."""

    def __init__(self, *, tpot_target: float | None, min_share: float) -> None:
        self._tpot_target = tpot_target
        self._floor = min_share / (1 - min_share)
        self._typical: float | None = None
        """Seconds of a step that only decodes: smoothed."""
        self._saved = 0.0

    def budget(self, step_seconds: float, *, decoding: bool, first_tokens_due: bool) -> float:
        """Seconds for the gap after a step, savings and debts included; may be negative. `decoding`: the step did
        nothing else, so it is one between two tokens."""
        least = self._floor * step_seconds
        if decoding:
            known = self._typical or step_seconds
            # One step that took ten times as long, because something else ran, is not typical.
            self._typical = known + SMOOTHING * (min(step_seconds, LARGEST_RISE * known) - known)
        gap = least
        if not first_tokens_due:  # whoever has nothing yet is not kept waiting for more than training's share
            target = self._tpot_target or TPOT_RATIO * (self._typical or 0.0)
            gap = max(target - step_seconds, least)
        self._saved = min(self._saved, LONGEST_SAVING * gap)
        return gap + self._saved

    def settle(self, budget: float, spent: float) -> None:
        """What is left of a budget is saved, what is missing is owed."""
        self._saved = budget - spent
