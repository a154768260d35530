"""Progress bars on standard error, for work that turns out to take more than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 1.0


@contextmanager
def progress_bar(title: str, total: int, unit: str, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`. The bar appears once a second has gone by, where standard error is a terminal.

    unit: "bytes", or the plural of what is counted. shown: True or False overrides the terminal check.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda count: None
        return
    bar = _Bar(title, total, unit)
    try:
        yield bar.advance
    finally:
        bar.close()


class _Bar:
    """A rich progress bar that is built when it is first needed: importing rich is not free either."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._started = time.monotonic()
        self._done = 0
        self._progress = None

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is None and time.monotonic() - self._started > _PATIENCE:
            self._open()
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        counts = (
            (DownloadColumn(), TransferSpeedColumn())
            if self._unit == "bytes"
            else (MofNCompleteColumn(), TextColumn(self._unit))
        )
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *counts,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(self._title, total=self._total)
        self._progress.start()
