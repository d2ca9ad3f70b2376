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
    table.add_row("lost+found", _shown(found.lost_found), "")
    table.add_row("free", _shown(found.free), "")
    print(found.directory)
    console().print(table)


@with_settings("trainer")
def prune(
    *,
    dry_run: Annotated[bool, Parameter(help="Only print what would be deleted.", negative="")] = False,
    lost_found: Annotated[bool, Parameter(help="Also delete all of lost+found.", negative="")] = False,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Delete what --keep-jobs, --keep-checkpoints and --keep-uploads say, and compact the database."""
    from runtime.engine.state_upkeep import prune as pruned
    from runtime.trainer.jobs.retention import Keep

    settings = read_settings(flags, config).settings
    trainer = settings.trainer
    keep = Keep(jobs=trainer.keep_jobs, checkpoints=trainer.keep_checkpoints, uploads=trainer.keep_uploads)
    due, finds = pruned(_directory(settings), keep, lost_found=lost_found, dry_run=dry_run)
    does = "would be deleted" if dry_run else "deleted"
    for one in due:
        print(f"{one.job_id}: {'the job' if one.what == 'job' else one.what} {does}")
    for batch in finds:
        print(f"{batch.parent.name}/{batch.name} {does}")
    if not due and not finds:
        print("There is nothing to delete.")


@with_settings("trainer")
def rebuild(
    *,
    lost_found: Annotated[bool, Parameter(help="Also put back what is in lost+found.", negative="")] = False,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Make the database again from the folders of jobs and adapters. Returns 1 where some could not be taken in."""
    from runtime.engine.state_upkeep import rebuild as rebuilt

    found = rebuilt(_directory(read_settings(flags, config).settings), lost_found=lost_found)
    if json:
        print(msgspec.json.encode(found).decode())
        return 1 if found.problems else 0
    if found.moved_aside:
        print(f"Moved to lost+found: {', '.join(found.moved_aside)}.")
    print(f"Jobs: {len(found.jobs)}. Versions of adapters: {len(found.adapters)}.")
    for name in (*found.jobs, *found.adapters):
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
