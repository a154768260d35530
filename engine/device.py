"""Where work can run: which backend serves a device name, how many layers go there, how much memory is left."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from trichord.dispatch import Operations, operations
from trichord.errors import DeviceError
from trichord.weight_format import Layout

_OLDEST_COMPUTE_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Place:
    """A device and the layout, hence the backend, that weights have on it."""

    layout: Layout
    device: torch.device

    @property
    def operations(self) -> Operations:
        """The backend that works here."""
        return operations(self.layout)

    def free_bytes(self) -> int:
        """Memory that a cache could still take here."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available


CPU = Place("blocks", torch.device("cpu"))


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def resolve(device: str | torch.device | Place = "auto") -> Place:
    """ "auto", "cpu", "cuda" or "cuda:N" -> its Place. Raises DeviceError when it cannot serve.

    "auto" is the GPU where there is one that Triton can drive, else the CPU (with a warning if a GPU goes unused).
    "cuda" also means an AMD GPU under ROCm, as in torch; with TRITON_INTERPRET=1 it is the interpreter.
    """
    if isinstance(device, Place):
        return device
    name = str(device)
    if name == "cpu":
        return CPU
    if name == "auto":
        if not torch.cuda.is_available():
            return CPU
        try:
            return _gpu("cuda")
        except DeviceError as error:
            warnings.warn(f"{error} Running on the CPU instead.", stacklevel=3)
            return CPU
    if name == "cuda" or (name.startswith("cuda:") and name[5:].isdecimal()):
        return _gpu(name)
    raise DeviceError(f"Device {name!r} is not one of auto, cpu, cuda, cuda:N.")


def _gpu(name: str) -> Place:
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(f"Device {name} needs the triton package, which is not installed (it exists for Linux only).")
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # whatever a broken package raises
        raise DeviceError(f"Device {name} needs the triton package, which cannot be imported: {error}.") from error
    if interpreting():
        return Place("planes", torch.device("cpu"))
    if not torch.cuda.is_available():
        raise DeviceError(
            f"Device {name} was asked for, but torch {torch.__version__} sees no GPU: "
            "check the driver and that torch is a CUDA or ROCm build, or use device 'cpu'."
        )
    device = torch.device(name if ":" in name else f"cuda:{torch.cuda.current_device()}")
    if device.index >= torch.cuda.device_count():
        raise DeviceError(f"Device {name} does not exist: this machine has {torch.cuda.device_count()} GPU(s).")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST_COMPUTE_CAPABILITY:
        raise DeviceError(f"Device {name} ({torch.cuda.get_device_name(device)}) is older than the kernels support.")
    try:
        triton.runtime.driver.active.get_current_device()  # the first use builds Triton's link to the driver
    except Exception as error:  # no C compiler, another driver, ...
        raise DeviceError(f"Device {name}: Triton {triton.__version__} cannot drive it: {error}.") from error
    return Place("planes", device)


@contextmanager
def memory_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turns running out of memory into a DeviceError that says while doing `what`, and the remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(what, remedy, isinstance(error, torch.OutOfMemoryError)) from error
    except RuntimeError as error:  # torch's CPU allocator has no exception type of its own
        if "allocate memory" not in str(error):
            raise
        raise _out_of_memory(what, remedy, on_gpu=False) from error


def _out_of_memory(what: str, remedy: str, on_gpu: bool) -> DeviceError:
    if on_gpu and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        where = f"the GPU has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        where = f"the machine has {psutil.virtual_memory().available / 2**30:.1f} GiB free"
    return DeviceError(f"Out of memory while {what}: {where}{remedy and f'; {remedy}'}.")
