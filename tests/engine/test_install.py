"""What an installation holds, what starting it imports, and which way the packages import one another."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "trichord": "engine",
    "trichord.commands": "engine/commands",
    "trichord.tokenizers": "engine/tokenizers",
    "trichord.triton_kernels": "triton_kernels",
    "trichord.cpu_fallback": "cpu_fallback",
}
DEMO_MODEL = ROOT / "engine" / "demo" / "tales.gguf"
BACKENDS = ("trichord.triton_kernels", "trichord.cpu_fallback")


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a new interpreter prints that runs this code."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=os.environ | environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="building a wheel needs setuptools")
def test_the_wheel_holds_every_module_and_the_demo_model(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    # In a copy, so that the build leaves nothing behind in the checkout.
    source = tmp_path / "source"
    source.mkdir()
    for name in (*FOLDERS.values(), "pyproject.toml", "README.md", "LICENSE"):
        copy_into(ROOT / name, source / name)
    result = subprocess.run([*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("trichord-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info.file_size for info in archive.infolist()}
        (entry_points,) = (name for name in held if name.endswith("entry_points.txt"))
        assert "trichord = trichord.cli:main" in archive.read(entry_points).decode()
    sizes = {f"{name.replace('.', '/')}.py": path.stat().st_size for name, path in modules()}
    sizes["trichord/demo/tales.gguf"] = DEMO_MODEL.stat().st_size
    assert {name: held.get(name) for name in sizes} == sizes


def copy_into(source: Path, target: Path) -> None:
    """Copies a file, or a package without what Python left in it."""
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    "code",
    [
        "import trichord",
        "from trichord import GGUFFile, SamplingParams, TrichordError, WeightFormat",
        "from trichord import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass",
        "from trichord import cli\nassert cli.main(['info', sys.argv[1]]) == 0",
    ],
    ids=["import", "names", "help", "info"],
)
def test_what_needs_no_model_imports_no_torch(code):
    report = "print('imported:', {'torch', 'triton', 'numba'} & sys.modules.keys())"
    output = python(f"import sys\n{code}\n{report}", str(DEMO_MODEL))
    assert output.endswith("imported: set()\n")


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("triton is not here")

sys.meta_path.insert(0, Blocked())
from trichord import LLM, SamplingParams
llm = LLM(device="cpu")
print(llm.generate("Once upon a time", SamplingParams(max_tokens=8, temperature=0))[0].outputs[0].text)
print(len(llm.logits([0, 5, 6])))
assert not any(name.startswith("trichord.triton_kernels") for name in sys.modules)
"""


def test_the_cpu_works_where_triton_cannot_be_imported():
    *text, rows = python(BLOCKED).splitlines()
    assert "".join(text).strip()
    assert rows == "3"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the tree: its name, as a file of the installed package would have it, and its file."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{package}.{path.stem}", path


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Names of all the modules that a file imports, anywhere in it; `from a import b` may mean the module a.b."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


EVERY_MODULE = pytest.mark.parametrize(("module", "path"), [pytest.param(*each, id=each[0]) for each in modules()])


@EVERY_MODULE
def test_imports_run_one_way(module, path):
    ours = {name for name in imports(path) if belongs(name, "trichord")}
    home = next((backend for backend in BACKENDS if belongs(module, backend)), None)
    if module == "trichord.weight_format":
        assert not ours
    elif home:
        allowed = (home, "trichord.weight_format")
        assert all(any(belongs(name, each) for each in allowed) for name in ours)
    else:
        assert not any(belongs(name, backend) for name in ours for backend in BACKENDS)
        # Dispatch imports the backends by name; nobody else does so.
        strings = {node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant)}
        assert module == "trichord.dispatch" or not strings.intersection(BACKENDS)


@EVERY_MODULE
def test_triton_is_imported_only_for_its_kernels(module, path):
    outside = not belongs(module, "trichord.triton_kernels")
    assert not (outside and any(belongs(name, "triton") for name in imports(path)))
