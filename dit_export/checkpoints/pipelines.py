"""A pipeline of diffusers whose transformer has no family: run it briefly, record and sort the transformer's calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.utils import logging
from numpy.typing import NDArray

from dit_export.checkpoints.diffusers import class_name
from dit_export.checkpoints.families import read_module
from dit_export.checkpoints.files import Renamed, first_line, sha256
from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.checkpoints.schema import read_index
from dit_export.checkpoints.text import quiet
from dit_export.checkpoints.vae import read_vae
from dit_export.networks import Network
from dit_export.networks.caller import network
from dit_export.networks.captured import CLOSE, WEIGHT, Captured, Runs, distance
from dit_export.networks.codec import CODECS, make_decoder
from dit_export.networks.diffusers import Recording, record
from dit_export.networks.streaming import stream
from dit_export.recipe import Recipe, latent_size
from dit_runtime.errors import UsageError
from dit_runtime.images import psnr
from dit_runtime.sampling.noise import draw
from dit_runtime.sampling.process import CHOICES, Process
from dit_runtime.sampling.solvers import solve

PROMPT, OTHER = "a photo of a cat", "two red boats at sea, 1920, and a lighthouse"
GUIDED = 3.0  # the weight of the runs where the pipeline's own is none
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
SAME = 60.0  # dB between the pipeline's picture and the decoder's


Examples = dict[str, dict[str, NDArray[np.float32]]]  # conditions by file and port, a row a prompt


class Read(NamedTuple):
    """A pipeline as a build takes it."""

    network: Network
    process: Process
    vae: Any  # None: latents alone
    source: dict[str, Any]
    examples: Examples
    note: str


@contextmanager
def _silent() -> Iterator[None]:
    """Show neither progress bars nor warnings of diffusers and transformers."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def open_pipeline(folder: Path) -> tuple[Any, list[Path]]:
    """Load a pipeline by diffusers' own classes; return the files of its transformer's weights, too.

    Nothing is fetched, and no code of the folder runs.
    """
    place = folder / "transformer"
    for path in (folder / "model_index.json", place / "config.json"):
        if not path.is_file():
            raise UsageError(f"{path}: not there; expected a pipeline that diffusers saved, with a transformer")
    kind, name = (str(each) for each in (read_index(folder).get("_class_name"), class_name(place)))
    for known, path in ((kind, folder / "model_index.json"), (name, place / "config.json")):
        if not isinstance(getattr(diffusers, known, None), type):
            raise UsageError(f"{path}: diffusers {diffusers.__version__} has no class {known}")
    transformer, weights, files = read_module(place, name)
    transformer.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    transformer.eval().requires_grad_(False)
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(folder, transformer=transformer, **options)
    except Exception as error:  # what loading a folder of somebody's raises shares no base class but this
        raise UsageError(f"{folder}: diffusers does not load it: {first_line(error)}") from None
    if getattr(pipeline, "scheduler", None) is None:
        raise UsageError(f"{folder}: {type(pipeline).__name__} has no scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, files


def call_arguments(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    """Return what every run of the pipeline is called with; refuse a call that needs more than a prompt."""
    where, parameters = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    needed = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind in NAMED and name != "prompt"
    ]
    if needed or "prompt" not in parameters:
        raise UsageError(f"{where}: its call needs {', '.join(needed) or 'no prompt'}; expected a prompt alone")
    arguments: dict[str, Any] = {"output_type": "latent"}
    if recipe.resolution is not None:
        arguments["height"], arguments["width"] = latent_size(recipe.resolution, 1)
        if "use_resolution_binning" in parameters:
            arguments["use_resolution_binning"] = False
    if recipe.frames is not None:
        arguments["video_length" if "video_length" in parameters else "num_frames"] = recipe.frames
    if recipe.caption_tokens is not None:
        arguments["max_sequence_length"] = recipe.caption_tokens
    if unknown := [name for name in arguments if name not in parameters and name != "output_type"]:
        raise UsageError(f"{where}: its call has no {unknown[0]}")
    return {name: value for name, value in arguments.items() if name in parameters}


def default_of(pipeline: Any, name: str) -> Any:
    """Return the default of an argument of the pipeline's call; None where there is none."""
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def run_once(
    pipeline: Any, recipe: Recipe, prompt: Any, seeds: Sequence[int] = (0,), steps: int = 2, **changes: Any
) -> Recording:
    """Run the pipeline for a few steps, with the weight of guidance of `guided_weight` unless `changes` has another."""
    options = call_arguments(pipeline, recipe) | {"num_inference_steps": steps}
    if default_of(pipeline, WEIGHT) is not None:
        options[WEIGHT] = guided_weight(pipeline)
    try:
        recording = record(pipeline, seeds, prompt=prompt, **options | changes)
    except UsageError:
        raise
    except Exception as error:  # whatever a pipeline raises
        raise UsageError(f"{type(pipeline).__name__}: a run of it fails: {first_line(error)}") from error
    if len(recording.steps) != steps:
        where = f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}"
        raise UsageError(f"{where}: {len(recording.steps)} steps where {steps} were asked for")
    return recording


