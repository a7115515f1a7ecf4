"""The manifest's records: ports of the network, stages of the bundle, files, and the manifest itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import DEFAULT_GUIDANCE, PRESET_FIELDS
from dit_runtime.sampling.process import Process

FORMAT = 2
ROLES = ("state", "time", "condition")
BEFORE_LOOP = ("condition", "time", "time+condition")  # what stages before the loop may run once per
RUNS = ("prompt", *BEFORE_LOOP, "start", "step", "update", "end")
DTYPES = ("float32", "int64")
MEASURED = "measured"  # the key of a preset that is no field of a request: the figures for which it was accepted
LABELS = "labels"  # the port that a user may fill with class names
MEAN, LOGVAR = "mean", "logvar"  # the outputs of the stage that makes latents of pictures
GUIDANCE = "guidance"  # the input of the step stage that mixes guidance
# What other inputs and outputs of the stages are called, so that no port may be.
PACKS = {"condition": "context", "time": "modulation", "time+condition": "conditioning"}  # and context_1, context_2, …
RESERVED = (GUIDANCE, "prediction", "variance", "previous", "coefficients", "kept", "next", "images", MEAN, LOGVAR)


@dataclass(frozen=True)
class Port:
    """One input of the network."""

    name: str
    role: str  # one of ROLES
    dtype: str  # one of DTYPES
    shape: tuple[int, ...]  # of one row
    size: int = 0  # int64 only: values are 0 … size - 1
    masks: str = ""  # the condition port whose tokens (axis 0 of a row) this port marks with 1 or 0
    picture: bool = False  # a condition of a picture's latents, in the state's shape: what the start stage makes of it


def count_classes(ports: Iterable[Port], null: Mapping[str, int | float]) -> int:
    """Return how many classes a label may name; 0 where the network takes none."""
    for port in ports:
        if port.role == "condition" and port.name == LABELS and port.dtype == "int64" and not port.shape:
            return port.size - (LABELS in null)
    return 0


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a stage; a string in the shape is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Stage:
    """One graph of the bundle: when it runs, its portable ONNX form, and the files that backends open instead."""

    name: str
    runs: str  # one of RUNS
    reads: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]
    onnx: str
    max_batch: int = 8  # rows that it takes at a time
    precision: str = "fp32"
    backend: str = "onnxruntime"
    engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by backend, or its provider's form
    shared: tuple[str, ...] = ()  # files of weights that the portable form has in common with other sizes'

    @property
    def onnx_files(self) -> tuple[str, ...]:
        return (self.onnx, self.onnx + ".data", *self.shared)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that its backend opens."""
        return self.engines.get(self.backend, self.onnx_files)

    def rows(self, inputs: Mapping[str, np.ndarray]) -> int:
        """Return how many rows these inputs are of."""
        spec, free = next((spec, free) for spec in self.reads for free in ("rows", "batch") if free in spec.shape)
        return int(inputs[spec.name].shape[spec.shape.index(free)])

    @property
    def grouped(self) -> tuple[TensorSpec, ...]:
        """Return the inputs with an axis of groups: those of a step stage without the state and guidance."""
        return tuple(spec for spec in self.reads if spec.shape[:1] == ("groups",))


@dataclass(frozen=True)
class Prompt:
    """One tokenizer's view of a prompt: inputs of the prompt stage."""

    ids: str  # input [rows, tokens] int64 of the prompt stage
    tokens: int
    size: int  # ids are 0 … size - 1
    tokenizer: str  # file of the bundle: a tokenizer.json whose truncation and padding are set to `tokens`
    mask: str = ""  # input [rows, tokens] int64: 1 for each token of the prompt; "": the encoder reads none
    template: str = "{}"  # around the prompt
    negative: str = ""  # the template of negative prompts; "": the same
    lowercase: bool = False  # strip and lower the user's words before they go into the template

    @property
    def ports(self) -> tuple[Port, ...]:
        """Return the inputs as ports, so that they are checked as a condition's arrays are."""
        ids = Port(self.ids, "condition", "int64", (self.tokens,), self.size)
        mask = Port(self.mask, "condition", "int64", (self.tokens,), 2)
        return (ids, mask) if self.mask else (ids,)


