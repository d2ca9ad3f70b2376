"""`eft doctor`: what was found on this machine, and what is broken."""

from collections.abc import Iterable
from itertools import groupby

import msgspec
from rich.table import Table

from runtime.cli.findings import Finding, environment, flash_attention, machine, plugins, software, storage
from runtime.cli.flags import Json
from runtime.cli.output import console


def doctor(*, json: Json = False) -> int:
    """Report machine, software, kernels, model cache, plugins and settings. Exit code 1 when something is broken."""
    areas = (software, flash_attention, machine, storage, plugins, environment)
    found = [finding for area in areas for finding in area.find()]
    if json:
        _print_json(found)
    else:
        _print_text(found)
    return 1 if _problems(found) else 0


def _problems(found: Iterable[Finding]) -> list[str]:
    return [finding.problem for finding in found if finding.problem]


def _print_json(found: list[Finding]) -> None:
    areas = {
        area: {item.name: {"value": item.value, "problem": item.problem} for item in items}
        for area, items in groupby(found, key=lambda item: item.area)
    }
    record = {"ok": not _problems(found), "problems": _problems(found), **areas}
    print(msgspec.json.format(msgspec.json.encode(record)).decode())


def _print_text(found: list[Finding]) -> None:
    out = console()
    for area, items in groupby(found, key=lambda item: item.area):
        out.print(area, style="bold")
        table = Table(box=None, show_header=False, pad_edge=False)
        for item in items:
            table.add_row(f"  {item.name}", item.value, style="red" if item.problem else None)
        out.print(table)
    problems = _problems(found)
    out.print("Nothing is broken." if not problems else "Broken:", style="bold")
    for problem in problems:
        out.print(f"  {problem}", style="red")