def guided_weight(pipeline: Any) -> float:
    """Return a weight of guidance above 1, the pipeline's own where it has one."""
    weight = default_of(pipeline, WEIGHT)
    return GUIDED if weight is None or weight <= 1 else float(weight)


def run(pipeline: Any, recipe: Recipe, decode: bool = False) -> Runs:
    """Run the pipeline five times, two to four steps each."""
    once = partial(run_once, pipeline, recipe)
    pictures: dict[str, Any] = {"output_type": "np"} if decode else {}
    unguided: dict[str, Any] = {} if default_of(pipeline, WEIGHT) is None else {WEIGHT: 1.0}
    return Runs(
        first=once(PROMPT, **pictures),
        prompt=once(OTHER),
        seed=once(PROMPT, seeds=[1], steps=3),
        batch=once([PROMPT, OTHER], seeds=[0, 1]),
        unguided=once(PROMPT, steps=4, **unguided),
        weight=guided_weight(pipeline),
    )


def record_conditions(folder: Path, recipe: Recipe, prompts: Sequence[str], negative: str, digest: str) -> Examples:
    """Return what a pipeline gives its transformer for prompts and a negative one, as `Loaded.examples` has it.

    Refuse a folder whose transformer has not the sum `digest`.
    """
    with _silent():
        pipeline, files = open_pipeline(folder)
        if sha256(files) != digest:
            raise UsageError(f"{folder}: its weights are not the ones of this bundle; build it again")
        captured = Captured(pipeline.transformer, run(pipeline, recipe))
        changes: dict[str, Any] = {"negative_prompt": negative} if negative else {}
        return condition_arrays(captured, [run_once(pipeline, recipe, prompt, **changes) for prompt in prompts])


def read_pipeline(folder: Path, recipe: Recipe) -> Read:
    """Run a pipeline and return its transformer as a Network, with what else a build takes of it."""
    with _silent():
        pipeline, weight_files = open_pipeline(folder)
        codec = type(getattr(pipeline, "vae", None)).__name__
        runs = run(pipeline, recipe, decode=codec in CODECS and not recipe.latents_only)
    captured = Captured(pipeline.transformer, runs)
    process = fit_process(pipeline, captured)
    steps = default_of(pipeline, "num_inference_steps") or process.sampler.steps
    process = replace(process, sampler=replace(process.sampler, steps=steps))
    made = streamed_network(folder, captured, process, float(default_of(pipeline, WEIGHT) or 1.0))
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    sizes = {"resolution": recipe.resolution, "frames": recipe.frames}
    model: dict[str, Any] = {"name": type(pipeline.transformer).__name__, "pipeline": type(pipeline).__name__}
    model |= {name: value for name, value in sizes.items() if value is not None}
    files: dict[str, Any] = {"sha256": sha256(weight_files)}
    vae, note = None, f"{codec}: not a known VAE; the bundle ends at the latents"
    if recipe.latents_only:
        note = ""
    elif codec in CODECS:
        try:
            vae, vae_files = _read_decoder(folder / "vae", captured)
            files |= {"vae": {"sha256": sha256(vae_files)}}
            note = ""
        except UsageError as error:
            note = f"{error}; the bundle ends at the latents"
    pixels = make_decoder(vae).pixels if vae is not None else made.pixels
    made = replace(made, model=config | model, pixels=pixels)
    parameters = inspect.signature(pipeline.__call__).parameters
    for name in parameters.keys() - {WEIGHT}:
        if name.endswith(("guidance_scale", "cfg_scale")):
            note = "; ".join(filter(None, (note, f"{name} stays at its default")))
    return Read(made, process, vae, files, condition_arrays(captured), note)


