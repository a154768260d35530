"""The one place through which Numba compiles, lazily and onto the disk; and how many threads work.

Numba is imported at the first call of a kernel (0.4 s), never at import. Where it is missing or broken, `have_numba()`
is False and the callers take their NumPy route.

Numba's own disk cache looks at one file's time stamp and misses edits of everything else a kernel calls, and never hits
for functions built around generated intrinsics. Here each compiled function is one file in a directory named after a
hash of everything the machine code depends on: all sources of this package, the CPU's features and the versions of
Python, NumPy, Numba, llvmlite and gguf (whose codebooks are compiled in). A changed source or machine is a new
directory; the least recently used are removed. A cache that cannot be read or written is no error, only a slower start.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from math import ceil
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

KEPT_KEYS = 6
"""Cache directories that survive: a few environments or machines may share one home, edits of the sources pile up."""

_log = logging.getLogger("trichord.compile")  # the name of each kernel, before and after it is compiled
_threads = 0


@functools.cache
def have_numba() -> bool:
    """Whether kernels can be compiled here."""
    try:
        import numba
    except Exception:  # absent, or it rejects this NumPy: ImportError, SystemError, AttributeError
        return False
    return not numba.config.DISABLE_JIT


class Compiled:
    """A function that Numba compiles for the argument types of its first call. Other kernels may call it as well."""

    def __init__(self, function: FunctionType, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function, self._options = function, options

    @functools.cached_property
    def dispatcher(self) -> Any:
        """Numba's dispatcher of the function."""
        import numba

        options = {"nogil": True, "boundscheck": False, "error_model": "numpy", **self._options}
        dispatcher = numba.njit(**options)(self._function)
        dispatcher._cache = _DiskCache(self._function)
        return dispatcher

    @property
    def _numba_type_(self) -> Any:
        return self.dispatcher._numba_type_  # what a global of another kernel is to Numba

    def __call__(self, *arguments: Any) -> Any:
        return self.dispatcher(*arguments)


def compiled(function: FunctionType | None = None, **options: Any) -> Any:
    """Decorator: compile with `numba.njit(**options)` at the first call, keep the machine code on disk.

    It runs on the calling thread without the GIL; `jobs` is what spreads work over threads. The function must be a
    module's own (no closure), its qualified name unique in the module.
    """
    if function is None:
        return functools.partial(compiled, **options)
    _check_cachable(function)
    return Compiled(function, options)


def compile_address(function: FunctionType, signature: str) -> int:
    """The address of `function` compiled as a C function of this Numba signature, kept on disk like the others."""
    from numba.core import sigutils
    from numba.core.ccallback import CFunc

    _check_cachable(function)
    options = {"error_model": "numpy", "boundscheck": False}
    native = CFunc(function, sigutils.normalize_signature(signature), {}, options)
    native._cache = _DiskCache(function)
    native.compile()
    _alive.append(native)
    return native.address


_alive: list[Any] = []  # machine code is freed with the object that owns it


def _check_cachable(function: FunctionType) -> None:
    if function.__closure__:
        raise TypeError(f"{function.__qualname__} closes over variables, which the name on disk would not tell apart")


# Threads


def threads() -> int:
    """Threads that jobs use; the machine is asked once, for asking reads files."""
    global _threads
    _threads = _threads or default_threads()
    return _threads


def set_threads(count: int) -> None:
    """Use `count` threads from now on, for jobs and torch's products alike."""
    global _threads
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count}")
    import torch

    _threads = count
    torch.set_num_threads(count)


def default_threads() -> int:
    """Physical cores, as far as affinity, the container's CPU quota and OMP_NUM_THREADS allow."""
    import psutil

    limits = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    omp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if omp.isdigit():
        limits.append(int(omp))
    if (quota := _container_cpus()) is not None:
        limits.append(ceil(quota))
    return max(1, min(limits))


def _container_cpus(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the control group (version 2, else 1) may spend; None where unlimited."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


# Disk


def cache_root() -> Path:
    """The user's directory for compiled kernels: $TRICHORD_CACHE_DIR, else the platform's place for caches."""
    if chosen := os.environ.get("TRICHORD_CACHE_DIR"):
        return Path(chosen) / "kernels"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "trichord" / "kernels"


@functools.cache
def _key_directory() -> Path | None:
    """The directory of this combination of sources, CPU and versions, made if need be; None where there can be none."""
    import llvmlite
    import numba
    from numba.core.registry import cpu_target

    import trichord.weight_format as weight_format

    target = cpu_target.target_context.codegen().magic_tuple()
    modules = np, numba, llvmlite
    versions = [platform.python_version(), *(module.__version__ for module in modules), metadata.version("gguf")]
    digest = hashlib.sha256(repr((target, versions, numba.config.OPT)).encode())
    try:
        for source in [*sorted(Path(__file__).parent.glob("*.py")), Path(weight_format.__file__)]:
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        directory = cache_root() / digest.hexdigest()[:20]
    except (OSError, RuntimeError):  # no sources beside the byte code; no home directory
        return None
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and directory.stat().st_uid != os.getuid():
            return None  # loading a file may run code: only the user's own
        os.utime(directory)
        _remove_stale(directory.parent)
    return directory


def _remove_stale(root: Path) -> None:
    used = sorted((d for d in root.iterdir() if d.is_dir()), key=lambda d: d.stat().st_mtime, reverse=True)
    for directory in used[KEPT_KEYS:]:
        shutil.rmtree(directory, ignore_errors=True)


class _DiskCache:
    """What a Numba dispatcher asks of its cache, over one file for each function and signature; failures are misses."""

    def __init__(self, function: FunctionType) -> None:
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"

    def _path(self, signature: Any) -> Path | None:
        directory = _key_directory()
        return directory and directory / f"{self._name}-{hashlib.sha256(str(signature).encode()).hexdigest()[:16]}"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        from numba.core.compiler import CompileResult

        target_context.refresh()
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(self._path(signature).read_bytes()))
        except Exception:
            _log.info("compiling %s", self._name)
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        from numba.core.serialize import dumps

        _log.info("compiled %s", self._name)
        path = self._path(signature)
        if path is None or result.lifted or result.library.has_dynamic_globals:
            return
        with contextlib.suppress(OSError):
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(dumps(result._reduce()))
            os.replace(temporary, path)  # a reader sees a whole file or none
