"""TensorRT and TensorRT-RTX: one file compiles for both, and its two Flavours are all in which they differ.

Both are strongly typed: an engine computes in the types and Q/DQ nodes of its graph. So the census of the parsed
network says what the engine will do, also where no GPU can open it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from dit_runtime.backends import Compiled, Engine, Options, Tuning, cuda
from dit_runtime.backends.trt_network import (
    census,
    decompose_attention,
    gate,
    inspected,
    logger_of,
    monitor_of,
    profiles,
    runtime_of,
    started,
)
from dit_runtime.backends.trt_preflight import preflight
from dit_runtime.bundle.manifest import ENGINE, Stage, inside
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import FACTS
from dit_runtime.files import write_file
from dit_runtime.progress import Progress

LEAST_CAPABILITY = {"bf16": "8.0", "fp8": "8.9"}  # what a precision's tensor cores need
UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}
FLAGS = {  # of Tuning: BuilderFlag
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
    "strip_plan": "STRIP_PLAN",
    "refittable": "REFIT",
}


@dataclass(frozen=True)
class Flavour:
    """A backend of this file; its fields hold what differs from the other."""

    FLOAT_AROUND_INT8 = "fp16"
    NEEDS_TYPED_GRAPH = ("fp16", "bf16")

    name: str
    module: str
    packages: tuple[str, ...]
    oldest: tuple[int, ...]  # version that has what we use
    capabilities: tuple[str, ...]  # named ahead of time, with no GPU; empty: it compiles for the GPU that is here
    tuning: tuple[str, ...]  # what of Tuning it takes
    own_graphs: bool  # replays CUDA graphs by itself, else we capture them
    keeps_kernels: bool  # has a runtime cache of what it compiles on the target

    @property
    def PRECISIONS(self) -> tuple[str, ...]:
        return tuple(FACTS["precisions"][self.name])

    def _package(self) -> tuple[str, str] | None:
        """Return the installed one's name and version."""
        for name in self.packages:
            try:
                return name, metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def version(self) -> str | None:
        return (self._package() or ("", None))[1]

    def why_unavailable(self, built: Mapping[str, Any] | None = None) -> str | None:
        """Return why no engine of it can run here, or not one that was built so; None where it can."""
        if built:
            return self._refusal(built)
        return cuda.why_unavailable() or _outside(cuda.capability(), self.capabilities, self.name)

    def compile(self, folder: Path, stage: Stage, options: Options, progress: Progress) -> Compiled:
        """Make NAME.BACKEND.engine from the bundle's ONNX; refuse what the target, the disk or the memory cannot do."""
        self._require_own(options)
        trt, onnx = self.load(), inside(folder, stage.onnx)
        capabilities = self.targets(stage.precision, options.tuning)
        size = sum(inside(folder, file).stat().st_size for file in stage.onnx_files)
        holds_weights = not self.capabilities and not options.tuning.weight_streaming  # the GPU, in whole
        preflight(folder, size, cuda.free_memory() if holds_weights else None)
        stem = Path(stage.onnx).stem
        first, other = (f"{stem}.{self.name}{turn}{ENGINE}" for turn in ("", ".again"))
        name = other if first in stage.engines.get(self.name, ()) else first  # beside the one that works until it does
        logger = logger_of(trt)
        builder = started(self.name, trt.Builder, logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        with progress.stage(f"compile: {stem} for {self.name}"):
            if not parser.parse_from_file(str(onnx)) or not network.num_outputs:
                reason = parser.get_error(0).desc() if parser.num_errors else logger.last or "it holds no network"
                raise BundleError(f"{onnx}: {self.name} does not take it: {' '.join(reason.split())}")
            decompose_attention(trt, network)
            types = census(trt, network)
            gate(stem, types, stage.precision, self.FLOAT_AROUND_INT8, options.islands)
            config = self._configure(trt, builder, network, stage, options.tuning, capabilities)
            config.progress_monitor = monitor = monitor_of(trt, progress, stem)
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise BundleError(f"{onnx}: {self.name} does not compile it: {logger.last}")
            del monitor
            engine = self._inspected(trt, logger, plan, capabilities, options.tuning)
        if cache := _timing_cache(options.tuning):
            write_file(cache, bytes(config.get_timing_cache().serialize()))
        major = (self._package() or ("",))[0].partition("-cu")[2]
        ampere_plus = options.tuning.hardware_compatibility_level == "ampere+"
        built = {
            "version": self.version(),
            "cuda": int(major) if major.isdecimal() else 0,  # which the driver must have
            "compute_capabilities": ["8.0+"] if ampere_plus else list(capabilities),
            "tuning": _non_defaults(
                replace(options.tuning, timing_cache=None)
            ),  # a path of this machine, of no use elsewhere
            "census": {
                "of": "engine" if engine else "network",
                "products": dict(Counter(types.values())),
                "islands": list(options.islands),
                **engine,
            },
        }
        refit = stage.onnx_files if options.tuning.strip_plan else ()  # its weights are put back when it is opened
        write_file(folder / name, plan, follow=False)  # last: what fails before leaves no engine
        return Compiled((name, *refit), built)

    def _inspected(
        self, trt: Any, logger: Any, plan: Any, capabilities: Sequence[str], tuning: Tuning
    ) -> dict[str, Any]:
        """Return the census of an engine that was just built, where it can be opened."""
        if cuda.why_unavailable() or _outside(cuda.capability(), capabilities, self.name):
            return {}
        try:
            runtime = runtime_of(trt, self.name, logger, tuning.version_compatible)
            return inspected(trt, runtime.deserialize_cuda_engine(plan))
        except (AttributeError, KeyError, TypeError, UsageError, ValueError):
            return {}  # not opened, or in words of another version

    def open(self, files: Sequence[Path], options: Options) -> Engine:
        self._require_own(options)
        path, command = files[0], f"dit-run compile {files[0].parent} --backend {self.name}"
        if path.suffix != ENGINE:
            raise BundleError(f"{path.parent}: no engines of {self.name} here; make them on the target: {command}")
        if reason := self._refusal(options.built):
            raise BundleError(f"{path}: cannot run here: {reason}; on the target, make it with: {command}")
        from dit_runtime.backends.trt_engine import TrtEngine

        return TrtEngine(self, files, options, command)

    def _require_own(self, options: Options) -> None:
        if options.threads is not None or options.provider:
            raise UsageError(f"threads and provider are options of the CPU's backends; this graph runs on {self.name}")

    def _refusal(self, built: Mapping[str, Any]) -> str | None:
        """Return why an engine that was built so cannot be opened here, from the manifest alone."""
        if (here := self.version()) is None:
            return f"{self.name} is not installed: pip install 'dit-runtime[{self.name}]'"
        if not _opens(here, str(built.get("version")), "version_compatible" in built.get("tuning", {})):
            return f"built by {self.name} {built.get('version')}, and here is {here}"
        return cuda.why_unavailable(int(built.get("cuda", 0))) or _outside(
            cuda.capability(), [*map(str, built.get("compute_capabilities", ()))], "the engine"
        )

    def load(self) -> Any:
        """Import the flavour's module, recent enough."""
        version = self.version()
        try:
            trt = import_module(self.module)
        except ImportError:
            raise UsageError(f"{self.name} is not installed: pip install 'dit-runtime[{self.name}]'") from None
        if _numbers(version or trt.__version__) < self.oldest:
            least = ".".join(map(str, self.oldest))
            raise UsageError(f"{self.name} {version} is too old; expected {least} or later")
        return trt

    def targets(self, precision: str, tuning: Tuning) -> tuple[str, ...]:
        """Return the compute capabilities to compile for; refuse what cannot be before any work."""
        if tuning.hardware_compatibility_level not in HARDWARE:
            level = tuning.hardware_compatibility_level
            raise UsageError(f"hardware-compatibility-level {level!r} is not known; known: {', '.join(HARDWARE)}")
        for field in _non_defaults(tuning):
            if field not in self.tuning:
                flags = ", ".join("--" + name.replace("_", "-") for name in self.tuning)
                raise UsageError(f"{self.name} has no --{field.replace('_', '-')}; it has {flags}")
        if (cache := _timing_cache(tuning)) and not cache.parent.is_dir():
            raise UsageError(f"timing-cache {cache}: the folder {cache.parent} does not exist")
        least = LEAST_CAPABILITY.get(precision, "0.0")
        if not self.capabilities:
            if reason := cuda.why_unavailable():
                raise UsageError(f"{self.name} compiles on its target alone, and not here: {reason}")
            targets: tuple[str, ...] = (cuda.capability(),)
        else:
            able = tuple(known for known in self.capabilities if _numbers(known) >= _numbers(least))
            targets = tuning.compute_capability or able
        for target in targets:
            if self.capabilities and target not in self.capabilities:
                raise UsageError(
                    f"{self.name} compiles for compute capability {', '.join(self.capabilities)} and not for {target!r}"
                )
            if _numbers(target) < _numbers(least):
                raise UsageError(f"compute capability {target} has no {precision}; it needs {least} or later")
        return targets

    def _configure(
        self, trt: Any, builder: Any, network: Any, stage: Stage, tuning: Tuning, capabilities: Sequence[str]
    ) -> Any:
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32: TF32 has ten bits
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the census of the engine
        for shapes in profiles(stage):
            profile = builder.create_optimization_profile()
            for name, sizes in shapes.items():
                profile.set_shape(name, *sizes)
            config.add_optimization_profile(profile)
        if self.capabilities:
            config.num_compute_capabilities = len(capabilities)
            for index, target in enumerate(capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), index)
        if tuning.builder_optimization_level is not None:
            config.builder_optimization_level = tuning.builder_optimization_level
        for pool in tuning.pool_limit:
            kind, size = _pool(trt, pool)
            config.set_memory_pool_limit(kind, size)
        for field, flag in FLAGS.items():
            if getattr(tuning, field):
                config.set_flag(getattr(trt.BuilderFlag, flag))
        level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[tuning.hardware_compatibility_level])
        if level != trt.HardwareCompatibilityLevel.NONE:
            config.hardware_compatibility_level = level
        if path := _timing_cache(tuning):
            cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                raise UsageError(f"timing-cache {path}: {self.name} does not take it; it is of another version or GPU")
        return config


