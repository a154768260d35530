"""Compilation: the disk cache hits and goes stale when it must, failures are harmless, threads are what was asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trichord.cpu_fallback
import trichord.weight_format
from trichord.cpu_fallback import jit

PACKAGE = Path(trichord.cpu_fallback.__file__).parent


def python(code, **environment):
    """Run code in a fresh interpreter; what it printed."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The product with a row of one Q4_0 block: 32 weights of 3 - 8, at scale 1.
PRODUCT = """
import sys, torch
import numba.core.compiler as compiler
if {forbidden}:
    def forbid(*arguments, **options):
        raise AssertionError("compiled again")
    compiler.compile_extra = forbid
from trichord.cpu_fallback import matmul
from trichord.weight_format import Weight, WeightFormat
block = torch.full((1, 18), 0x33, dtype=torch.uint8)
block[0, :2] = torch.tensor([0x00, 0x3C])
print(matmul(torch.ones(1, 32), [Weight(block, WeightFormat.Q4_0, (1, 32), "blocks")], "default")[0].item())
"""


@pytest.fixture
def copy_of_the_package(tmp_path):
    """The environment of an interpreter that sees a copy of the backend's sources, and the copy."""
    root = tmp_path / "copy" / "trichord"
    shutil.copytree(PACKAGE, root / "cpu_fallback", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(trichord.weight_format.__file__, root)
    (root / "__init__.py").touch()
    return {"PYTHONPATH": str(root.parent), "TRICHORD_CACHE_DIR": str(tmp_path / "cache")}, root


def kernels(environment):
    return {path: path.stat().st_mtime_ns for path in Path(environment["TRICHORD_CACHE_DIR"]).rglob("*-*")}


def test_the_cache_hits_heals_and_sees_edits_of_any_file(copy_of_the_package):
    environment, root = copy_of_the_package
    assert python(PRODUCT.format(forbidden=False), **environment) == "-160.0"
    first = kernels(environment)
    assert any("dot_Q4_0_default_1" in path.name for path in first)
    assert python(PRODUCT.format(forbidden=True), **environment) == "-160.0"
    assert kernels(environment) == first

    for path in first:
        path.write_bytes(path.read_bytes()[:100])
    assert python(PRODUCT.format(forbidden=False), **environment) == "-160.0"
    assert all(path.stat().st_size > 100 for path in kernels(environment))

    decode = root / "cpu_fallback" / "decode.py"
    decode.write_text(decode.read_text().replace("zero=8)", "zero=7)"))
    assert python(PRODUCT.format(forbidden=False), **environment) == "-128.0"
    assert len(kernels(environment)) == 2 * len(first)


def test_without_a_cache_directory(copy_of_the_package, tmp_path):
    environment, _ = copy_of_the_package
    (tmp_path / "file").touch()
    environment["TRICHORD_CACHE_DIR"] = str(tmp_path / "file")
    assert python(PRODUCT.format(forbidden=False), **environment) == "-160.0"


def test_stale_keys_are_removed(tmp_path):
    for number in range(jit.KEPT_KEYS + 3):
        directory = tmp_path / f"key{number}"
        directory.mkdir()
        (directory / "kernel").touch()
        os.utime(directory, (number, number))
    jit._remove_stale(tmp_path)
    assert {d.name for d in tmp_path.iterdir()} == {f"key{number}" for number in range(3, jit.KEPT_KEYS + 3)}


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "trichord/kernels"),
        ("win32", "LOCALAPPDATA", "trichord/kernels"),
        ("linux", "TRICHORD_CACHE_DIR", "kernels"),
    ],
)
def test_cache_root(monkeypatch, tmp_path, platform, variable, expected):
    monkeypatch.delenv("TRICHORD_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert jit.cache_root() == tmp_path / expected


def test_importing_the_backend_does_not_import_numba():
    assert python("import sys, trichord.cpu_fallback; print('numba' in sys.modules)") == "False"


def test_have_numba(monkeypatch):
    have_numba = jit.have_numba.__wrapped__
    assert have_numba()
    with monkeypatch.context() as patch:
        patch.setattr("numba.config.DISABLE_JIT", 1)
        assert not have_numba()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not have_numba()


def test_closures_are_refused():
    number = 3

    def kernel(x):
        return x + number

    with pytest.raises(TypeError, match="closes over"):
        jit.compiled(kernel)


def test_set_threads_reaches_jobs_and_torch():
    code = """
import torch
from trichord.cpu_fallback import jit
for count in (2, 1):
    jit.set_threads(count)
    print(jit.threads(), torch.get_num_threads())
"""
    assert python(code).splitlines() == ["2 2", "1 1"]
    with pytest.raises(ValueError, match="at least 1"):
        jit.set_threads(0)


def test_default_threads_keep_to_the_limits(monkeypatch, tmp_path):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(jit, "_container_cpus", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert jit.default_threads() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7, 9, 11}, raising=False)
    assert jit.default_threads() == 5
    monkeypatch.setattr(jit, "_container_cpus", lambda: 2.5)
    assert jit.default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,4")
    assert jit.default_threads() == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_container_quota(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert jit._container_cpus(tmp_path) == expected
