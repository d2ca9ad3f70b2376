"""A progress bar on a terminal, nothing elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bar:
    """Counts finished requests and shows the tokens that they generated."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task
        self._tokens = 0

    def advance(self, tokens: int) -> None:
        """Count one more finished request, with `tokens` generated tokens."""
        self._tokens += tokens
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, tokens=self._tokens)


@contextmanager
def progress_bar(label: str, *, total: int, show: bool) -> Iterator[Bar]:
    """Context with a bar on stderr for `total` requests."""
    if not show:
        yield Bar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, progress.add_task(label, total=total, tokens=0))
