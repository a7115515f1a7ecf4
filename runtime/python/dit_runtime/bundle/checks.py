"""Checks of a manifest beyond the types of its keys: ports that fit, a source for every input of a stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from dit_runtime.bundle.records import (
    BEFORE_LOOP,
    DTYPES,
    GUIDANCE,
    LABELS,
    LOGVAR,
    MEAN,
    MEASURED,
    RESERVED,
    ROLES,
    Manifest,
    Port,
    Stage,
    TensorSpec,
    count_classes,
    size_name,
)
from dit_runtime.errors import nearest
from dit_runtime.facts import FACTS, LIMITS, PRESET_FIELDS
from dit_runtime.sampling.process import SOLVERS, Process, is_number

Sources = dict[str, tuple[str, str, tuple[int, ...]]]  # role, dtype and shape of a row, by the tensor's name
SIZES = f"sizes of 1 to {LIMITS['size']}"
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def _check_port(port: Port, where: str) -> None:
    expect(bool(port.name), f"{where}: name", port.name, "a name")
    expect(port.role in ROLES, f"{where}: role", port.role, f"one of {', '.join(ROLES)}")
    expect(port.dtype in DTYPES, f"{where}: dtype", port.dtype, f"one of {', '.join(DTYPES)}")
    expect(all(is_size(size) for size in port.shape), f"{where}: shape", list(port.shape), SIZES)
    check_row(port.shape, where)
    most, size = LIMITS["port_bytes"], 8 if port.dtype == "int64" else 4
    expect(size * math.prod(port.shape) <= most, where, f"{[*port.shape]} a row", f"at most {most} bytes")
    if port.dtype == "int64":
        expect(is_size(port.size), f"{where}: size", port.size, f"1 to {LIMITS['size']} values")
    else:
        expect(port.size == 0, f"{where}: size", port.size, "0, for it is float32")


def check_count(key: str, entries: Sized, where: str) -> None:
    """Refuse more entries than `limits` in facts.json allows for the key, if it names it."""
    most = LIMITS.get(key, len(entries))
    expect(len(entries) <= most, where, f"{len(entries)} entries", f"at most {most}")


def check_row(row: Sequence[int], where: str) -> None:
    most, rank = LIMITS["row"], LIMITS["rank"]
    fits = len(row) <= rank and math.prod(row) <= most
    expect(fits, where, f"{[*row]} a row", f"at most {most} numbers in {rank} dimensions")


def check_network(
    ports: Sequence[Port], null: Mapping[str, int | float], channels: int | None = None, guidance_port: str = ""
) -> None:
    """Raise ValueError where no bundle can hold a network of these ports, with these constants of guidance, as many
    guided channels (None: all), and this port for the weight of guidance."""
    for index, port in enumerate(ports):
        _check_port(port, f"port {index} ({port.name})")
        if port.name in RESERVED:
            raise ValueError(f"a port is called {port.name!r}, as a tensor of a bundle's stages; give it another name")
    for role in ("state", "time"):
        names = [port.name for port in ports if port.role == role]
        expect(len(names) == 1, f"{role} ports", names, "exactly one")
    state, time = (next(port for port in ports if port.role == role) for role in ("state", "time"))
    expect(
        state.dtype == "float32" and bool(state.shape), f"port {state.name}", _row(state), "float32 of rank 1 or more"
    )
    expect(time.dtype == "float32" and not time.shape, f"port {time.name}", _row(time), "float32 of rank 0")
    if channels is not None:
        expect(1 <= channels <= state.shape[0], "guidance: channels", channels, f"1 to {state.shape[0]}")
    conditions = {port.name: port for port in ports if port.role == "condition"}
    _check_masks(ports, conditions)
    pictures = [port for port in ports if port.picture]
    expect(len(pictures) <= 1, "ports of a picture", [port.name for port in pictures], "one at most")
    for port in pictures:
        fits = port.role == "condition" and not port.masks and (port.dtype, port.shape) == (state.dtype, state.shape)
        latents = f"a condition port of {state.dtype} {list(state.shape)}, as the state"
        expect(fits, f"port of a picture: {port.name}", f"{port.role} {_row(port)}", latents)
    if guidance_port:
        weight = conditions.get(guidance_port)
        fits = weight is not None and weight.dtype == "float32" and not weight.shape and guidance_port not in null
        expect(fits, "guidance: port", guidance_port, "a condition port of float32 [] without a constant in null")
    for name, value in null.items():
        expect(name in conditions, "null", name, f"one of the condition ports {', '.join(conditions) or '(none)'}")
        port = conditions[name]
        number = type(value) is int or (type(value) is float and port.dtype == "float32")
        fits = number and is_number(value) and (port.dtype == "int64" or abs(value) <= FLOAT32_MAX)
        expect(fits, f"null: {name}", value, f"a number of {port.dtype}")
        if port.dtype == "int64":
            expect(0 <= value < port.size, f"null: {name}", value, f"0 to {port.size - 1}")
        expect(not port.masks or value == 1, f"null: {name}", value, "1, for it is a mask")
    classes, most = count_classes(ports, null), LIMITS["classes"]
    expect(classes <= most, f"port {LABELS}", f"{classes} classes", f"at most {most}")
    if LABELS in null and classes:
        expect(null[LABELS] == classes, f"null: {LABELS}", null[LABELS], f"{classes}, after all classes")


def _check_masks(ports: Sequence[Port], conditions: Mapping[str, Port]) -> None:
    masked: set[str] = set()
    for port in ports:
        if not port.masks:
            continue
        where, other = f"port {port.name}: masks", conditions.get(port.masks)
        if other is None or other is port or other.masks or not other.shape or port.role != "condition":
            raise ValueError(f"{where} {port.masks!r}, expected a condition port that has tokens and is no mask")
        expect(port.masks not in masked, where, port.masks, "a port that no other masks")
        expect(port.shape == other.shape[:1], f"port {port.name}: shape", list(port.shape), list(other.shape[:1]))
        expect(
            port.dtype != "int64" or port.size >= 2, f"port {port.name}: size", port.size, "2 or more, for it is a mask"
        )
        masked.add(port.masks)


def check_sizes(manifest: Manifest) -> None:
    """Refuse sizes that share a name, their own files, or the name of stages that differ."""
    if not manifest.sizes:
        return
    names = [manifest.size, *(other.size for other in manifest.sizes)]
    for name in names:
        expect(name and name == size_name(name), "size", name, "the name of a size, such as 512 or 512x768")
    _distinct("size", names)
    _distinct("suffix", [manifest.suffix, *(other.suffix for other in manifest.sizes)])
    stages: dict[str, Stage] = {}
    for stage in (*manifest.stages, *(stage for other in manifest.sizes for stage in other.stages)):
        same = stages.setdefault(stage.name, stage) == stage
        expect(same, f"stage {stage.name}", "another one in another size", "the same stage, or another name")


def check_stages(manifest: Manifest) -> None:
    for runs, most in (("prompt", 1), ("start", 1), ("step", 1), ("update", 1), ("end", 1)):
        names = [stage.name for stage in manifest.stages if stage.runs == runs]
        expect(len(names) <= most and (names or runs != "step"), f"stages that run {runs!r}", names, "one")
    _distinct("stage", [stage.name for stage in manifest.stages])
    # The prompt stage gives what condition ports take: they stay sources, whoever fills them.
    tensors = [spec.name for stage in manifest.stages if stage.runs != "prompt" for spec in stage.gives]
    tensors += [port.name for port in manifest.prompt_ports]
    _distinct("port or tensor", [*(port.name for port in manifest.ports), GUIDANCE, *tensors])
    checks = {"start": _check_start, "step": _check_step, "update": _check_update, "end": _check_end}
    sources: Sources = {port.name: (port.role, port.dtype, port.shape) for port in manifest.ports}
    for stage in manifest.stages:
        _distinct(f"input of stage {stage.name}", [spec.name for spec in stage.reads])
        if stage.runs in BEFORE_LOOP:
            _check_before_loop(stage, sources)
        elif stage.runs in checks:
            checks[stage.runs](manifest, stage, sources)
        for name in dict.fromkeys(
            (stage.onnx, *stage.shared, *stage.files, *(name for own in stage.engines.values() for name in own))
        ):
            if name not in manifest.files:
                raise ValueError(f"{name} has no size and sha256 under files")


READABLE = {  # what a stage before the loop may depend on
    "condition": ("condition",),
    "time": ("time",),
    "time+condition": ("time", "condition", "time+condition"),
}


def _check_before_loop(stage: Stage, sources: Sources) -> None:
    expect(bool(stage.reads and stage.gives), f"stage {stage.name}", "no inputs or no outputs", "some of both")
    for spec in stage.reads:
        _check_source(stage, spec, ("rows",), sources, READABLE[stage.runs])
    for spec in stage.gives:
        row = spec.shape[1:]
        fixed = spec.shape[:1] == ("rows",) and all(isinstance(size, int) for size in row)
        expect(fixed, f"stage {stage.name}: {spec.name} has the shape", list(spec.shape), '["rows", numbers …]')
        _check_shape(stage, spec, spec.shape)
        sources[spec.name] = stage.runs, spec.dtype, tuple(int(size) for size in row)


def _check_start(manifest: Manifest, stage: Stage, sources: Sources) -> None:
    """Refuse an encoder of other pictures than the end stage gives, or of other latents than the state."""
    state = manifest.state.shape
    shape = stage.reads[0].shape if stage.reads else ()
    sides = [size for size in shape[2:] if isinstance(size, int)]
    whole = len(shape) == 4 == len(state) + 1 and shape[:2] == ("batch", 3) and len(sides) == 2
    cells = whole and all(side % cell == 0 for side, cell in zip(sides, state[1:], strict=True))
    forms = '["batch", 3, height, width], multiples of a state [channels, height, width]'
    expect(cells, f"stage {stage.name} reads the shape", list(shape), forms)
    expect(manifest.end is not None, f"stage {stage.name}", "no stage that runs 'end'", "one, which gives its pictures")
    if manifest.end is not None and manifest.end.gives:
        end = manifest.end.gives[0].shape
        expect(shape == end, f"stage {stage.name} reads the shape", list(shape), f"{list(end)}, as {manifest.end.name}")
    _check_names(stage, stage.reads, {"images": shape}, "reads")
    latents: dict[str, tuple[int | str, ...]] = dict.fromkeys((MEAN, LOGVAR), ("batch", *state))
    if len(stage.gives) == 1:  # latents without a variance
        del latents[LOGVAR]
    _check_names(stage, stage.gives, latents, "gives")


def _check_step(manifest: Manifest, stage: Stage, sources: Sources) -> None:
    state = manifest.state
    expect(state.name in {spec.name for spec in stage.reads}, f"stage {stage.name} lacks", state.name, "the state")
    for spec in stage.reads:
        if spec.name == state.name:
            _check_shape(stage, spec, ("batch", *state.shape))
        elif spec.name == GUIDANCE:
            expect(manifest.conditions, f"stage {stage.name} reads {GUIDANCE}", "no condition port", "at least one")
            port = manifest.guidance.port
            expect(not port, f"stage {stage.name} reads {GUIDANCE}", f"guidance: port {port}", "one of the two")
            _check_shape(stage, spec, ("batch",))
        else:
            _check_source(stage, spec, ("groups", "batch"), sources, ("time", "condition", "time+condition"))
    names = [spec.name for spec in stage.gives]
    fits = sorted(names) in (["prediction"], ["prediction", "variance"])
    expect(fits, f"stage {stage.name} gives", names, "prediction, and variance where it is learned")
    for spec in stage.gives:
        _check_shape(stage, spec, ("batch", *state.shape))


def _check_update(manifest: Manifest, stage: Stage, sources: Sources) -> None:
    like_state: tuple[int | str, ...] = ("batch", *manifest.state.shape)
    shapes = {manifest.state.name: like_state, "prediction": like_state, "previous": like_state}
    _check_names(stage, stage.reads, {**shapes, "coefficients": (2, 3)}, "reads")
    _check_names(stage, stage.gives, {"kept": like_state, "next": like_state}, "gives")


def _check_end(manifest: Manifest, stage: Stage, sources: Sources) -> None:
    _check_names(stage, stage.reads, {manifest.state.name: ("batch", *manifest.state.shape)}, "reads")
    shape = stage.gives[0].shape if stage.gives else ()
    pictures = len(shape) in (4, 5) and shape[:2] == ("batch", 3) and all(isinstance(size, int) for size in shape[2:])
    forms = '["batch", 3, height, width], or frames before the height'
    expect(pictures, f"stage {stage.name} gives the shape", list(shape), forms)
    _check_names(stage, stage.gives, {"images": shape}, "gives")


def check_prompts(manifest: Manifest) -> None:
    """Refuse prompts without a stage that reads just them, and a stage that is not first or gives no condition."""
    stage, ports = manifest.prompt, manifest.prompt_ports
    expect((stage is None) == (not ports), "prompts", len(manifest.prompts), "some where a stage runs 'prompt'")
    if stage is None:
        return
    expect(stage is manifest.stages[0], f"stage {stage.name} (runs 'prompt')", "a later stage", "the first")
    shapes: dict[str, tuple[int | str, ...]] = {port.name: ("rows", *port.shape) for port in ports}
    _check_names(stage, stage.reads, shapes, "reads", "int64")
    conditions = {port.name: port for port in manifest.conditions}
    expect(bool(stage.gives), f"stage {stage.name} gives", "nothing", "condition ports")
    gives = [spec.name for spec in stage.gives]
    for spec in stage.gives:
        known = ", ".join(conditions) or "(none)"
        made = spec.name in conditions and spec.name != manifest.guidance.port  # a weight is no part of a prompt
        expect(made, f"stage {stage.name} gives", spec.name, f"condition ports: {known}")
        port = conditions[spec.name]
        _check_shape(stage, spec, ("rows", *port.shape), port.dtype)
        null = manifest.null.get(spec.name)
        expect(null is None, f"null: {spec.name}", null, f"none, for the {stage.name} stage gives it")
    for port in conditions.values():
        pair = bool(port.masks) and (port.masks in gives) != (port.name in gives)
        expect(not pair, f"stage {stage.name} gives", ", ".join(gives), f"both {port.masks} and {port.name}, or none")
    for prompt in manifest.prompts:
        if prompt.tokenizer not in manifest.files:
            raise ValueError(f"{prompt.tokenizer} has no size and sha256 under files")


def check_presets(presets: Mapping[str, Any], process: Process) -> None:
    """Refuse a preset that has other fields than a request, or values of other kinds."""
    known = (*PRESET_FIELDS, MEASURED)
    for name, preset in presets.items():
        where = f"preset {name}"
        expect(bool(name), "presets", name, "a name")
        expect(isinstance(preset, Mapping), where, preset, f"a table of {', '.join(known)}")
        for key, value in preset.items():
            if key not in known:
                close = nearest(str(key), known)
                raise ValueError(f"{where} has the unknown key {key!r}{close}; known: {', '.join(known)}")
            fits, expected = _fits(PRESET_FIELDS.get(key), value, process)
            expect(fits, f"{where}: {key}", value, expected)


def _fits(kind: str | None, value: Any, process: Process) -> tuple[bool, str]:
    """Tell whether a value is of the kind that a preset's field has, and what the kind is; None: of MEASURED."""
    solvers = [name for name, facts in SOLVERS.items() if process.kind in facts["processes"]]
    for choice, names in (("solver", solvers), ("cache", list(FACTS["caches"]))):
        if kind == choice:
            return value in names, f"one of {', '.join(names)}"
    if kind == "steps":
        return type(value) is int and 1 <= value <= process.train_steps, f"1 to {process.train_steps}"
    if kind == "integer":
        return type(value) is int and abs(value) <= LIMITS["steps"], f"an integer up to {LIMITS['steps']} either way"
    if kind == "number":
        return is_number(value) and abs(value) <= FLOAT32_MAX, "a number of float32"
    if kind == "interval":
        pair = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
        return pair and 0 <= value[0] <= value[1] <= 1, "two numbers from 0 to 1, the lower one first"
    if kind == "text":
        return isinstance(value, str) and bool(value), "a text"
    return isinstance(value, Mapping), "a table"


