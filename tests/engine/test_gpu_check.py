"""The GPU check without a GPU: its sections in the interpreter, and how it bears sections that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_check
import gpu_sections
from gpu_sections import QUICK, random_weight, roundings, run_section
from synthetic_model import SHAPES, Shape

from trichord import WeightFormat
from trichord.device import CPU, resolve
from trichord.triton_kernels import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the check itself runs there")


@pytest.fixture
def two_formats(monkeypatch):
    formats = [WeightFormat.Q4_K, WeightFormat.F16]
    monkeypatch.setattr(gpu_sections, "_formats", lambda place: formats)
    return formats


def test_parity_passes(two_formats):
    findings = list(run_section("parity", QUICK))
    assert [(finding.name, finding.ok) for finding in findings] == [("Q4_K", True), ("F16", True)]
    assert all(0 < finding.values["exact"] < 2e-6 for finding in findings)
    for finding in findings:  # the same operands
        assert finding.values["library"] == pytest.approx(finding.values["default"], rel=1e-2)


def test_parity_sees_a_wrong_product(two_formats, monkeypatch):
    place = resolve("cuda")
    product = place.operations.matmul
    monkeypatch.setattr(place.operations, "matmul", lambda *given: [1.001 * y for y in product(*given)])
    assert [finding.ok for finding in gpu_sections.parity(place, QUICK)] == [False, False]


def test_products_are_measured(two_formats):
    copy, *products = run_section("products", QUICK)
    assert copy.values["GB/s"] > 0
    ways = ["1 row", "9 rows", "16 rows, fused", "16 rows, through the library"]
    assert [finding.name for finding in products[:4]] == [f"Q4_K 64 x 256, {way}" for way in ways]
    for finding in products:
        bits = {"Q4_K": 4.625, "F16": 16}[finding.name.split()[0]]
        values = finding.values
        assert values["GB/s"] * 1e9 * values["microseconds"] / 1e6 == pytest.approx(64 * 256 * bits / 8, rel=1e-6)
        assert values["share of copy"] == pytest.approx(values["GB/s"] / copy.values["GB/s"])


def test_models_are_compared_and_measured(monkeypatch):
    monkeypatch.setattr(gpu_sections, "_LOGIT_BOUNDS", {"exact": 1e-4})  # another precision takes as long again
    monkeypatch.setitem(SHAPES, "tiny", Shape(1, 256, 4, 2, 256, 512, 256))
    first = next(run_section("models", QUICK))
    assert (first.name, first.ok) == ("synthetic", True)
    findings = list(run_section("generation", replace(QUICK, generate=1, batches=(2,))))
    assert [finding.name for finding in findings] == [
        f"tiny:Q4_K_M: {what}" for what in ("load", "prompt of 2", "prompt of 1", "2 x 1 tokens")
    ]
    assert all(value > 0 for finding in findings for value in finding.values.values())


def test_dependent_launch_is_measured_beside_the_other(monkeypatch):
    """As on a GPU that had it: the interpreter's kernels do not know the option."""
    for ahead in (False, True):
        monkeypatch.setattr(launch.Launches, "pdl_possible", ahead)
        monkeypatch.setattr(gpu_sections, "use", lambda configuration: None)
        findings = list(gpu_sections.dependent(resolve("cuda"), QUICK))
        names = ["tiny:Q4_K_M: without dependent launch", "tiny:Q4_K_M: with dependent launch"]
        assert [finding.name for finding in findings] == (names if ahead else ["dependent launch"])
        assert [finding.ok for finding in findings] == ([True, True] if ahead else [None])


@pytest.mark.parametrize("format", [WeightFormat.Q6_K, WeightFormat.Q8_1, WeightFormat.F64], ids=repr)
def test_a_weight_is_the_same_on_both_sides(format):
    weights = [random_weight(place, format, 5, 512) for place in (CPU, resolve("cuda"))]
    here, there = (
        place.operations.dequantize(weight) for place, weight in zip((CPU, resolve("cuda")), weights, strict=True)
    )
    assert torch.equal(here, there)
    assert len(here.unique()) > 100


@pytest.mark.parametrize(
    ("instruction", "rounds"),
    [
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", False),
        ("cvt.f32.f16 %f1, %h1;", False),
        ("cvt.rna.tf32.f32 %r1, %f1;", True),
        ("cvt.rn.bf16x2.f32 %r1, %f1, %f2;", True),
        ("cvt.rn.f16.f32 %h1, %f1;", True),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f1}, %rd1, %rd2;", True),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1};", True),
        ("v_mfma_f32_32x32x2_f32 a[0:15], v1, v2, a[0:15]", False),
        ("v_mfma_f32_32x32x8_f16 a[0:15], v[1:2], v[3:4], a[0:15]", True),
    ],
)
def test_roundings(instruction, rounds):
    assert bool(roundings(f"\t{instruction}\n")) == rounds


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


FINDING = json.dumps({"name": "first", "values": {"GB/s": 2.5}, "ok": True, "note": ""})


def test_findings_outlive_a_section_that_fails():
    findings, trouble = gpu_check.collect(python(f"print({FINDING!r}, flush=True); raise ValueError('no luck')"), 60)
    assert [finding["name"] for finding in findings] == ["first"]
    assert trouble == "ended with 1: ValueError: no luck"


def test_findings_outlive_a_section_that_hangs():
    code = f"import time; print({FINDING!r}, flush=True); time.sleep(600)"
    findings, trouble = gpu_check.collect(python(code), 3)
    assert [finding["name"] for finding in findings] == ["first"]
    assert trouble == "stopped after 3 s"


def test_the_limits_leave_nine_minutes():
    assert sum(section.limit for section in gpu_sections.SECTIONS.values()) <= 540
    assert tuple(gpu_sections.SECTIONS) == gpu_check.SECTIONS == tuple(gpu_check._INTRODUCTIONS)


def test_the_report_names_what_failed():
    finding = json.loads(FINDING)
    section = {"ok": False, "seconds": 3.2, "trouble": "", "failed": ["second"]}
    section["findings"] = [finding, {"name": "second", "values": {}, "ok": False, "note": "why"}]
    text = gpu_check.render({"environment": {"gpu": "a GPU"}, "sections": {"parity": section}})
    assert "3 s, failed: second." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["parity", "GB/s", "result"]
    assert rows[2:] == [["first", "2.50", "ok"], ["second", "", "FAILS why"]]


def test_without_a_gpu_it_says_so_in_a_sentence():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, gpu_check.__file__], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "this needs a GPU" in done.stderr
