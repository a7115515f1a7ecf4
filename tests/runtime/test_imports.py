"""The runtime needs NumPy alone: proved with an import blocker; `test_packages.py` installs it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

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
