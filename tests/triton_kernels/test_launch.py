"""Configurations of launches: the files, and which of them and of their tiles is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.launch import (
    SOURCES,
    Case,
    GemvTile,
    Launches,
    choose,
    configurations,
    file_name,
    launches,
    use,
)

FILES = configurations()
by_name = pytest.mark.parametrize("configuration", FILES, ids=lambda configuration: configuration.gpu)


@by_name
def test_a_file_says_where_its_tiles_are_from(configuration):
    assert configuration.source in SOURCES


@by_name
def test_files_are_read_as_they_are_written(configuration):
    assert Launches.from_json(configuration.to_json()) == configuration


@by_name
def test_tiles_are_such_as_kernels_can_have(configuration):
    tiles = [*configuration.gemv.values(), *configuration.gemm.values(), *configuration.exact_gemm.values()]
    for tile in [*tiles, configuration.weights, configuration.halves]:
        for name, size in vars(tile).items():
            assert name in ("stages", "programs") or size & (size - 1) == 0, (tile, name)
    names = {case.format for case in (*configuration.gemv, *configuration.gemm, *configuration.exact_gemm)}
    assert names <= {None, *(weight_format.name for weight_format in FORMATS)}


@by_name
def test_kernels_start_ahead_only_where_a_gpu_has_it_and_as_long_as_nobody_has_measured_it_nowhere(configuration):
    assert not configuration.pdl
    possible = configuration.target in ("sm_90", "sm_100", "sm_120")
    assert configuration.pdl_possible == possible
    if possible:
        assert replace(configuration, pdl=True).pdl
    else:
        with pytest.raises(ValueError, match="needs sm_90"):
            replace(configuration, pdl=True)


def test_the_interpreter_has_its_own():
    assert launches().target == "interpreter"


def test_use_replaces_the_configuration_until_none():
    own = launches()
    use(FILES[0])
    try:
        assert launches() is FILES[0]
    finally:
        use(None)
    assert launches() is own


@pytest.mark.parametrize(
    ("gpu", "target", "expected"),
    [
        ("NVIDIA H200", "sm_90", "NVIDIA H200"),
        ("NVIDIA GH200 480GB", "sm_90", "NVIDIA H200"),
        ("NVIDIA A10", "sm_86", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA B300", "sm_103", "NVIDIA B200"),
        ("an older one", "sm_70", "Tesla T4"),
        ("AMD Instinct MI355X", "gfx950", "AMD Instinct MI300X"),
        ("AMD Radeon RX 7600", "gfx1102", "AMD Radeon RX 7900 XTX"),
        ("AMD Instinct MI210", "gfx90a", "AMD Instinct MI300X"),
        ("AMD Radeon RX 6800", "gfx1030", "AMD Radeon RX 7900 XTX"),
    ],
)
def test_other_gpus_take_the_nearest_architectures(gpu, target, expected):
    assert choose(gpu, target, FILES).gpu == expected


def test_a_gpus_own_file_goes_before_others_of_its_architecture():
    own = replace(FILES[0], gpu="ours", target="sm_90")
    assert choose("ours", "sm_90", [*FILES, own]) is own


def test_file_names():
    assert file_name("NVIDIA H200") == "NVIDIA_H200.json"
    assert file_name("AMD Radeon RX 7900/XTX") == "AMD_Radeon_RX_7900_XTX.json"


def test_the_closest_case_counts():
    few, any_out, narrow, q6 = (GemvTile(rows, 128, 4) for rows in (1, 2, 4, 8))
    table = {Case(1): few, Case(8): any_out, Case(8, out=1024): narrow, Case(4, format="Q6_K"): q6}
    own = replace(FILES[0], gemv=table)
    assert own.gemv_tile(1, 128, 4096, "Q4_K") == few
    assert own.gemv_tile(2, 128, 4096, "Q4_K") == any_out
    assert own.gemv_tile(2, 128, 1024, "Q4_K") == narrow
    assert own.gemv_tile(1, 128, 1024, "Q6_K") == own.gemv_tile(64, 128, 1024, "Q6_K") == q6
    assert own.gemv_tile(64, 128, 4096, "Q4_K") == any_out


def test_short_rows_take_fewer_threads():
    own = replace(FILES[0], gemv={Case(8): GemvTile(4, 128, 4)})
    assert own.gemv_tile(1, 100, 64, "Q4_K") == GemvTile(4, 128, 4)
    assert own.gemv_tile(1, 64, 64, "Q4_K") == GemvTile(4, 64, 2)
    assert own.gemv_tile(1, 1, 64, "Q4_K") == GemvTile(4, 1, 1)