def _check_names(
    stage: Stage,
    specs: Iterable[TensorSpec],
    shapes: Mapping[str, tuple[int | str, ...]],
    key: str,
    dtype: str = "float32",
) -> None:
    names = [spec.name for spec in specs]
    expect(sorted(names) == sorted(shapes), f"stage {stage.name} {key}", ", ".join(names), ", ".join(shapes))
    for spec in specs:
        _check_shape(stage, spec, shapes[spec.name], dtype)


def _check_source(
    stage: Stage, spec: TensorSpec, free: tuple[str, ...], sources: Sources, roles: tuple[str, ...]
) -> None:
    """Refuse an input that no port and no earlier stage gives in this shape and type, or that the stage may not use."""
    readable = [name for name, (role, _, _) in sources.items() if role in roles]
    where = f"stage {stage.name} (runs {stage.runs!r}) reads"
    expect(spec.name in readable, where, spec.name, f"one of {', '.join(readable) or '(nothing)'}")
    _, dtype, row = sources[spec.name]
    _check_shape(stage, spec, (*free, *row), dtype)


def _check_shape(stage: Stage, spec: TensorSpec, shape: tuple[int | str, ...], dtype: str = "float32") -> None:
    actual, expected = f"{spec.dtype} {list(spec.shape)}", f"{dtype} {list(shape)}"
    expect(actual == expected, f"stage {stage.name}: {spec.name} is", actual, expected)


def _distinct(what: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{what} {name!r} stands there {count} times, expected once")


def _row(port: Port) -> str:
    return f"{port.dtype} {list(port.shape)}"


def is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= LIMITS["size"]


def expect(fits: object, where: str, value: object, expected: object) -> None:
    if not fits:
        shown = value if isinstance(value, str) and value else repr(value)
        raise ValueError(f"{where}: got {shown}, expected {expected}")
