"""The runtime needs NumPy alone: proved with an import blocker, and in an environment that holds nothing else."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "runtime" / "python" / "dit_runtime"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
FOREIGN = (
    *("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "dit_export", "diffusers", "safetensors"),
    *("tokenizers", "transformers"),
)

# Nothing but the standard library, NumPy and the runtime itself may be imported.
BLOCKER = """
import sys
allowed = sys.stdlib_module_names | {"numpy", "dit_runtime"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, folder: Path, **environment: str) -> str:
    """Run the code in a fresh interpreter and return what it prints."""
    variables = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_blocker_blocks(tmp_path):
    """Otherwise the tests below would prove nothing."""
    code = BLOCKER + "try:\n    import onnxruntime\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert python(code, tmp_path) == "blocked: onnxruntime\n"


def test_every_module_with_numpy_alone(tmp_path):
    """Backends too: what they need they import when they open something."""
    assert len(MODULES) > 12 and "dit_runtime.backends.ort" in MODULES
    code = BLOCKER + f"import importlib, json\nfor name in {MODULES!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = json.loads(python(code, tmp_path))
    assert not {*loaded} & {*FOREIGN}


def test_the_front_door_loads_no_backend(tmp_path):
    """Without the blocker, in an environment that has all of them: nothing is loaded because it happens to be there."""
    code = "import sys, json, dit_runtime, dit_runtime.cli\nprint(json.dumps(list(sys.modules)))"
    loaded = json.loads(python(code, tmp_path))
    assert not {name.partition(".")[0] for name in loaded} & {*FOREIGN}
    assert "dit_runtime.backends.ort" not in loaded


def test_import_does_no_work(tmp_path):
    """No file, no variable of the environment, no signal handler, no thread, nothing on the terminal."""
    code = (
        "import numpy, os, sys, json, signal, threading, warnings, logging\n"
        "def state():\n"
        "    handlers = [signal.getsignal(number) for number in signal.valid_signals()]\n"
        "    logs = (logging.root.level, len(logging.root.handlers), len(warnings.filters))\n"
        "    return dict(os.environ), os.getcwd(), handlers, threading.active_count(), logs, numpy.geterr()\n"
        "before = state()\n"
        f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "assert state() == before\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    assert python(code, home, HOME=str(home), XDG_CACHE_HOME=str(home), TMPDIR=str(home)) == ""
    assert not list(home.rglob("*"))


def test_imports_run_one_way():
    """No module of the runtime imports, over however many others, itself."""
    names = {name: PACKAGE.parent / Path(*name.split(".")) for name in MODULES}
    paths = {name: path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for name, path in names.items()}
    graph = {name: {*_imported(path)} & {*MODULES} - {"dit_runtime"} for name, path in paths.items()}
    assert graph["dit_runtime.pipeline"] >= {"dit_runtime.engines", "dit_runtime.run"}
    assert [*TopologicalSorter(graph).static_order()]  # raises CycleError with the circle


def _imported(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:  # what is imported in a function runs later
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module or "" for name in inner)


def test_the_toolchains_table_needs_no_torch(tmp_path):
    """dit_export -> dit_runtime, never back: the one import between them that a light part of the toolchain makes."""
    code = (
        BLOCKER.replace('"dit_runtime"}', '"dit_runtime", "dit_export"}')
        + "import dit_export.recipe, dit_export.networks.spec, dit_export.cli"
    )
    assert python(code, tmp_path) == ""


def installed(name: str) -> Iterator[Distribution]:
    """Yield an installed distribution and all that it requires here; a marker that asks for an extra is not met."""
    waiting, seen = [name], set()
    while waiting:
        one = distribution(waiting.pop())
        if one.name not in seen:
            seen.add(one.name)
            yield one
            asked = map(Requirement, one.requires or ())
            waiting += [need.name for need in asked if need.marker is None or need.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module", params=["offline", pytest.param("registry", marks=pytest.mark.slow)])
def bare(request, tmp_path_factory) -> Path:
    """The bin folder of an environment that holds this project, onnxruntime and what that brings, and nothing else.

    Offline, links to what is installed here stand for what pip would fetch; the project is built and installed by pip
    either way.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    pip, online = [sys.executable, "-m", "pip"], os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    online.pop("PIP_NO_INDEX", None)
    install = [*pip, "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    if request.param == "registry":
        subprocess.run([*install, "numpy", "onnxruntime"], check=True, cwd=folder, env=online)
        subprocess.run([*install, "--no-deps", str(ROOT)], check=True, cwd=folder, env=online)
        return folder / "bin"
    (packages,) = folder.glob("lib/python3*/site-packages")
    for one in installed("onnxruntime"):
        for top in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
            (packages / top).symlink_to(one.locate_file(top))
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(wheel, check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    subprocess.run([*install, "--no-deps", "--no-index", str(built)], check=True, cwd=folder)
    return folder / "bin"


def test_verify_where_only_onnxruntime_is_installed(bare, handmade, tmp_path):
    """The promise to a target device, kept by the package as it is installed, not by this source tree."""
    code = f"import importlib.util; print([name for name in {FOREIGN!r} if importlib.util.find_spec(name)])"
    found = subprocess.run(
        [bare / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "['onnxruntime', 'dit_export']"
    done = subprocess.run(
        [bare / "dit-run", "verify", handmade("labels")], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("verified\n")
