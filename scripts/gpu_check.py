"""Checks and measures everything that only a GPU can prove, with one command.

    python scripts/gpu_check.py                                  # all sections, at most nine minutes
    python scripts/gpu_check.py --sections parity products
    TRITON_INTERPRET=1 python scripts/gpu_check.py --sections parity --quick     # the code itself, without a GPU

Each section runs in a process of its own under a time limit: what it has found by then is kept, whatever happens to it.
The results go to scripts/results/ as JSON and as a table, with the hardware, the driver and the versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench_tools import environment, figure, table

RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = ("parity", "exactness", "models", "operations", "products", "generation", "dependent")
_INTRODUCTIONS = {
    "parity": "Largest differences from the CPU path: absolute for decoded weights, relative for products.",
    "exactness": "Kernels of `exact` precision, as compiled here, round no operand.",
    "models": "Relative distance of the logits from those of the CPU, or from the parity data's reference.",
    "operations": "The parity tests of all other operations.",
    "products": "Products at the shapes of Llama-3-8B, medians; weights come from memory, not from a cache.",
    "generation": "Whole models with random weights. The share of copy counts the weights as read once a step.",
    "dependent": "Generation with kernels that start ahead of the end of those before them, and without: `pdl`.",
}


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if not interpreting and (reason := no_gpu()):
        print(f"{parser.prog}: this needs a GPU: {reason}.", file=sys.stderr)
        return 1
    if options.child:
        return _child(options.child, options.quick, options.parity_data)
    report = {"environment": _environment(interpreting), "sections": {}}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"gpu-check-{_slug(report['environment']['gpu'])}-{report['environment']['date']}.json"
    for name in options.sections:
        report["sections"][name] = _run(name, options)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(render(report), encoding="utf-8")
    print(f"\n{render(report)}\nwritten to {path} and {path.with_suffix('.md').name}")
    return 0 if all(section["ok"] for section in report["sections"].values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to do (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the check itself work?")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for each section, instead of its own")
    parser.add_argument(
        "--parity-data",
        type=Path,
        default=os.environ.get("TRICHORD_PARITY_DATA"),
        metavar="FOLDER",
        help="models with reference logits (default: $TRICHORD_PARITY_DATA)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: scripts/results")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser


def no_gpu() -> str | None:
    """Why there is no GPU to use, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees none"


def _child(name: str, quick: bool, data: Path | None) -> int:
    """The work of a section's process: its findings as lines of JSON."""
    from gpu_sections import QUICK, Size, run_section

    for finding in run_section(name, QUICK if quick else Size(), data):
        print(json.dumps(finding.to_dict()), flush=True)
    return 0


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a section and shows its findings as they come."""
    from gpu_sections import SECTIONS as WORK

    limit = options.limit or WORK[name].limit
    command = [sys.executable, __file__, "--child", name, *["--quick"] * options.quick]
    if options.parity_data:
        command += ["--parity-data", str(options.parity_data)]
    print(f"\n{name}: {_INTRODUCTIONS[name]} At most {limit:.0f} s.", flush=True)
    started = time.monotonic()
    findings, trouble = collect(command, limit, show=_show)
    failed = [finding["name"] for finding in findings if finding["ok"] is False]
    return {
        "ok": not failed and not trouble,
        "seconds": round(time.monotonic() - started, 1),
        "trouble": trouble,
        "failed": failed,
        "findings": findings,
    }


def collect(command: list[str], limit: float, show: Any = lambda finding: None) -> tuple[list[dict[str, Any]], str]:
    """Runs a process that prints findings for at most `limit` seconds -> (its findings, what went wrong or "")."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    readers = [
        threading.Thread(target=read, daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True),
    ]
    for reader in readers:
        reader.start()
    findings: list[dict[str, Any]] = []
    deadline = time.monotonic() + limit
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if line.startswith("{"):
                findings.append(json.loads(line))
                show(findings[-1])
    except queue.Empty:
        process.kill()
        process.wait()
        return findings, f"stopped after {limit:.0f} s"
    code = process.wait()
    readers[1].join()
    said = [line.strip() for line in errors if line.strip()]
    return findings, "" if code == 0 else f"ended with {code}: {said[-1] if said else 'no message'}"


def _show(finding: dict[str, Any]) -> None:
    mark = {True: "ok   ", False: "FAILS", None: "     "}[finding["ok"]]
    values = ", ".join(f"{name} {figure(value)}" for name, value in finding["values"].items())
    print(f"  {mark} {finding['name']}: {values}{finding['note']}", flush=True)


def _environment(interpreting: bool) -> dict[str, str]:
    import torch

    described = environment()
    if interpreting or not torch.cuda.is_available():
        return described | {"gpu": "Triton's interpreter"}
    properties = torch.cuda.get_device_properties(0)
    described["gpu"] = properties.name
    described["memory"] = (
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    )
    described["runtime"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader", "--id=0"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        described["driver"], described["highest clock"] = (part.strip() for part in shown.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        pass
    return described


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# GPU check: {report['environment']['gpu']}", ""]
    parts += [f"* {name}: {value}" for name, value in report["environment"].items()]
    for name, section in report["sections"].items():
        state = "passed" if section["ok"] else section["trouble"] or f"failed: {', '.join(section['failed'])}"
        parts += ["", f"## {name}", "", f"{_INTRODUCTIONS[name]} {section['seconds']:.0f} s, {state}.", ""]
        heads = list(dict.fromkeys(key for finding in section["findings"] for key in finding["values"]))
        marks = {True: "ok", False: "FAILS", None: ""}
        rows = [
            [
                finding["name"],
                *(figure(finding["values"][head]) if head in finding["values"] else "" for head in heads),
                " ".join(filter(None, (marks[finding["ok"]], finding["note"]))),
            ]
            for finding in section["findings"]
        ]
        if rows:
            parts.append(table([name, *heads, "result"], rows))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