@dataclass(frozen=True)
class Guidance:
    channels: int  # the leading channels that guidance moves
    unguided_up_to_one: bool = True  # weights below 1 count as 1
    default: float = DEFAULT_GUIDANCE  # the weight of a request that names none
    port: str = ""  # the condition port that takes the weight where the network itself is guided; "": it takes none


@dataclass(frozen=True)
class File:
    size: int
    sha256: str


class WithPorts:
    """An owner of a network's ports."""

    ports: tuple[Port, ...]

    @property
    def state(self) -> Port:
        """The port that the loop changes."""
        return next(port for port in self.ports if port.role == "state")

    @property
    def picture(self) -> Port | None:
        """Return the condition port that takes a picture's latents; None where there is none."""
        return next((port for port in self.ports if port.picture), None)

    @property
    def time(self) -> Port:
        return next(port for port in self.ports if port.role == "time")

    @property
    def conditions(self) -> tuple[Port, ...]:
        """Return all condition ports, including masks."""
        return tuple(port for port in self.ports if port.role == "condition")


@dataclass(frozen=True)
class Size:
    """The keys of a manifest that have a value of their own at each size of the pictures."""

    size: str  # the name that a request says: "512", or "512x768" for height x width
    model: Mapping[str, Any]
    ports: tuple[Port, ...]
    process: Process
    stages: tuple[Stage, ...]  # those of a name that another size has too are the same stages
    suffix: str = ""  # ends the names of the size's own files, before their extension: reference-512x768.npz
    built_with: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    batch_invariant: bool = False


def size_name(size: str | int) -> str:
    """Return a size's one name: 512 for "512x512"."""
    height, _, width = str(size).partition("x")
    return height if width == height else str(size)


