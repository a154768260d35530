"""Tuning: what is chosen from times that are known, and a run with a clock that prefers certain tiles."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import tune
from gpu_sections import QUICK

from trichord.device import resolve
from trichord.triton_kernels.launch import Case, GemvTile, Launches, launches

A, B = GemvTile(1, 64, 2), GemvTile(4, 128, 4)
SMALL, LARGE = (1024, 4096), (14336, 4096)


def test_the_best_for_all_is_chosen():
    times = {("Q4_K", 1, LARGE): {A: 1.0, B: 1.03}, ("Q6_K", 1, LARGE): {A: 1.02, B: 1.0}}
    assert tune.choose_tiles(times, gain=1.05) == {Case(1): A}


def test_a_format_keeps_its_own_where_it_gains():
    times = {("Q4_K", 1, LARGE): {A: 1.0, B: 2.0}, ("Q6_K", 1, LARGE): {A: 1.2, B: 1.0}, ("F16", 4, LARGE): {B: 1.0}}
    assert tune.choose_tiles(times) == {Case(1): A, Case(1, format="Q6_K"): B, Case(4): B}


def test_small_weights_keep_their_own_where_it_gains():
    times = {("Q4_K", 1, SMALL): {A: 1.0, B: 1.5}, ("Q4_K", 1, LARGE): {A: 3.0, B: 1.0}}
    assert tune.choose_tiles(times) == {Case(1): B, Case(1, 1024, "Q4_K"): A}


def test_a_tile_that_cannot_be_launched_everywhere_is_not_for_all():
    times = {("Q4_K", 1, LARGE): {A: 1.0, B: 0.5}, ("Q6_K", 1, LARGE): {A: 1.0}, ("F16", 1, LARGE): {}}
    table = tune.choose_tiles(times)
    assert table[Case(1)] == A and table[Case(1, format="Q4_K")] == B


def test_candidates_fit_the_hardware():
    for tile in tune.gemv_candidates():
        assert tile.rows * tile.groups // (32 * tile.warps) <= 8
    for tokens in (16, 128, 256):
        tiles = tune.gemm_candidates(tokens)
        assert {tile.tokens for tile in tiles} == {tokens} and len(set(tiles)) == len(tiles)
        assert {tile.programs for tile in tiles} == ({0, 1} if tokens >= 128 else {0})


def test_the_library_is_used_from_where_it_is_always_faster():
    assert tune.switch_point({64: [0.5], 256: [1.1], 512: [0.8, 1.1], 1024: [0.7]}) == 512
    assert tune.switch_point({64: [0.5, 1.9]}) == 64
    assert tune.switch_point({64: [0.5], 256: [1.0]}) is None
    assert tune.switch_point({}) is None


def test_a_run_writes_what_its_clock_preferred(monkeypatch):
    """The clock runs the products, and says that tiles with more rows are faster, and so is the library from 32 on."""
    monkeypatch.setattr(tune, "_GEMV_ROWS", (1,))
    monkeypatch.setattr(tune, "_GEMM_ROWS", (16,))
    monkeypatch.setattr(tune, "_LIBRARY_ROWS", (16, 32, 64))
    before = launches()

    def clock(tasks):
        tokens = len(tasks[0]()[0])
        if launches().library_tokens is not None:
            return 1.0 if tokens < 32 else 1e-3
        gemv, gemm = launches().gemv_tile(1, 1 << 20, 32, "Q4_K"), launches().gemm_tile(16, False, 32, "Q4_K")
        return 1 / (gemv.rows + gemm.rows)

    def candidates(table, rows):
        base = (
            before.gemv_tile(rows, 1 << 20, 32, "Q4_K")
            if table == "gemv"
            else before.gemm_tile(rows, False, 32, "Q4_K")
        )
        return [replace(base, rows=count) for count in (16, 64)]

    tuned = tune.tune(resolve("cuda"), QUICK, ["Q4_K"], [(32, 256)], 60, clock, candidates)
    assert launches() is before
    assert tuned.source == "measured"
    assert tuned.gemv_tile(1, 1 << 20, 32, "Q4_K").rows == tuned.gemm_tile(16, False, 32, "Q4_K").rows == 64
    assert tuned.library_tokens == 32
    assert Launches.from_json(tuned.to_json()) == tuned


def test_without_time_everything_stays():
    def clock(tasks):
        raise AssertionError("there is no time")

    tuned = tune.tune(resolve("cuda"), QUICK, ["Q4_K"], [(32, 256)], 0, clock)
    assert tuned == replace(launches(), source="measured")


def test_without_a_gpu_it_says_so_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(tune, "no_gpu", lambda: "there is none")
    assert tune.main([]) == 1
    assert capsys.readouterr().err.endswith(": tuning needs a GPU: there is none.\n")


def test_the_interpreter_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(tune, "no_gpu", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune.main([]) == 1
    assert "would time the interpreter" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 8])
def test_every_gemv_candidate_is_valid_for_short_rows(rows):
    for tile in tune.gemv_candidates():
        taken = replace(launches(), gemv={Case(8): tile}).gemv_tile(rows, 8, 32, "Q4_K")
        assert taken.groups == 8 and taken.warps >= 1
