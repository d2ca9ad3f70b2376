"""Tells a run that learns from one that is lost."""

import math

from runtime.trainer.spec import WatchdogSpec


class Lost(Exception):
    """The run cannot recover, and must not be published."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Watchdog:
    """Sees the loss and the gradient's norm of every step."""

    def __init__(self, spec: WatchdogSpec, vocab_size: int) -> None:
        self._threshold = math.log(vocab_size) + 1 if spec.threshold is None else spec.threshold
        self._patience = spec.patience
        self._above = 0

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Raises `Lost`."""
        for name, value in (("loss", loss), ("gradient", grad_norm)):
            if not math.isfinite(value):
                raise Lost("nan_loss", f"The {name} of step {step} is not a finite number ({value}).")
        self._above = self._above + 1 if loss > self._threshold else 0
        if self._above >= self._patience:
            raise Lost(
                "diverged",
                f"The loss was above {self._threshold:.4g} for {self._above} steps in a row, "
                f"and {loss:.4g} in step {step}.",
            )