@dataclass(frozen=True, repr=False)
class Manifest(WithPorts):
    model: Mapping[str, Any]  # for people: name, resolution, …
    ports: tuple[Port, ...]
    null: Mapping[str, int | float]  # what guidance leads away from: a constant by condition port
    labels: tuple[str, ...]  # class names of the port "labels"; empty where they are unknown
    guidance: Guidance
    process: Process
    stages: tuple[Stage, ...]  # in the order of running
    prompts: tuple[Prompt, ...] = ()  # what the prompt stage reads; empty where there is none
    files: Mapping[str, File] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    built_with: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    batch_invariant: bool = False  # verification saw that a sample has the same bits in each batch
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by name: fields of a request, and MEASURED
    size: str = ""  # the name of the size that all of this is of; "": the bundle has one, without a name
    suffix: str = ""
    sizes: tuple[Size, ...] = ()  # the others
    format: int = FORMAT

    def __repr__(self) -> str:
        return f"<Manifest of {self.title}>"

    @property
    def title(self) -> str:
        """Return the network, its sizes and its engine, in a line for people."""
        sizes = ", ".join(self.size_names) or self.model.get("resolution")
        step = self.step
        return f"{self.model.get('name')} at {sizes} px, {step.precision} on {step.backend}"

    def at(self, size: str | int | None) -> Manifest:
        """Return the manifest of a size of the bundle, which then is the one that requests without a size draw."""
        if size is None or size_name(size) == self.size:
            return self
        own = Size(**{key.name: getattr(self, key.name) for key in fields(Size)})
        for other in self.sizes:
            if other.size == size_name(size):
                rest = tuple(own if entry is other else entry for entry in self.sizes)
                return replace(self, sizes=rest, **vars(other))
        names = ", ".join(self.size_names) or "one size"
        raise UsageError(f"size {size_name(size)} is not in this bundle; it has {names}")

    @property
    def size_names(self) -> tuple[str, ...]:
        """Return the names of all sizes, that of this one first."""
        return tuple(filter(None, (self.size, *(other.size for other in self.sizes))))

    @property
    def each_size(self) -> tuple[Manifest, ...]:
        """Return the manifest at each size, this one first."""
        return (self, *(self.at(other.size) for other in self.sizes))

    def own(self, file: str) -> str:
        """Return the name that a file of each size has at this size."""
        stem, dot, extension = file.partition(".")
        return f"{stem}{self.suffix}{dot}{extension}"

    def port(self, name: str) -> Port:
        return next(port for port in self.ports if port.name == name)

    @property
    def classes(self) -> int:
        """Return the number of classes that a label may name, 0 where the network takes none."""
        return count_classes(self.ports, self.null)

    @property
    def without_null(self) -> tuple[str, ...]:
        """The condition ports, masks apart, that a guided request must bring a negative for."""
        if self.guidance.port:
            return ()
        return tuple(port.name for port in self.conditions if not port.masks and port.name not in self.null)

    @property
    def mixes_guidance(self) -> bool:
        """Tell whether the step stage takes guidance weights; where it does not, guidance changes nothing."""
        return any(spec.name == GUIDANCE for spec in self.step.reads)

    @property
    def learned_variance(self) -> bool:
        """Tell whether the step stage gives the variance of a step's noise too."""
        return any(spec.name == "variance" for spec in self.step.gives)

    @property
    def prompt(self) -> Stage | None:
        """Return the stage that makes condition ports of token ids."""
        return next((stage for stage in self.stages if stage.runs == "prompt"), None)

    @property
    def prompt_ports(self) -> tuple[Port, ...]:
        """Return the prompt stage's inputs as ports."""
        return tuple(port for prompt in self.prompts for port in prompt.ports)

    @property
    def ports_beside_prompts(self) -> tuple[Port, ...]:
        """Return the condition ports that the prompt stage does not give."""
        from_prompts = {spec.name for spec in self.prompt.gives} if self.prompt else set()
        return tuple(port for port in self.conditions if port.name not in from_prompts)

    @property
    def before_loop(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.runs in BEFORE_LOOP)

    @property
    def start(self) -> Stage | None:
        """Return the stage that makes latents of pictures."""
        return next((stage for stage in self.stages if stage.runs == "start"), None)

    @property
    def step(self) -> Stage:
        return next(stage for stage in self.stages if stage.runs == "step")

    @property
    def update(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.runs == "update"), None)

    @property
    def end(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.runs == "end"), None)

    def preset(self, name: str) -> dict[str, Any]:
        """Return the request's fields that a preset states; refuse one that the bundle does not have."""
        if name not in self.presets:
            known = f"known: {', '.join(self.presets)}" if self.presets else "this bundle has none (dit-export tune)"
            raise UsageError(f"preset {name!r} is not known{nearest(name, self.presets)}; {known}")
        return {key: value for key, value in self.presets[name].items() if key in PRESET_FIELDS}

    def require_end(self) -> Stage:
        """Return the stage that makes pictures; refuse where there is none."""
        if self.end is None:
            raise UsageError('this bundle has no decoder; ask for output="latents" (dit-run: -o FILE.npy)')
        return self.end

    def require_start(self) -> Stage:
        """Return the stage that makes latents of pictures; refuse where there is none."""
        if self.start is None:
            raise UsageError("this bundle takes no pictures, for it has no encoder; build it with --encoder")
        return self.start

    @property
    def picture_size(self) -> tuple[int, int]:
        """Return height and width of the pictures that a run may start from; refuse where there is no encoder."""
        height, width = (int(size) for size in self.require_start().reads[0].shape[2:])
        return height, width

    def to_json(self) -> str:
        table = asdict(self) | {"process": self.process.to_dict()}
        for entry, size in zip(table["sizes"], self.sizes, strict=True):
            entry["process"] = size.process.to_dict()
        for key in ("size", "suffix", "sizes"):
            if not table[key]:
                del table[key]
        return json.dumps({"format": table.pop("format"), **table}, indent=1, ensure_ascii=False) + "\n"
