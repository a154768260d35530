"""Draws results of gpu_check.py, bench_matmul.py or kernel_report.py as a bar chart.

python scripts/plot_results.py scripts/results/gpu-check-GPU-DATE.json --value "share of copy" --output shares.svg
python scripts/plot_results.py report.json --value bandwidth_ceiling --only "1 row" --output ceilings.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench_tools import figure

_BAR, _GAP, _LABELS, _WIDTH = 16, 6, 240, 560


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE.json")
    parser.add_argument("--value", required=True, help="which figure to draw")
    parser.add_argument("--only", default="", metavar="TEXT", help="only bars whose name has this in it")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    try:
        bars = [
            bar for bar in read_bars(json.loads(options.results.read_text()), options.value) if options.only in bar[0]
        ]
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {options.results} cannot be read: {error}", file=sys.stderr)
        return 1
    if not bars:
        print(
            f"{parser.prog}: error: nothing in {options.results} has a figure named {options.value!r}", file=sys.stderr
        )
        return 1
    options.output.write_text(bar_chart(f"{options.results.stem}: {options.value}", bars), encoding="utf-8")
    print(f"{len(bars)} bars written to {options.output}")
    return 0


def read_bars(results: Any, value: str) -> list[tuple[str, float]]:
    """(name, figure) of every record that has the figure."""
    if isinstance(results, dict):
        findings = [finding for section in results["sections"].values() for finding in section["findings"]]
        return [(finding["name"], finding["values"][value]) for finding in findings if value in finding["values"]]
    keys = ("target", "kernel", "format", "rows", "what")
    return [
        (" ".join(str(record[key]) for key in keys if key in record), float(record[value]))
        for record in results
        if isinstance(record.get(value), (int, float))
    ]


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars as SVG, each with its figure; the longest fills the width."""
    scale = _WIDTH / max((value for _, value in bars if value > 0), default=1.0)
    height = 40 + len(bars) * (_BAR + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABELS + _WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
    ]
    for index, (name, value) in enumerate(bars):
        top = 36 + index * (_BAR + _GAP)
        width = max(0.0, value) * scale
        lines += [
            f'<text x="{_LABELS - 8}" y="{top + 12}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABELS}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="#3b76af"/>',
            f'<text x="{_LABELS + width + 6:.1f}" y="{top + 12}">{figure(value)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
