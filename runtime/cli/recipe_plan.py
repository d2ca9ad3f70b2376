"""A plan as `eft recipe check` and `eft train --dry-run` print it, whether made by a server or here."""

from typing import Any

import msgspec
from rich.text import Text

from runtime.cli.output import console
from runtime.trainer.plan.plan import DataStats, PlanSummary
from runtime.trainer.plan.preview import PreviewPiece


def print_job_plan(plan: dict[str, Any], *, json: bool) -> None:
    """Print the answer to `?dry_run=1`, or the same made here: `name`, `total_steps` and `summary`."""
    if json:
        print(msgspec.json.format(msgspec.json.encode(plan)).decode())
        return
    name = plan["name"] or "an adapter named by its job"
    print(f"{name}: {plan['total_steps']} steps")
    try:
        summary = msgspec.convert(plan["summary"], PlanSummary)
    except msgspec.ValidationError:  # of a server of another version
        print(msgspec.json.format(msgspec.json.encode(plan["summary"]), indent=2).decode())
        return
    print_plan(summary)


BASES = {"jobs": "measured by jobs on this machine", "trial": "estimated from two steps that were tried"}
"""In words, what the time of a plan is known from."""


def print_plan(plan: PlanSummary) -> None:
    """Numbers first, then notes, then the first examples, with the trained tokens in green (or in «»)."""
    out = console()
    schedule, estimate = plan.schedule, plan.estimate
    batch = f"{plan.micro_batch_size} × {plan.gradient_accumulation_steps} × {plan.ranks}"
    lines = [
        ("base model", plan.base_model),
        ("method", plan.method),
        ("training rows", _rows(plan.train, plan.method)),
        ("test rows", _rows(plan.test, plan.method) if plan.test.examples else "none"),
        ("batch", f"{plan.effective_batch} ({batch}: micro-batch, accumulation, ranks){_bins(plan)}"),
        (
            "steps",
            f"{schedule.total_steps} ({schedule.steps_per_epoch} an epoch, {schedule.epochs:g} epochs), "
            f"{schedule.warmup_steps} of warmup",
        ),
        ("evaluated", _evaluated(plan)),
        ("saved", f"every {schedule.save_every} steps" if schedule.save_every else "at the end"),
        ("adapts", f"{_linears(plan)}: {plan.trained_parameters:,} parameters"),
        (
            "memory",
            f"about {_size(plan.memory_bytes)} beside the base model ({_size(estimate.activation_bytes)} activations)",
        ),
    ]
    if estimate.seconds is not None:
        known_from = f" ({BASES[estimate.basis]})" if estimate.basis else ""  # older servers do not say
        lines.append(("time", f"about {estimate.seconds:,.0f} s, undisturbed{known_from}"))
    lines.append(
        ("fails", f"when the loss is above {plan.watchdog_threshold:.3g} for {plan.watchdog_patience} steps in a row")
    )
    lines.append(("ask it", plan.how_to_ask))
    for name, value in lines:
        out.print(f"{name:14}  {value}")
    for note in plan.notes:
        warns = note in plan.warnings
        out.print(f"{'warning' if warns else 'note'}: {note}", style="bold red" if warns else "yellow")
    for number, pieces in enumerate(plan.previews, 1):
        out.print(f"\nexample {number}, «trained on»:", style="bold")
        out.print(_marked(pieces))


def _evaluated(plan: PlanSummary) -> str:
    if not plan.test.examples:
        return "never"
    every = plan.schedule.eval_every
    return f"every {every} steps, and at the end" if every else "at the end"


def _rows(stats: DataStats, method: str) -> str:
    noun = {"supervised": "", "kto": " labelled answers"}.get(method, " pairs")
    counts = stats.counts
    left_out = [
        (counts.too_long, "too long"),
        (counts.too_short, "too short"),
        (counts.untrained, "without an answer"),
        (counts.ties, "with equal answers"),
        (counts.duplicates, "duplicates"),
        (counts.truncated, "truncated"),
    ]
    details = "".join(f", {count} {what}" for count, what in left_out if count)
    return (
        f"{stats.examples}{noun}{details}; {stats.tokens:,} tokens, {stats.trained_tokens:,} of them trained on; "
        f"longest {stats.longest}"
    )


def _bins(plan: PlanSummary) -> str:
    return "" if plan.packed_bins is None else f", {plan.packed_bins} packed bins"


def _linears(plan: PlanSummary) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} ×{count}" for name, count in plan.linears.items())


def _marked(pieces: list[PreviewPiece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(f"«{piece.text}»" if piece.trained else piece.text, style="green" if piece.trained else "dim")
    return text


def _size(count: int) -> str:
    return f"{count / 1024**2:,.0f} MiB"