def streamed_network(folder: Path, captured: Captured, process: Process, guidance: float) -> Network:
    """Return the captured transformer as a Network that reads its weights where they are used.

    A class whose parts read weights of other parts gives no values so; its weights stay in memory.
    """
    place = folder / "transformer"
    transformer, weights, _ = read_module(place, class_name(place))
    names = [name for name, _ in transformer.named_parameters(remove_duplicate=False)]
    stream(transformer.eval(), weights)
    try:
        made = network(replace(captured, transformer=transformer), process, guidance)
    except Exception:  # whatever a class makes of fakes; a network that is refused is refused again
        return network(captured, process, guidance)
    return replace(made, weights=Renamed({f"transformer.{name}": (weights, name) for name in names}))


def _read_decoder(folder: Path, captured: Captured) -> tuple[Any, list[Path]]:
    """Return the VAE whose decoder draws the first run's picture, and its files."""
    state = captured.drawn(captured.runs.first.final)
    picture = np.asarray(captured.runs.first.result)  # (1, H, W, 3), of videos (1, F, H, W, 3)
    if state.ndim < 4:
        raise UsageError(f"{folder}: its latents have no height and width")
    vae, files = read_vae(folder, state.shape[1], picture.shape[-2] // state.shape[-1])
    with torch.no_grad():
        drawn = np.moveaxis(make_decoder(vae)(state).numpy(), 1, -1)
    if drawn.shape != picture.shape or not psnr(drawn, picture, peak=1.0) >= SAME:
        raise UsageError(f"{folder}: its decoder does not draw the pipeline's picture")
    return vae, files


def condition_arrays(captured: Captured, recordings: Sequence[Recording] = ()) -> Examples:
    """Return the conditions of recorded prompts by file and port, a row each, and those of the first's negative.

    Without recordings they are those of the captured runs.
    """
    recordings, ports = recordings or (captured.runs.first, captured.runs.prompt), captured.condition_ports()
    groups = {"conditions": [captured.own(each) for each in recordings]}
    for row in groups["conditions"]:
        captured.require_constants(row)
    if captured.guided:
        groups["negative"] = [captured.negative(recordings[0])]
    return {
        file: {
            port.name: torch.cat([row.inputs[argument] for row in rows]).float().numpy()
            for argument, port in ports.items()
            if argument != captured.sorted.weight
        }
        for file, rows in groups.items()
    }


def fit_process(pipeline: Any, captured: Captured) -> Process:
    """Return the process whose solver repeats the scheduler's steps in every run."""
    scheduler = pipeline.scheduler
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    shifts = {len(each.steps): each.schedule.get("mu") for each in captured.runs.recordings}
    mu = None
    if shifts[2] is not None:
        growth = shifts[3] - shifts[2]
        mu = lambda tokens, fields: (shifts[2] - 2 * growth, growth)  # noqa: E731
    errors: dict[str, float] = {}
    for spacing in CHOICES["flow_spacing"]:
        process = read_scheduler_config(config, learned_variance=False, tokens=0, spacing=spacing, mu=mu)
        try:
            errors[spacing] = max(replay(process, captured, each) for each in captured.runs.recordings)
        except UsageError:  # a spacing that does not fit so few steps
            continue
        if errors[spacing] <= CLOSE:
            return process
    nearest = [f"; {name} differs by {error:.2g} (relative L2)" for name, error in errors.items()]
    raise UsageError(
        f"{type(scheduler).__name__}: no schedule that is known repeats the pipeline's steps{''.join(nearest)}"
    )


def replay(process: Process, captured: Captured, recording: Recording) -> float:
    """Return the largest relative L2 between a recording's states and our solver's, given its predictions."""
    seeds = recording.seeds if len(recording.seeds) > 1 else recording.seeds[0]
    stream = draw(seeds, len(recording.seeds))
    noise = stream((len(recording.seeds), *captured.shape))
    solver = solve(process, process.sampler.solver, len(recording.steps), noise, stream)
    state, _ = next(solver)
    worst = 0.0
    for step in recording.steps:
        worst = max(worst, distance(torch.from_numpy(state), captured.drawn(step.sample).double()))
        prediction = captured.drawn(step.prediction).numpy()
        try:
            state, _ = solver.send((prediction, None))
        except StopIteration as end:
            state = end.value
    return max(worst, distance(torch.from_numpy(state), captured.drawn(recording.final).double()))
