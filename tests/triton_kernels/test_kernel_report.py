"""The kernel report on machine code whose counts are known: by hand, and from what a tile must multiply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import kernel_report
from kernel_assembly import load_widths, main_loop, pipe_of
from plot_results import bar_chart, read_bars

SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   IDP.4A.S8.S8 R9, R4, R8, R9 ;
        /*0040*/                   LOP3.LUT R9, R9, 0xf, RZ, 0xc0, !PT ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""
AMDGCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tglobal_load_ushort v5, v4, s[0:1]
\tv_dot4_i32_i8 v6, v0, v5, v6
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_the_main_loop_of_cuda():
    loop = main_loop(SASS)
    assert [instruction.split()[0] for instruction in loop] == ["LDG.E.U16", "IDP.4A.S8.S8", "LOP3.LUT", "BRA"]
    assert load_widths(loop) == {2: 1}


def test_the_main_loop_of_amd():
    loop = main_loop(AMDGCN)
    assert len(loop) == 4 and loop[2].startswith("v_dot4")
    assert load_widths(loop) == {16: 1, 2: 1}


def test_without_a_loop_the_whole_kernel_counts():
    assert len(main_loop(SASS.replace("@P1 BRA `(.L_x_0)", "NOP").replace("@!P0 BRA `(.L_x_1)", "NOP"))) == 11


@pytest.mark.parametrize(
    ("code", "pipe"),
    [
        ("I2F.S16", "conversion"),
        ("I2FP.F32.S32", "integer"),
        ("IMAD.MOV.U32", "FMA"),
        ("HGMMA.64x16x16.F32", "tensor"),
        ("LDSM.16.MT88.4", "load/store"),
        ("STS.128", "load/store"),
        ("HADD2.F32", "FMA"),
        ("PRMT", "integer"),
        ("UIADD3", ""),
        ("BAR.SYNC.DEFER_BLOCKING", ""),
    ],
)
def test_pipes(code, pipe):
    assert pipe_of(code) == pipe


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """(target, kernel) -> the record of Q8_0."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    script = [sys.executable, kernel_report.__file__, "--format", "Q8_0", "--target", "sm_90", "gfx942"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*script, "--json", path], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| Q8_0" in done.stdout
    return {(record["target"], record["kernel"]): record for record in json.loads(path.read_text())}


def test_a_product_with_one_row_in_q8_0(report):
    """A thread takes four rows of a group of 32: 32 bytes of each row and 64 of activations, and a scale each."""
    record = report["sm_90", "product, 1 row"]
    assert record["load_widths"]["16"] == 4 * 2 + 4
    assert record["load_widths"]["2"] == 4
    weights, dots = 4 * 32, 4 * 8 * 2  # two limbs of activations, four weights an instruction
    count = record["instructions_per_weight"] * weights
    assert count == pytest.approx(round(count), abs=0.1)  # three digits are reported
    assert dots + 17 < count < 2 * weights
    assert record["spills"] == 0 and record["tensor_cores"] == []
    # No pipe can be more than everything issued on a quarter of a cycle each, nor less than the dot products' half.
    gpu = kernel_report.GPUS["H200"]
    floor = gpu.processors * gpu.clock * 128 / (count / weights) * 8.5 / 8 / gpu.bandwidth
    assert 0.5 * floor < record["bandwidth_ceiling"] <= 1.01 * floor


def test_amd_has_counts_but_no_ceiling(report):
    record = report["gfx942", "product, 1 row"]
    assert record["bandwidth_ceiling"] is None and record["busiest_pipe"] is None
    assert 1 < record["instructions_per_weight"] < 6
    assert record["load_widths"]["16"] >= 4


def test_an_unknown_format_is_one_sentence(capsys):
    assert kernel_report.main(["--format", "Q4_Z"]) == 1
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: 'Q4_Z' is not a weight format\n"


def test_bars_have_the_lengths_of_their_figures():
    records = [
        {"format": "Q4_K", "ceiling": 1.0},
        {"format": "Q8_0", "ceiling": 4.0},
        {"format": "F16", "ceiling": None},
    ]
    bars = read_bars(records, "ceiling")
    assert bars == [("Q4_K", 1.0), ("Q8_0", 4.0)]
    drawn = bar_chart("a < b", bars)
    assert drawn.count('width="560.0"') == 1 and drawn.count('width="140.0"') == 1
    assert "a &lt; b" in drawn


def test_bars_of_a_gpu_check():
    finding = {"name": "Q4_K", "values": {"GB/s": 3.0}}
    assert read_bars({"sections": {"products": {"findings": [finding, {"name": "x", "values": {}}]}}}, "GB/s") == [
        ("Q4_K", 3.0)
    ]
