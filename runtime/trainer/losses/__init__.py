"""Losses by name: one file and one line here for each. See docs/adding-a-loss.md."""

from collections.abc import Mapping
from dataclasses import fields

from runtime.trainer.losses.dpo import Dpo
from runtime.trainer.losses.kto import Kto
from runtime.trainer.losses.loss import (
    Loss,
    LossInputs,
    LossTerm,
    LossValue,
    Score,
    apply_loss,
    apply_losses,
    score_targets,
)
from runtime.trainer.losses.reference_free import Cpo, Orpo, Simpo
from runtime.trainer.losses.supervised import Supervised

__all__ = [
    "LOSSES",
    "Loss",
    "LossInputs",
    "LossTerm",
    "LossValue",
    "Score",
    "Supervised",
    "apply_loss",
    "apply_losses",
    "make_loss",
    "score_targets",
]

LOSSES: dict[str, type[Loss]] = {
    "supervised": Supervised,
    "dpo": Dpo,
    "orpo": Orpo,
    "kto": Kto,
    "cpo": Cpo,
    "simpo": Simpo,
}


def make_loss(name: str, options: Mapping[str, float | str]) -> Loss:
    """The loss of this name with these options. Raises `ValueError` for unknown ones."""
    kind = LOSSES.get(name)
    if kind is None:
        raise ValueError(f"no loss is called {name!r}; there are {', '.join(sorted(LOSSES))}")
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"the loss {name} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}")
    return kind(**options)
