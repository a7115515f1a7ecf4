"""Imports run downhill, dit_export -> dit_runtime -> numpy, and never in a circle."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "runtime/python"
HOMES = {"dit_export": ROOT / "dit_export", **{name: RUNTIME / name for name in ("dit_runtime", "dit_serve")}}
# What dit_runtime may name: NumPy always; engines, tokenizers, PyAV, Pillow and Ray in the function that opens them.
ENGINES = {
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "tokenizers",
    "av",
    "ray",
    "PIL",
    "dit_runtime",
}

Modules = Mapping[str, ast.Module]


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax tree of each module; a package's name ends in `.__init__`."""
    return {
        ".".join([home, *path.relative_to(folder).with_suffix("").parts]): ast.parse(path.read_text(encoding="utf-8"))
        for home, folder in HOMES.items()
        for path in folder.rglob("*.py")
    }


def statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield each import and whether it stands inside a function; those for type checkers alone do not count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other, inside)
        else:
            yield from statements(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def names(statement: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Return the dotted names that a statement loads: modules, or what is taken from one."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    parts = module.split(".")[: -statement.level] if statement.level else []
    return [".".join([*parts, *filter(None, [statement.module]), alias.name]) for alias in statement.names]


def source(name: str, modules: Modules) -> str:
    """Return the module of ours that holds a dotted name, or nothing."""
    while name and name not in modules:
        if f"{name}.__init__" in modules:
            return f"{name}.__init__"
        name = name.rpartition(".")[0]
    return name


def graph(modules: Modules) -> dict[str, set[str]]:
    """Return the modules of ours that each module imports, anywhere in its text."""
    return {
        module: {source(name, modules) for statement, _ in statements(tree) for name in names(statement, module)}
        - {"", module}
        for module, tree in modules.items()
    }


def cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of a circle, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def uphill(modules: Modules) -> list[str]:
    """Return what the runtime imports beyond NumPy, and engines that it imports at the top of a file."""
    allowed = sys.stdlib_module_names | {"numpy", "dit_runtime"}
    return [
        f"{module}: {name}"
        for module, tree in modules.items()
        if module.startswith("dit_runtime")
        for statement, inside in statements(tree)
        for name in names(statement, module)
        if name.partition(".")[0] not in (allowed | ENGINES if inside else allowed)
    ]


def test_no_circle():
    edges = graph(sources())
    assert len(edges) > 80 and sum(map(len, edges.values())) > 200
    assert cycle(edges) == []


def test_nothing_uphill():
    assert uphill(sources()) == []


def test_the_server_is_a_leaf():
    """It imports the runtime; the toolchain and the runtime do not import it, nor it the toolchain."""
    for module, others in graph(sources()).items():
        homes = {other.partition(".")[0] for other in others}
        assert homes <= (
            {"dit_serve", "dit_runtime"} if module.startswith("dit_serve") else {"dit_export", "dit_runtime"}
        )


def test_circles_and_climbs_are_seen():
    """In any form of the statement, inside functions too; what type checkers alone read is neither."""
    modules = {
        "dit_export.a.__init__": "",
        "dit_export.a.b": "from dit_export.a import c",
        "dit_export.a.c": "def f():\n    from ..d import g",
        "dit_export.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dit_export.a.b",
        "dit_runtime.e": "import numpy, json\ndef f():\n    import openvino",
    }
    parsed = {name: ast.parse(text) for name, text in modules.items()}
    assert graph(parsed)["dit_export.a.b"] == {"dit_export.a.c"}
    assert graph(parsed)["dit_export.a.c"] == {"dit_export.d"}
    assert cycle(graph(parsed)) == [] and uphill(parsed) == []
    for text in ("import dit_export.a.b", "from dit_export.a.b import f", "from .a import b", "from .a.b import f"):
        assert len(set(cycle(graph(parsed | {"dit_export.d": ast.parse(text)})))) == 3
    names_its_module = {"dit_export.a.__init__": ast.parse("from dit_export.a.b import f")}
    assert not cycle(graph(parsed | names_its_module))
    assert cycle(graph(parsed | names_its_module | {"dit_export.a.c": ast.parse("from dit_export.a import f")}))
    for text in ("import openvino", "def f():\n    import torch", "from dit_export.d import g"):
        assert len(uphill({"dit_runtime.e": ast.parse(text)})) == 1
