"""JSON to a manifest: every key and type is checked here, what they say together in `checks`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from dit_runtime.bundle.checks import (
    FLOAT32_MAX,
    SIZES,
    check_count,
    check_network,
    check_presets,
    check_prompts,
    check_row,
    check_sizes,
    check_stages,
    expect,
    is_size,
)
from dit_runtime.bundle.records import DTYPES, RUNS, File, Guidance, Manifest, Port, Prompt, Size, Stage, TensorSpec
from dit_runtime.errors import nearest
from dit_runtime.facts import LIMITS
from dit_runtime.sampling.process import Process, is_number

R = TypeVar("R", Port, TensorSpec, Stage, Prompt, Guidance, File, Size, Manifest)
KINDS: dict[str, type] = {"str": str, "int": int, "bool": bool}


def parse(table: dict[str, Any]) -> Manifest:
    """Return the manifest that a JSON table holds; raise ValueError with one line where something is wrong."""
    for key in ("null", "files", "source", "presets"):
        expect(isinstance(table.get(key, {}), dict), key, table.get(key), "a table")
        check_count(key, table.get(key, {}), key)
    if "files" not in table:
        raise ValueError("manifest lacks 'files'")
    files = {name: _record(File, file, f"files: {name}") for name, file in table["files"].items()}
    for name, file in files.items():
        expect(file.size >= 0, f"files: {name}: size", file.size, "0 or more")
    most = LIMITS["bundle_bytes"]
    expect(sum(file.size for file in files.values()) <= most, "files", "more bytes in all", f"at most {most}")
    labels = _list(table, "labels", "manifest")
    for label in labels:
        expect(isinstance(label, str), "a label", label, "a name")
    others = _list(table, "sizes", "manifest") if "sizes" in table else []
    manifest = _record(
        Manifest,
        table,
        "manifest",
        labels=tuple(labels),
        guidance=_record(Guidance, table.get("guidance"), "guidance"),
        prompts=tuple(_prompt(prompt, f"prompt {index}") for index, prompt in enumerate(_prompts(table))),
        files=files,
        sizes=tuple(_size(size, f"size {index}") for index, size in enumerate(others, 1)),
        **_of_a_size(table, "manifest"),
    )
    default = manifest.guidance.default
    expect(is_number(default) and abs(default) <= FLOAT32_MAX, "guidance: default", default, "a number of float32")
    check_sizes(manifest)
    for sized in manifest.each_size:
        check_network_of(sized)
    check_presets(manifest.presets, manifest.process)
    if manifest.labels:
        expect(len(manifest.labels) == manifest.classes, "labels", f"{len(manifest.labels)} names", manifest.classes)
    return manifest


def check_network_of(manifest: Manifest) -> None:
    """Check the ports and stages of a manifest's own size."""
    check_network(manifest.ports, manifest.null, manifest.guidance.channels, manifest.guidance.port)
    check_stages(manifest)
    check_prompts(manifest)


def _of_a_size(table: Any, where: str) -> dict[str, Any]:
    """Return what each size has a value of its own for, parsed."""
    ports, stages = _list(table, "ports", where), _list(table, "stages", where)
    before = "" if where == "manifest" else f"{where}: "
    for key in ("model", "built_with", "parity"):
        expect(isinstance(table.get(key, {}), dict), f"{before}{key}", table.get(key), "a table")
    return {
        "ports": tuple(_port(port, f"{before}port {index}") for index, port in enumerate(ports)),
        "process": Process.from_dict(table.get("process", {})),
        "stages": tuple(_stage(stage, f"{before}stage {index}") for index, stage in enumerate(stages)),
    }


def _size(table: Any, where: str) -> Size:
    where = f"{where} ({table.get('size')})" if isinstance(table, dict) else where
    return _record(Size, table, where, **_of_a_size(table, where))


