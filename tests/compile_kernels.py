"""Compiles Triton kernels for GPUs that are not here: `compile_kernels` for tests, a process of its own for the work.

`triton.compile` is unavailable under TRITON_INTERPRET, which the test session sets; so the jobs go to a child process
without it, all in one, because importing torch and triton takes longer than compiling.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@dataclass
class Job:
    """One kernel to compile. Names "package.module:name" (the kernel, constexprs that are objects) are imported there.

    `types` gives the arguments in order: "*fp32", "i32", "fp32", ...; every pointer and every name in `aligned` is
    taken to be divisible by 16. Arguments named in `constexprs` need no type.
    """

    kernel: str
    target: str
    types: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    aligned: list[str] = field(default_factory=list)
    options: dict[str, int] = field(default_factory=dict)


@dataclass
class Compiled:
    """What came out: `asm` is PTX for CUDA and AMDGCN text for HIP; `spills` in bytes (CUDA) or registers (HIP)."""

    asm: str
    shared: int
    registers: int
    spills: int


def compile_kernels(jobs: list[Job], timeout: float = 300) -> list[Compiled]:
    """Compiles every job. Raises RuntimeError with the compiler's own words when one fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )
    if child.returncode:
        raise RuntimeError(child.stderr[-4000:])
    return [Compiled(**result) for result in json.loads(child.stdout.splitlines()[-1])]


def _resolve(value: object) -> object:
    from importlib import import_module

    if not isinstance(value, str) or ":" not in value:
        return value
    module, name = value.split(":")
    return getattr(import_module(module), name)


def _compile(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _resolve(job.kernel)
    constexprs = {name: _resolve(value) for name, value in job.constexprs.items()}
    signature = {name: "constexpr" if name in constexprs else job.types[name] for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in job.aligned
    }
    target = GPUTarget(*TARGETS[job.target])
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=job.options)
    if target.backend == "hip":
        asm = compiled.asm["amdgcn"]
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", asm))
    else:
        asm = compiled.asm["ptx"]
        registers, spills = _cubin_usage(compiled.asm["cubin"])
    return Compiled(asm, compiled.metadata.shared, registers, spills)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread (there is a stack only where registers spill)."""
    import tempfile

    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


if __name__ == "__main__":
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_compile, [Job(**job) for job in json.load(sys.stdin)]))
    print(json.dumps([asdict(result) for result in results]))
