"""Compiles, for GPUs that are not here, every kernel that calls of our functions launch, as they would launch it.

The calls run with CPU tensors in a process of their own without TRITON_INTERPRET: there Triton's driver is replaced by
one that names the target, and a launch compiles its kernel and stops there. So what is compiled has the arguments, the
alignments, the tile sizes and the options of the real launch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass
class Kernel:
    """What came out: `asm` is PTX for CUDA and AMDGCN text for HIP; `spills` in bytes (CUDA) or registers (HIP)."""

    name: str
    asm: str
    shared: int
    registers: int
    spills: int


def compile_launches(
    file: str, targets: Sequence[str] = ("sm_90", "gfx942"), timeout: float = 900
) -> dict[str, dict[str, list[Kernel]]]:
    """Makes the calls that `launches(target)` in the Python file `file` names -> kernels[target][call], in order.

    One process for each of the targets, side by side. Raises RuntimeError with the compiler's own words when one fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_for(target: str) -> dict[str, list[Kernel]]:
        command = [sys.executable, __file__, file, target]
        child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
        if child.returncode:
            raise RuntimeError(child.stderr[-4000:])
        calls = json.loads(child.stdout.splitlines()[-1])
        return {call: [Kernel(**kernel) for kernel in kernels] for call, kernels in calls.items()}

    with ThreadPoolExecutor() as pool:
        return dict(zip(targets, pool.map(compile_for, targets), strict=True))


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: object) -> None:
        self.target = target

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled_launches(file: str, target: str) -> dict[str, list[CompiledKernel]]:
    """The work of the child process: what Triton compiles for the target, by call."""
    import triton
    from triton.backends.compiler import GPUTarget

    launched = []
    run = triton.runtime.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    triton.runtime.driver.set_active(_Driver(GPUTarget(*TARGETS[target])))
    triton.runtime.JITFunction.run = compile_only
    kernels = {}
    for name, call in module.launches(target).items():
        call()
        kernels[name], launched[:] = list(launched), []
    return kernels


def _kernel(compiled: CompiledKernel) -> Kernel:
    if "cubin" in compiled.asm:
        asm = compiled.asm["ptx"]
        registers, spills = _cubin_usage(compiled.asm["cubin"])
    else:
        asm = compiled.asm["amdgcn"]
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", asm))
    return Kernel(compiled.metadata.name, asm, compiled.metadata.shared, registers, spills)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread (there is a stack only where registers spill)."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


if __name__ == "__main__":
    results = compiled_launches(*sys.argv[1:])
    print(json.dumps({call: [asdict(_kernel(kernel)) for kernel in kernels] for call, kernels in results.items()}))
