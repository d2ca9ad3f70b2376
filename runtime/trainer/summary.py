"""A plan in short, for `?dry_run=1`, the job's record and `eft recipe check`. Encodes to JSON as it is."""

from collections import Counter

from msgspec import Struct

from runtime.trainer.estimate import Estimate
from runtime.trainer.plan import DataStats, Plan
from runtime.trainer.preview import Piece
from runtime.trainer.schedule import Schedule


class PlanSummary(Struct, frozen=True, kw_only=True):
    """What would be trained, on what, in how many steps."""

    base_model: str
    name: str | None
    """The adapter's name where the recipe gives one."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    ranks: int
    effective_batch: int
    """Examples, or packed bins, in a step: micro-batch × accumulation × ranks."""
    packed_bins: int | None
    """How many bins the examples were packed into; None without sample_packing."""
    schedule: Schedule
    train: DataStats
    test: DataStats
    linears: dict[str, int]
    """Linears to adapt, by name → in how many layers."""
    trained_parameters: int
    optimizer_family: str
    estimate: Estimate
    memory_bytes: int
    """Estimated, beside the base model."""
    notes: list[str]
    previews: list[list[Piece]]


def summarize(plan: Plan) -> PlanSummary:
    """The summary of a plan."""
    recipe = plan.recipe
    return PlanSummary(
        base_model=plan.model_name,
        name=recipe.name,
        micro_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        ranks=1,
        effective_batch=recipe.effective_batch,
        packed_bins=len(plan.bins) if recipe.sample_packing else None,
        schedule=plan.schedule,
        train=plan.train_stats,
        test=plan.test_stats,
        linears=dict(Counter(name for _, name in plan.targets)),
        trained_parameters=plan.estimate.parameters,
        optimizer_family=recipe.optimizer_family,
        estimate=plan.estimate,
        memory_bytes=plan.estimate.memory_bytes,
        notes=plan.notes,
        previews=plan.previews,
    )