def _record(kind: type[R], table: Any, where: str, **parsed: Any) -> R:
    """Build a record: every key must be known, and every value that is not `parsed` of its field's type."""
    known = {entry.name: entry for entry in fields(kind)}
    expect(isinstance(table, dict), where, table, f"a table of {', '.join(known)}")
    for key, value in table.items():
        if key not in known:
            raise ValueError(
                f"{where} has the unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}"
            )
        expected = KINDS.get(str(known[key].type))
        if key not in parsed and expected is not None:
            expect(type(value) is expected, f"{where}: {key}", value, expected.__name__)
    for name, entry in known.items():
        if name not in table and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    return kind(**table | parsed)


def _list(table: Any, key: str, where: str) -> list[Any]:
    value = table.get(key) if isinstance(table, dict) else None
    expect(isinstance(value, list), f"{where}: {key}", value, "a list")
    check_count(key, value or (), f"{where}: {key}")
    return list(value or ())


def _port(table: Any, where: str) -> Port:
    where = f"{where} ({table.get('name')})" if isinstance(table, dict) else where
    return _record(Port, table, where, shape=tuple(_list(table, "shape", where)))


def _prompts(table: Any) -> list[Any]:
    return _list(table, "prompts", "manifest") if "prompts" in table else []


def _prompt(table: Any, where: str) -> Prompt:
    prompt = _record(Prompt, table, where)
    expect(bool(prompt.ids), f"{where}: ids", prompt.ids, "a name")
    for key, size in (("tokens", prompt.tokens), ("size", prompt.size)):
        expect(is_size(size), f"{where}: {key}", size, SIZES)
    for key, template in (("template", prompt.template), ("negative", prompt.negative or "{}")):
        expect(template.count("{}") == 1, f"{where}: {key}", template, "text with {} in one place")
    return prompt


def _stage(table: Any, where: str) -> Stage:
    where = f"{where} ({table.get('name')})" if isinstance(table, dict) else where
    engines = table.get("engines", {}) if isinstance(table, dict) else {}
    expect(isinstance(engines, dict), f"{where}: engines", engines, "a table of files by backend")
    check_count("engines", engines, f"{where}: engines")
    for backend, names in engines.items():
        check_count("shared", names if isinstance(names, list) else (), f"{where}: engines of {backend}")
        whole = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        expect(bool(whole), f"{where}: engines of {backend}", names, "a list of files")
    specs = {
        key: tuple(_tensor(spec, f"{where}: {key}") for spec in _list(table, key, where)) for key in ("reads", "gives")
    }
    files = {str(backend): tuple(names) for backend, names in engines.items()}
    shared = _list(table, "shared", where) if isinstance(table, dict) and "shared" in table else []
    expect(all(isinstance(name, str) for name in shared), f"{where}: shared", shared, "a list of files")
    stage = _record(Stage, table, where, **specs, engines=files, shared=tuple(shared))
    expect(bool(stage.name), f"{where}: name", stage.name, "a name")
    expect(stage.runs in RUNS, f"{where}: runs", stage.runs, f"one of {', '.join(RUNS)}")
    expect(is_size(stage.max_batch), f"{where}: max_batch", stage.max_batch, f"1 to {LIMITS['size']}")
    return stage


def _tensor(table: Any, where: str) -> TensorSpec:
    where = f"{where} {table.get('name')}" if isinstance(table, dict) else where
    spec = _record(TensorSpec, table, where, shape=tuple(_list(table, "shape", where)))
    expect(bool(spec.name), f"{where}: name", spec.name, "a name")
    expect(spec.dtype in DTYPES, f"{where}: dtype", spec.dtype, f"one of {', '.join(DTYPES)}")
    sizes = all(is_size(size) or (isinstance(size, str) and size) for size in spec.shape)
    expect(sizes, f"{where}: shape", list(spec.shape), f"{SIZES} and names of free dimensions")
    check_row([size for size in spec.shape if isinstance(size, int)], where)
    return spec
