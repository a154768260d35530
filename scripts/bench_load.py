"""Times how long GGUF files take to open, alone and with their tokenizer.

    python scripts/bench_load.py vocab.gguf model.gguf
    python scripts/bench_load.py vocab.gguf --baseline      # beside gguf.GGUFReader, which may take a minute

Every time is the median of several runs in this process, so the file comes from the page cache and imports are paid.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trichord import GGUFFile, Tokenizer, TrichordError


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time how long GGUF files take to open, alone and with their tokenizer (median, milliseconds).",
        epilog="A column shows '-' where a file has no usable vocabulary.",
    )
    parser.add_argument("files", metavar="FILE.gguf", nargs="+", type=Path, help="any part of a split file")
    parser.add_argument("--runs", type=_positive, default=7, help="runs of each measurement (default: %(default)s)")
    parser.add_argument(
        "--baseline", action="store_true", help="also time gguf.GGUFReader, once a file, and print the ratio to opening"
    )
    options = parser.parse_args()
    columns = ["file", "MiB", "tokens", "merges", "open ms", "with tokenizer ms"]
    columns += ["GGUFReader ms", "times slower"] if options.baseline else []
    rows = []
    for path in options.files:
        try:
            rows.append(_measure(path, options.runs, options.baseline))
        except TrichordError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for name, *figures in (columns, *rows):
        print(name.ljust(widths[0]), *map(str.rjust, figures, widths[1:]), sep="  ")
    return 0


def _measure(path: Path, runs: int, baseline: bool) -> list[str]:
    """One row of the table. Raises GGUFError when the file cannot be opened."""
    with GGUFFile(path) as file:
        counts = [len(file.get(f"tokenizer.ggml.{name}", list, [])) for name in ("tokens", "merges")]
        row = [path.name, f"{file.nbytes / 2**20:.1f}", *map(str, counts)]
    opening = _median(lambda: GGUFFile(path).close(), runs)
    row.append(f"{1e3 * opening:.0f}")
    try:
        row.append(f"{1e3 * _median(lambda: _open_with_tokenizer(path), runs):.0f}")
    except TrichordError as error:
        print(f"no tokenizer: {error}", file=sys.stderr)
        row.append("-")
    if baseline:
        from gguf import GGUFReader

        reader = _median(lambda: GGUFReader(path), runs=1)
        row += [f"{1e3 * reader:.0f}", f"{reader / opening:.0f}"]
    return row


def _open_with_tokenizer(path: Path) -> None:
    with GGUFFile(path) as file:
        Tokenizer.from_gguf(file)


def _median(action: Callable[[], object], runs: int) -> float:
    """Seconds."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
