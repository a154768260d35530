"""Compiles, for GPUs that are not here, every kernel that calls of our functions launch, as they would launch it.

The calls run with CPU tensors in a process of their own without TRITON_INTERPRET: see scripts/kernel_assembly.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from kernel_assembly import Launch, disassemble, launches_of, main_loop, opcode, usage

TARGETS = ("sm_90", "gfx942")


@dataclass
class Kernel:
    """What came out: `asm` is PTX for CUDA and AMDGCN text for HIP; `spills` in bytes (CUDA) or registers (HIP).

    `loop` are the machine's operations in the main loop, if they were asked for.
    """

    name: str
    asm: str
    shared: int
    registers: int
    spills: int
    loop: list[str] = field(default_factory=list)


def compile_launches(
    file: str, targets: Sequence[str] = TARGETS, loops: bool = False, timeout: float = 900
) -> dict[str, dict[str, list[Kernel]]]:
    """Makes the calls that `launches(target)` in the Python file `file` names -> kernels[target][call], in order.

    One process a target, as many at a time as there are cores. Raises RuntimeError with the compiler's own words when
    one fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_for(target: str) -> dict[str, list[Kernel]]:
        command = [sys.executable, __file__, file, target, *["loops"] * loops]
        child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
        if child.returncode:
            raise RuntimeError(child.stderr[-4000:])
        calls = json.loads(child.stdout.splitlines()[-1])
        return {call: [Kernel(**kernel) for kernel in kernels] for call, kernels in calls.items()}

    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        return dict(zip(targets, pool.map(compile_for, targets), strict=True))


def compiled_launches(file: str, target: str, loops: bool) -> dict[str, list[Kernel]]:
    """The work of the child process: what Triton compiles for the target, by call."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    described = partial(_kernel, loops=loops)
    return {name: list(map(described, launches_of(call, target))) for name, call in module.launches(target).items()}


def _kernel(launch: Launch, loops: bool) -> Kernel:
    compiled, used = launch.compiled, usage(launch.compiled)
    asm = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    loop = list(map(opcode, main_loop(disassemble(compiled)))) if loops else []
    return Kernel(compiled.metadata.name, asm, used.shared_bytes, used.registers, used.spills, loop)


if __name__ == "__main__":
    results = compiled_launches(*sys.argv[1:3], loops="loops" in sys.argv[3:])
    print(json.dumps({call: [asdict(kernel) for kernel in kernels] for call, kernels in results.items()}))
