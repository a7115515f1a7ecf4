"""Make the files of a bundle from a network in named steps: trace, fuse, measure, smooth, quantize, write.

The network is traced once. What a precision must know is measured in one run of the fused fp32 graphs.
Nothing here proves that the result is right; `build.py` does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from dit_export.bundle import forms
from dit_export.bundle.describe import Written, describe
from dit_export.bundle.forms import Lowerings
from dit_export.bundle.inputs import NO_INPUTS, Inputs
from dit_export.checkpoints import Loaded
from dit_export.graph import DECODER, ENCODER, NETWORK, PROMPT, RULE, onnxfile
from dit_export.networks.codec import Decoder
from dit_export.networks.encoding import make_encoder
from dit_export.passes import LOWERINGS, fuse, require
from dit_export.passes.dependence import Miss
from dit_export.passes.stages import Pack
from dit_export.passes.subpixel import subpixel
from dit_export.passes.update import update
from dit_export.precision import attention, convolutions
from dit_export.precision.convolutions import Convolution, FloatConvolutions
from dit_export.precision.half import ENDS, cast_to_half, find_overflows, fp32_products
from dit_export.precision.layers import ATTENTION, coverage, find, named
from dit_export.precision.layers import DECODER as DECODER_LAYERS
from dit_export.precision.measure import PEAKS_PLAN, Measured, Plan, measure, measure_prompts
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import Smoothed, pack_divisors, smooth
from dit_export.precision.stored import own_types, store_half
from dit_export.recipe import Recipe
from dit_export.verify.parity import DECODER_PSNR
from dit_runtime import backends
from dit_runtime.backends import QUANTIZED
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import BEFORE_LOOP
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress


@dataclass
class Assembly:
    """A bundle in the making; each step leaves what the next ones need."""

    folder: Path
    traced: Path
    loaded: Loaded
    decoder: Decoder | None
    recipe: Recipe
    backend: str
    progress: Progress
    inputs: Inputs = NO_INPUTS
    plan: Plan | None = None  # of the measuring run; None: as the precision needs it
    # Filled by the steps.
    graphs: dict[str, gs.Graph] = field(default_factory=dict)  # by stage
    runs: dict[str, str] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # by stage and pass
    misses: tuple[Miss, ...] = ()  # of the passes on the network
    packs: tuple[Pack, ...] = ()
    cut: dict[str, Any] = field(default_factory=dict)  # what left the loop, what crosses, what is cheaper in it
    measured: Measured = field(default_factory=Measured)
    smoothed: Smoothed | None = None
    float_layers: list[str] = field(default_factory=list)  # the layers and attentions that the recipe keeps in float
    convolutions: FloatConvolutions | None = None  # of an int8 decoder; None: not searched yet
    covered: float = 0.0  # share of the loop's weights in int8 or fp8
    lowerings: Lowerings = field(default_factory=lambda: LOWERINGS)
    decoder_lowerings: Lowerings = field(default_factory=lambda: LOWERINGS)
    divisors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # by pack
    written: dict[str, Written] = field(default_factory=dict)  # by stage
    text_in_fp32: str = ""  # why the text encoders are, where the precision has others
    contract: Manifest | None = None

    def run(self) -> Manifest:
        """Fill the folder and return its manifest, which is not written and names no files yet."""
        for name, step, wanted in STEPS:
            if wanted(self):
                with self.progress.stage(name):
                    step(self)
        assert self.contract is not None
        return self.contract

    def once_more(self) -> Assembly:
        """Return the same bundle in the making, fused and smoothed again and not quantized yet; nothing is measured."""
        second = Assembly(
            self.folder, self.traced, self.loaded, self.decoder, self.recipe, self.backend, self.progress, self.inputs
        )
        second.measured, second.convolutions = self.measured, self.convolutions
        second.text_in_fp32 = self.text_in_fp32
        with self.progress.stage("fuse and smooth again"):
            second.fuse()
            second.smooth()
        return second

    @property
    def precisions(self) -> dict[str, str]:
        """Return the precision by how a stage runs; a float stage has that of the float parts of an int8 denoiser."""
        precision = self.recipe.precision
        around = backends.backend(self.backend).FLOAT_AROUND_INT8 if precision in QUANTIZED else precision
        return {
            "step": precision,
            "start": around,
            "end": "int8" if self.convolutions and self.convolutions.quantized else around,
            "prompt": (not self.text_in_fp32 and backends.typed(self.backend, precision)) or "fp32",
        }

    def precision_of(self, stage: str) -> str:
        return self.precisions.get(self.runs[stage], "fp32")

    def fuse(self) -> None:
        network = self.loaded.network
        rule = onnxfile.load(self.traced / RULE) if network.mixes_guidance else None
        fused = fuse(onnxfile.load(self.traced / NETWORK), network.ports, rule)
        self.misses, self.cut = fused.misses, fused.cut.summary()
        require(fused.counts, network.counts, self.misses)
        for stage in fused.stages:
            self.graphs[stage.name], self.runs[stage.name] = stage.graph, stage.runs
            self.packs += stage.packs
        if self.recipe.encoder:
            encoder = onnxfile.load(self.traced / ENCODER)
            onnxfile.name_rows(encoder, "batch")
            self.graphs["encoder"], self.runs["encoder"] = encoder, "start"
        self.graphs |= {"denoiser": fused.denoiser, "update": update(network.state)}
        self.runs |= {"denoiser": "step", "update": "update"}
        self.counts["denoiser"] = dict(fused.counts)
        if self.decoder is not None:
            decoder = onnxfile.load(self.traced / DECODER)
            self.counts["decoder"] = {"subpixel": subpixel(decoder)}
            require(self.counts["decoder"], self.decoder.expected_counts())
            onnxfile.name_rows(decoder, "batch")
            self.graphs["decoder"], self.runs["decoder"] = decoder, "end"
        gc.collect()  # graphs are cycles, and the plain ones would keep what is read of their weights in memory

    @property
    def quantizes(self) -> bool:
        return self.recipe.precision in QUANTIZED

    @property
    def quantizes_decoder(self) -> bool:
        return bool(self.decoder_layers) and not self.lacks_decoder

    @property
    def decoder_layers(self) -> list[Convolution]:
        """Return the decoder's convolutions that this build may quantize."""
        here = self.recipe.precision == "int8" and self.backend in convolutions.BACKENDS and self.decoder is not None
        here = here and self.recipe.tile is None  # a tile has the same kernels as the next
        return convolutions.find(self.graphs["decoder"]) if here else []

    @property
    def lacks_decoder(self) -> bool:
        """Return whether a user's calibration is of a build whose decoder was not in int8."""
        own = self.inputs.calibration
        return own is not None and not any(name.startswith(DECODER_LAYERS) for name in own.layers)

    @property
    def may_overflow(self) -> bool:
        return backends.typed(self.backend, self.recipe.precision) in ENDS

    @property
    def measures(self) -> bool:
        """Return whether the build needs the measuring run."""
        return (self.quantizes or self.may_overflow) and not (self.measured.calibration or self.measured.peaks)

    def measure(self) -> None:
        """Run the fused fp32 graphs once, where int8 or half precision needs the values' ranges."""
        if self.quantizes:  # before the long work
            layers = find(self.graphs["denoiser"])
            entries, decoder_layers = self.recipe.keep_float or [], self.decoder_layers
            named(layers, entries)
            convolutions.named(decoder_layers, entries)
            if not layers:
                raise UsageError(f"{self.recipe.precision} has no layer in this network; build fp32, bf16 or fp16")
            if decoder_layers and self.lacks_decoder:
                self.progress.say(
                    "the decoder stays in float: the calibration is of a build without a decoder in int8; "
                    "without --calibration this build calibrates both"
                )
        calibration = self.inputs.calibration
        taps = self.quantizes and calibration is None
        if taps or self.may_overflow:
            forms.write_fp32(self.folder, self.loaded, self.graphs, self.runs, self.recipe.max_batch)
            plan = self.plan or (Plan() if taps else PEAKS_PLAN)
            network, prompts = self.loaded.network, self.inputs.prompts

            def tick(done: int, total: int) -> None:
                self.progress.step(done, total, "measure")

            wants = {"layers": taps, "half": self.may_overflow, "convolutions": taps and self.quantizes_decoder}
            self.measured = measure(self.folder, self.graphs, network, plan, prompts, **wants, on_step=tick)
        if calibration is not None:
            self.measured = Measured(calibration, self.measured.peaks)
        if self.may_overflow and (text := self.loaded.text) is not None:
            graph = self._prompt()["prompt"]
            store_half(graph, {}, "bf16")
            self.measured.peaks["prompt"] = measure_prompts(graph, self.folder, text)

    def smooth(self) -> None:
        """Fold the divisors into the fused graphs; they are the same whatever stays float."""
        denoiser, calibration = self.graphs["denoiser"], self.measured.calibration
        assert calibration is not None
        before = [graph for name, graph in self.graphs.items() if self.runs[name] in BEFORE_LOOP]
        self.smoothed = Smoothed(denoiser, smooth(before, denoiser, calibration), calibration)
        self.divisors = pack_divisors(denoiser, self.smoothed.chosen)

    def quantize(self) -> None:
        assert self.smoothed is not None
        denoiser, chosen, calibration = self.smoothed
        layers = find(denoiser)
        self.float_layers = named(layers, self.recipe.keep_float or [])
        grids = attention.steps(denoiser, calibration, self.float_layers)
        self.lowerings = {backend: attention.passes(backend, grids) for backend in LOWERINGS}
        self.covered = coverage(denoiser, [layer for layer in layers if layer.name not in self.float_layers])
        quantized = quantize(denoiser, chosen, self.float_layers, kind=self.recipe.precision)
        self.counts["denoiser"]["quantize"] = quantized
        self.smoothed = None  # its graph is quantized now

    def quantize_decoder(self) -> None:
        """Put the decoder's convolutions in int8, but the fewest that its gate needs in float."""
        graph, calibration = self.graphs["decoder"], self.measured.calibration
        assert calibration is not None
        layers = convolutions.find(graph)
        chosen = convolutions.choose(layers, calibration)
        if self.convolutions is None:

            def tick(done: int, total: int) -> None:
                self.progress.step(done, total, "convolutions")

            fixed = convolutions.named(layers, self.recipe.keep_float or [])
            limit = DECODER_PSNR["int8"] + convolutions.MARGIN
            self.convolutions = convolutions.fewest_in_float(
                graph, chosen, fixed, self.backend, self.folder, self.decode, limit, tick
            )
        if self.convolutions.quantized:  # the other backends open the portable graph: theirs was not searched
            self.decoder_lowerings = {self.backend: convolutions.passes(self.backend, layers, chosen)}
        quantized = convolutions.quantize(graph, chosen, self.convolutions.kept)
        self.counts["decoder"]["quantize_convolutions"] = quantized

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the pictures of PyTorch's decoder."""
        assert self.decoder is not None
        with torch.no_grad():
            return np.asarray(self.decoder(torch.from_numpy(latents)))

    def write(self) -> None:
        """Cast to half precision where the backend computes by types, then write each graph and its forms."""
        prompt = self._prompt()
        for name, graph in (prompt | self.graphs).items():
            lowerings = {"step": self.lowerings, "end": self.decoder_lowerings}.get(self.runs[name], LOWERINGS)
            self.written[name] = self._write(name, graph, lowerings)
        self._describe(prompt)

    def write_text_in_fp32(self, reason: str) -> None:
        """Write the text encoders again, in fp32."""
        self.text_in_fp32 = reason
        for file in self.folder.glob("prompt.*onnx*"):
            file.unlink()
        prompt = self._prompt()
        self.counts["prompt"] = {}
        self.written["prompt"] = self._write("prompt", prompt["prompt"], LOWERINGS)
        self._describe(prompt)

    def _describe(self, prompt: Mapping[str, gs.Graph]) -> None:
        graphs = {**prompt, **self.graphs}
        contract = describe(self.loaded, self.recipe, self.backend, graphs, self.runs, self.written)
        facts: dict[str, Any] = {"cut": self.cut} | ({"quantized": self.covered} if self.quantizes else {})
        facts |= {"convolutions": self.convolutions._asdict()} if self.convolutions else {}
        facts |= {"text_in_fp32": self.text_in_fp32} if self.text_in_fp32 else {}
        self.contract = replace(contract, built_with={**contract.built_with, **facts})

    def _prompt(self) -> dict[str, gs.Graph]:
        """Return the graph of the text encoders, which no step before needs, and write their tokenizers."""
        if self.loaded.text is None:
            return {}
        for file, content in self.loaded.text.tokenizers.items():
            (self.folder / file).write_text(content, encoding="utf-8")
        graph = onnxfile.load(self.traced / PROMPT)
        onnxfile.name_rows(graph, "rows")
        self.runs["prompt"] = "prompt"
        return {"prompt": graph}

    def _write(self, name: str, graph: gs.Graph, lowerings: Lowerings) -> Written:
        precision, counts = self.precision_of(name), self.counts.setdefault(name, {})
        half = backends.typed(self.backend, precision)
        overflows = find_overflows(self.measured.peaks.get(name, {}), half) if half else {}
        islands = fp32_products(graph, overflows) if half else []
        if half:
            counts["cast_to_half"] = cast_to_half(graph, half, overflows)
        if self.runs[name] == "prompt":
            counts["store_half"] = self._store_half(graph, half)
        forms.save(graph, self.folder, name)
        engines, fired = forms.save_lowered(graph, self.folder, name, precision, half, lowerings)
        counts |= fired
        require(counts, self._expected(name, len(islands)), self.misses)
        return Written(precision, engines, counts, tuple(node.name for node in islands), overflows)

    def _store_half(self, graph: gs.Graph, half: str | None) -> int:
        """Store the encoders' weights in the checkpoint's own 16 bits, and fp32 in fp16 unless the build is fp32."""
        assert self.loaded.text is not None
        own = {} if half else own_types(self.loaded.text.weights)
        in_fp32 = bool(self.text_in_fp32) or self.recipe.precision == "fp32"
        return store_half(graph, own, half or (None if in_fp32 else "fp16"))

    def _expected(self, name: str, islands: int) -> dict[str, int]:
        """Return how often each pass must fire on a stage; {}: nothing is predicted."""
        if self.runs[name] == "end":
            assert self.decoder is not None
            expected = self.decoder.expected_counts()
        elif self.runs[name] == "start":
            expected = make_encoder(self.loaded.vae).expected_counts()
        else:
            expected = dict(self.loaded.network.counts)
        if not expected or self.runs[name] not in ("step", "start", "end"):
            return {}
        attentions = sum(entry.endswith(ATTENTION) for entry in self.float_layers)
        if "quantize" in expected:  # a decoder has no such layer, and diffusers' classes do not predict them
            quantized = max(expected["quantize"] - (len(self.float_layers) - attentions), 0)
            products = quantized if self.recipe.precision in QUANTIZED else 0
            expected |= {"quantize": quantized, "integer_products": products}
        fewer = {"cast_to_half": islands, "quantize_attention": attentions}
        if self.convolutions is not None:
            in_float = self.convolutions.kept
            fewer |= dict.fromkeys(("quantize_convolutions", "divide_apart"), len(in_float))
            fewer["quantize_outputs"] = sum(map(convolutions.kernels, in_float))
        return {key: count - fewer.get(key, 0) for key, count in expected.items()}


Step = tuple[str, Callable[[Assembly], None], Callable[[Assembly], bool]]  # the last: whether it is still to be done
STEPS: tuple[Step, ...] = (
    ("fuse: hoist, fold gains, pack, guidance, sub-pixel", Assembly.fuse, lambda assembly: not assembly.graphs),
    ("measure: the fused graphs at work", Assembly.measure, lambda assembly: assembly.measures),
    ("smooth", Assembly.smooth, lambda assembly: assembly.quantizes and assembly.smoothed is None),
    ("quantize", Assembly.quantize, lambda assembly: assembly.quantizes),
    ("quantize: the decoder", Assembly.quantize_decoder, lambda assembly: assembly.quantizes_decoder),
    ("write", Assembly.write, lambda assembly: True),
)