TENSORRT = Flavour(
    name="tensorrt",
    module="tensorrt",
    packages=("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    oldest=(10, 14),  # whose parser is the first with Attention
    capabilities=(),
    tuning=tuple(field for field in asdict(Tuning()) if field != "compute_capability"),
    own_graphs=False,
    keeps_kernels=False,
)
RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    oldest=(1, 7),
    capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"),  # and 7.5, without the fp32 products that every bundle has
    # 1.7 ships no lean runtime for version-compatible, asks for a GPU to refit or strip, has no timing cache.
    tuning=("compute_capability", "builder_optimization_level", "pool_limit", "weight_streaming"),
    own_graphs=True,
    keeps_kernels=True,
)


def _non_defaults(tuning: Tuning) -> dict[str, Any]:
    """Return the options that are not their defaults."""
    return {key: value for key, value in asdict(tuning).items() if value != asdict(Tuning())[key]}


def _timing_cache(tuning: Tuning) -> Path | None:
    return Path(tuning.timing_cache).expanduser() if tuning.timing_cache else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _opens(here: str, built: str, version_compatible: bool) -> bool:
    """Return whether a plan opens here: in its own version, a version-compatible one also in later minor ones."""
    mine, its = _numbers(here), _numbers(built)
    return mine == its or (version_compatible and mine[:1] == its[:1] and mine >= its)


def _outside(capability: str, known: Sequence[str], whose: str) -> str | None:
    """Return why a GPU is none of those known ("8.0+" is 8.0 and later); no list: any."""
    fits = (_numbers(capability) >= _numbers(name[:-1]) if name.endswith("+") else capability == name for name in known)
    if not known or any(fits):
        return None
    return f"compute capability {capability} here, and {whose} is for {', '.join(known)}"


def _pool(trt: Any, text: str) -> tuple[Any, int]:
    """Return the MemoryPoolType and the bytes of "workspace:4G"."""
    name, _, size = text.partition(":")
    kind = getattr(trt.MemoryPoolType, name.upper(), None)
    unit = size[-1:].upper() if size[-1:].isalpha() else ""
    number = size.removesuffix(size[-1:]) if unit else size
    if kind is None or not number.isdecimal() or unit not in UNITS:
        raise UsageError(f"pool-limit {text!r}; expected a memory pool of TensorRT and a size, such as workspace:4G")
    return kind, int(number) << UNITS[unit]
