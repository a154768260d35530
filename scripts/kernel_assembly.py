"""Compiles kernels for GPUs that are not here, and reads the machine code that comes out.

A launch compiles its kernel and stops there: Triton's driver is replaced by one that names the target. So what is read
has the arguments, the alignments, the tile sizes and the options of the real launch. That works only in a process
without TRITON_INTERPRET.

The assembly of CUDA comes from `nvdisasm` and the registers from `cuobjdump`, both inside the Triton package; that of
HIP is the compiler's text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    **{f"sm_{version}": ("cuda", version, 32) for version in (75, 80, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}


@dataclass(frozen=True)
class Launch:
    """A kernel as it was launched: its name, what it was given by keyword, and what Triton compiled."""

    name: str
    arguments: dict[str, Any]
    compiled: Any  # a triton CompiledKernel


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: registers a thread, bytes of shared memory, and spills (CUDA: bytes, HIP: registers)."""

    registers: int
    shared_bytes: int
    spills: int


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def launches_of(call: Callable[[], object], target: str | None = None) -> list[Launch]:
    """What `call` launches, compiled for the target, in order; nothing runs, so results are not to be looked at.

    Without a target, for the GPU that is there.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    launched = []
    run = triton.runtime.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(Launch(self.__name__, kwargs, run(self, *args, grid=grid, warmup=True, **kwargs)))

    if target:
        triton.runtime.driver.set_active(_Driver(GPUTarget(*TARGETS[target])))
    triton.runtime.JITFunction.run = compile_only
    try:
        call()
    finally:
        triton.runtime.JITFunction.run = run
    return launched


def disassemble(compiled: Any) -> str:
    """SASS of a kernel for CUDA, AMDGCN text of one for HIP."""
    if "cubin" not in compiled.asm:
        return compiled.asm["amdgcn"]
    return _cuda_tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])


def usage(compiled: Any) -> Usage:
    """Registers, shared memory and spills of a kernel."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", text))
    else:
        # There is a stack only where registers spill.
        text = _cuda_tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
        registers, spills = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return Usage(registers, compiled.metadata.shared, spills)


def _cuda_tool(name: str, option: str, cubin: bytes) -> str:
    import triton.backends.nvidia

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


_LABEL = re.compile(r"^(\.?L\w+):")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_AMDGCN = re.compile(r"^\t([a-z]\w+(?:\s.*)?)$")
_BRANCH = re.compile(r"^(?:BRA|s_cbranch\w*|s_branch)\b.*?(\.?LBB\w+|\.L_\w+)")


def main_loop(assembly: str) -> list[str]:
    """The instructions of the longest loop without another loop inside, predicates removed; all if there is none."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _SASS.match(line) or _AMDGCN.match(line):
            branch = _BRANCH.match(found[1])
            instructions.append(found[1])
            if branch and labels.get(branch[1], len(instructions)) < len(instructions) - 1:  # not a trap at the end
                loops.append((labels[branch[1]], len(instructions)))
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, len(instructions)))
    return instructions[start:end]


def opcode(instruction: str) -> str:
    """`LDG.E.128.CONSTANT` of `LDG.E.128.CONSTANT R4, ...`."""
    return instruction.split()[0]


# The pipe of each instruction of CUDA, by the start of its name: the first that fits. From Nsight Compute's
# documentation of the pipelines; the rates are those of the CUDA programming guide's table of throughputs.
_PIPES = (
    ("conversion", r"I2F\.|I2F$|F2I|F2F|MUFU|POPC|FLO|BREV|I2I|FRND"),  # the special-function unit
    ("tensor", r"HGMMA|HMMA|IMMA|IGMMA|QGMMA|UTC\w*MMA|QMMA|OMMA"),
    ("load/store", r"LD|ST[GSL]?\b|ATOM|RED\b|SHFL|UTMA|UBLKCP"),
    ("dot product", r"IDP"),  # by the heavier half of the FMA pipe
    ("FMA", r"FFMA|FMUL|FADD|HFMA|HADD|HMUL|IMAD|IMUL"),
    ("FP64", r"DFMA|DADD|DMUL|DSETP|DMNMX"),
    ("integer", r"LOP|SHF|IADD|LEA|ISETP|PRMT|SEL|I?MNMX|VIMNMX|VIADD|I2FP|F2FP|FSEL|FSETP|FMNMX|PLOP|VABSDIFF|SGXT"
     r"|BMSK|IABS|MOV|P2R|R2P|HSETP|HMNMX|VOTE|LOP3|ISCADD|CS2R|IMNMX"),
)  # fmt: skip
_COMPILED_PIPES = [(pipe, re.compile(pattern)) for pipe, pattern in _PIPES]


def pipe_of(code: str) -> str:
    """The pipe that works off a CUDA instruction; "" for what only issues (branches, barriers, uniform registers)."""
    return next((pipe for pipe, pattern in _COMPILED_PIPES if pattern.match(code)), "")


def load_widths(instructions: list[str]) -> Counter[int]:
    """How many loads from global memory there are of each width, in bytes a thread."""
    widths: Counter[int] = Counter()
    for code in map(opcode, instructions):
        if code.startswith(("LDG", "LDGSTS")):
            parts = code.split(".")
            widths[next((size for part, size in _WIDTHS.items() if part in parts), 4)] += 1
        elif found := re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)", code):
            name = re.sub(r"_(?:d16|hi|lds)(?=_|$)", "", found[1]).removeprefix("d16_").removeprefix("hi_")
            widths[_AMD_WIDTHS.get(name, 4)] += 1
    return widths


_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_WIDTHS = {
    **{"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4},
    **{"ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2, "b16": 2},
    **{"ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1},
}
