"""Progress on standard error, for work that turns out to take more than a second: bars, and a word on compiling."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 1.0


@contextmanager
def progress_bar(title: str, total: int, unit: str, shown: bool | None = None) -> Iterator[Callable[..., None]]:
    """Yields `advance(count, title=None)`, which may change the title.

    The bar appears once a second has gone by, where standard error is a terminal. unit: "bytes", or the plural of what
    is counted. shown: True or False overrides the terminal check.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda count, title=None: None
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

    def advance(self, count: int, title: str | None = None) -> None:
        self._done += count
        self._title = title or self._title
        if self._progress is None and time.monotonic() - self._started > _PATIENCE:
            self._open()
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, description=self._title)

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


class CompileNotice(logging.Handler):
    """Says once on standard error that kernels are being compiled, when that has taken more than a second in all.

    For the logger `trichord.compile`, to which each kernel says "compiling NAME" and then "compiled NAME"; a kernel
    may have others compiled in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = _PATIENCE
        self._depth = 0
        self._started = 0.0
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the start or the end of one kernel's compilation."""
        if record.getMessage().startswith("compiling"):
            self._depth += 1
            if self._depth == 1 and self._left > 0:
                self._started = time.monotonic()
                self._timer = threading.Timer(self._left, self._say)
                self._timer.daemon = True
                self._timer.start()
        else:
            self._depth -= 1
            if self._depth == 0 and self._timer is not None:
                self._timer.cancel()
                self._timer = None
                self._left -= time.monotonic() - self._started

    def _say(self) -> None:
        self._left = 0.0
        print("Compiling kernels for this CPU, once: the next start will not wait for it.", file=sys.stderr, flush=True)
