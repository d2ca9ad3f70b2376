"""`eft state`: the state directory on this machine, while no server uses it."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.flags import ConfigFile, Json, read_settings, with_settings
from runtime.cli.output import CommandError, console
from settings.schema import Settings

LARGEST = 10
"""Most jobs that are listed individually."""


@with_settings("trainer")
def du(*, json: Json = False, config: ConfigFile = None, **flags: Any) -> None:
    """Print what takes how much room. Works beside a running server."""
    from runtime.engine.state_upkeep import usage

    found = usage(_directory(read_settings(flags, config).settings))
    if json:
        print(msgspec.json.encode(found).decode())
        return
    table = Table("", "size", "", box=None, pad_edge=False)
    table.add_row("database", _shown(found.database), "")
    table.add_row("adapters", _shown(sum(found.adapters.values())), f"{len(found.adapters)} versions")
    table.add_row("jobs", _shown(sum(job.total for job in found.jobs)), f"{len(found.jobs)} jobs")
    for job in found.jobs[:LARGEST]:
        parts = {"uploads": job.uploads, "checkpoints": job.checkpoints, "result": job.result}
        table.add_row(f"  {job.id}", _shown(job.total), ", ".join(f"{n} {_shown(b)}" for n, b in parts.items() if b))
    table.add_row("files", _shown(found.files.bytes), f"{found.files.count} files")
    table.add_row("batches", _shown(found.batches.bytes), f"{found.batches.count} batches")
    if found.responses is not None:
        in_database = f"{found.responses.count} stored responses, in the database"
        table.add_row("responses", _shown(found.responses.bytes), in_database)
    if found.feedback is not None:
        table.add_row("feedback", _shown(found.feedback.bytes), f"{found.feedback.count} rows, in the database")
    if found.prepared.count:
        table.add_row("prepared data", _shown(found.prepared.bytes), f"{found.prepared.count} sets, for later jobs")
    table.add_row("lost+found", _shown(found.lost_found), "")
    table.add_row("free", _shown(found.free), "")
    print(found.directory)
    console().print(table)


@with_settings("trainer", "files", "responses", "feedback")
def prune(
    *,
    dry_run: Annotated[bool, Parameter(help="Only print what would be deleted.", negative="")] = False,
    lost_found: Annotated[bool, Parameter(help="Also delete all of lost+found.", negative="")] = False,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Delete what --keep-jobs, --keep-checkpoints, --keep-uploads, --keep-files, --keep-batches, --keep-responses,
    --max-responses, --max-responses-total, --keep-feedback, --max-feedback, --max-feedback-total and
    --prepared-cache say, and compact the database."""
    from runtime.engine.state_upkeep import prune as pruned

    settings = read_settings(flags, config).settings
    found = pruned(_directory(settings), settings, lost_found=lost_found, dry_run=dry_run)
    does = "would be deleted" if dry_run else "deleted"
    for one in found.jobs:
        print(f"{one.job_id}: {'the job' if one.what == 'job' else one.what} {does}")
    for name in (*found.batches, *found.files, *(f"prepared/{name}" for name in found.prepared)):
        print(f"{name} {does}")
    if found.responses:
        print(f"{found.responses} stored responses {does}")
    if found.feedback:
        print(f"{found.feedback} rows of feedback {does}")
    for folder in found.lost_found:
        print(f"{folder.parent.name}/{folder.name} {does}")
    if not found:
        print("There is nothing to delete.")


@with_settings("trainer")
def rebuild(
    *,
    lost_found: Annotated[bool, Parameter(help="Also put back what is in lost+found.", negative="")] = False,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Make the database again from the folders of jobs, adapters, files and batches. Returns 1 where some could not be
    taken in."""
    from runtime.engine.state_upkeep import rebuild as rebuilt

    found = rebuilt(_directory(read_settings(flags, config).settings), lost_found=lost_found)
    if json:
        print(msgspec.json.encode(found).decode())
        return 1 if found.problems else 0
    if found.moved_aside:
        print(f"Moved to lost+found: {', '.join(found.moved_aside)}.")
    print(
        f"Jobs: {len(found.jobs)}. Versions of adapters: {len(found.adapters)}. Files: {len(found.files)}. "
        f"Batches: {len(found.batches)}."
    )
    for name in (*found.jobs, *found.adapters, *found.files, *found.batches):
        print(f"  {name}")
    for problem in found.problems:
        print(f"not taken in: {problem}")
    return 1 if found.problems else 0


def _directory(settings: Settings) -> Path:
    """The state directory. Raises `CommandError` if there is none."""
    from runtime.support.state_directory import state_directory

    directory = state_directory(settings)
    if not directory.is_dir():
        raise CommandError(f"there is no state directory {directory}")
    return directory


def _shown(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.1f} TiB"
