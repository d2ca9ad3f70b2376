"""The reference pages of the commands and of the metrics, in Markdown: docs/cli.md and docs/metrics.md.

`eft config cli` and `eft config metrics` print them; tests hold the checked-in copies to them.
"""

import inspect
from collections.abc import Iterator

from cyclopts import App, Group
from cyclopts.argument import Argument

from runtime.metrics.table import TABLE, Spec
from settings import fields

_CLI_HEAD = """\
# Commands

Generated from `runtime/cli/app.py` by `eft config cli`; do not edit.

Exit codes: 0, done; 1, it failed; 2, wrong usage or settings; 130, stopped with Ctrl-C; others are said where a
command has them. Errors are one message on standard error, and `EFT_DEBUG=1` adds the traceback. Tables and bars are
for a terminal; elsewhere a command prints plain lines, and with `--json` objects. `eft COMMAND --help` prints the same
as this page. Commands that load a model take [the settings](settings.md) as flags too.
"""
_METRICS_HEAD = """\
# Metrics

Generated from `runtime/metrics/table.py` by `eft config metrics`; do not edit.

`GET /metrics` has all of these. Where the column *also* has a name, the same numbers are exported under it for
dashboards made for vLLM (`observability.vllm_names`). In Prometheus' text format the name of a counter ends in
`_total`, and a histogram has `_bucket`, `_sum` and `_count`. Every series but those of HTTP carries the label
`model_name`. [observability.md](observability.md) says what to look at first.
"""


_GROUPS_OF_SETTINGS = frozenset(section.capitalize() for section in fields.sections())
"""Groups of arguments that are settings (`flags.with_settings`)."""


def command_page(app: App) -> str:
    """The page docs/cli.md, of the commands of `app`."""
    lines = [_CLI_HEAD.rstrip()]
    for path, command in _commands(app):
        arguments = [one for one in command.assemble_argument_collection() if one.show]
        own = [one for one in arguments if not _GROUPS_OF_SETTINGS & _groups(one)]
        lines += ["", f"## eft {path}", "", _paragraphs(command.help)]
        if own:
            lines += ["", "| argument | default | |", "|---|---|---|", *map(_argument, own)]
        if len(own) < len(arguments):
            lines += ["", "And settings, as flags."]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """The page docs/metrics.md."""
    lines = [_METRICS_HEAD.rstrip(), "", "| metric | kind | labels | also | |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_metric, TABLE)]) + "\n"


def _commands(app: App, before: str = "") -> Iterator[tuple[str, App]]:
    for name in app:
        if name.startswith("-"):
            continue
        command = app[name]
        if command.default_command is None:
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _groups(argument: Argument) -> frozenset[str]:
    groups = argument.parameter.group
    found = groups if isinstance(groups, tuple) else (groups,)
    return frozenset(group.name for group in found if isinstance(group, Group))


def _paragraphs(text: str) -> str:
    """A help text as Markdown: its lines of the form `shell: eft …` are a list."""
    return "\n".join(f"- {line}" if ": eft " in line else line for line in text.strip().splitlines())


def _argument(argument: Argument) -> str:
    parameter = argument.parameter
    names = [name for name in argument.names if not name.startswith(("--no-", "--empty-"))]
    shown = ", ".join(f"`{name}`" for name in names)
    choices = argument.get_choices()
    takes = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    default = argument.field_info.default
    if argument.required or default is inspect.Parameter.empty:
        value = "needed"
    elif default is None or default is False or default == () or parameter.show_default is False:
        value = ""
    else:
        value = f"`{default}`"
    return f"| {shown} | {value} | {_cell(parameter.help or '')}{takes} |"


def _metric(spec: Spec) -> str:
    also = {"vllm": f"`vllm:{spec.name}`", "plain": f"`{spec.name}`", "none": ""}[spec.twin]
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    return f"| `eft:{spec.name}` | {spec.kind} | {labels} | {also} | {_cell(spec.help)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
