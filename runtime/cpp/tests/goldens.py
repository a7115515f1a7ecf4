"""Writes what Python computes to goldens.json, for the C++ tests to replay: `make goldens`."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from schedulings import schedulings

from dit_runtime.errors import UsageError
from dit_runtime.sampling.caches import CACHES, make_cache
from dit_runtime.sampling.curves import beta_quantile
from dit_runtime.sampling.guidance import POLICIES, Groups, make_policy, plan_guidance
from dit_runtime.sampling.loops import Trajectory
from dit_runtime.sampling.noise import Noise, draw
from dit_runtime.sampling.process import SOLVERS, SPACINGS, Process
from dit_runtime.sampling.schedule import make_schedule, timesteps
from dit_runtime.sampling.solvers import levels, linear, plan, solve

LISTS = ("99, 60, 41.0, 7, 0", "0.9, 0.55, 0.3, 0.2, 0.01")  # of 5 times, of a noise process and of a flow
FILE = Path(__file__).with_name("goldens.json")
SHAPE = (2, 1, 3, 4)  # of the solvers' runs: 24 numbers, so noise is drawn by blocks and redrawn at the end
PROCESSES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "v": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction": "v_prediction"},
    "sample": {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction": "sample",
        "sampler": {"variance": "fixed_small", "clip_sample": True, "clip_sample_range": 1.5, "solver_type": "heun"},
    },
    "odd": {
        "train_steps": 100,
        "sampler": {
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "variance": "fixed_large",
            "euler_at_final": True,
            "lower_order_final": False,
            "final_sigmas_type": "sigma_min",
        },
    },
    "clipped": {
        "beta_schedule": "squaredcos_cap_v2",
        "sampler": {"lambda_min_clipped": -5.1, "variance": "learned"},
    },
    "flow": {"kind": "flow"},
    "shifted": {
        "kind": "flow",
        "shift": 3.0,
        "sigma_min": 0.003,
        "shift_terminal": 0.05,
        "sampler": {"solver": "heun", "flow_spacing": "linspace"},
    },
    "growing": {"kind": "flow", "shift": 7.5, "shift_growth": -0.0076},
    "discrete": {
        "kind": "flow",
        "shift": 3.0,
        "sampler": {
            "solver": "dpm++",
            "flow_spacing": "discrete",
            "solver_type": "heun",
            "lower_order_final": False,
            "euler_at_final": True,
        },
    },
    "integer": {"kind": "flow", "shift": 3.0, "sampler": {"solver": "euler", "flow_spacing": "integer"}},
    "bent": {
        "sampler": {
            "solver": "unipc",
            "dpm_spacing": "karras",
            "solver_type": "bh1",
            "lower_order_final": False,
            "final_sigmas_type": "sigma_min",
        }
    },
    "bent flow": {"kind": "flow", "shift": 3.0, "sampler": {"flow_curve": "beta", "solver_type": "bh1"}},
    "own betas": {"train_steps": 6, "trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2, 0.4]},
}


def respond(x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """A network of + and × alone, so that C++ gives the same bits."""
    small = x.astype(np.float32)
    prediction = small * np.float32(0.5) + np.float32(t * 2**-12)
    return prediction, np.minimum(small * small * np.float32(0.0625), np.float32(1))


def runs() -> list[dict[str, Any]]:
    """Each solver with each process, spacing and a few numbers of steps: the result, or that it is refused."""
    entries = []
    spacings = ("", *SPACINGS, "discrete", "integer", *LISTS)
    for name, solver, spacing, steps in product(PROCESSES, SOLVERS, spacings, (1, 5, 20)):
        if spacing and name not in ("defaults", "odd", "shifted"):
            continue  # these show the spacings, the others the rest
        if spacing and "multistep" in SOLVERS[solver] and SOLVERS[solver]["order"] != 2:
            continue  # one solver of a method shows its spacings
        process = Process.from_dict(PROCESSES[name])
        if process.kind not in SOLVERS[solver]["processes"]:
            continue
        for eta in (0.0, 0.7) if solver == "ddim" else (0.0,):
            entry: dict[str, Any] = {
                "process": name,
                "solver": solver,
                "spacing": spacing,
                "steps": steps,
                "eta": eta,
            }
            entries.append(entry)
            try:
                asked = plan(process, solver, steps, spacing or None)
            except UsageError:
                continue
            if not eta:
                schedule = make_schedule(process, solver, steps, spacing or None)
                entry |= {"times": asked.tolist(), "sigmas_after": [step.after.sigma for step in schedule]}
            noise = draw(3, SHAPE[0])
            run = solve(process, solver, steps, noise(SHAPE), noise, eta=eta, spacing=spacing or None)
            x, t = next(run)
            try:
                while True:
                    x, t = run.send(respond(x, t))
            except StopIteration as end:
                entry["x"] = end.value.reshape(-1)[:3].tolist() + end.value.reshape(-1)[-3:].tolist()
    return entries


def started() -> list[dict[str, Any]]:
    """Each solver from its step 13 of 20: fewer are left than a short run has, but this one is not short."""
    entries = []
    for name, solver in product(("defaults", "flow", "odd"), SOLVERS):
        process = Process.from_dict(PROCESSES[name])
        if process.kind not in SOLVERS[solver]["processes"]:
            continue
        noise = draw(3, SHAPE[0])
        run = solve(process, solver, 20, noise(SHAPE), noise, first=12)
        known = levels(process, solver, 20, first=12)
        entry: dict[str, Any] = {"process": name, "solver": solver, "spacing": "", "steps": 20, "eta": 0.0, "first": 12}
        entries.append(entry | {"levels": [[level.time, level.alpha, level.sigma] for level in known]})
        x, t = next(run)
        try:
            while True:
                x, t = run.send(respond(x, t))
        except StopIteration as end:
            entries[-1]["x"] = end.value.reshape(-1)[:3].tolist() + end.value.reshape(-1)[-3:].tolist()
    return entries


def matrices() -> list[dict[str, Any]]:
    """Each solver's run as matrices, three of them, or that it is none; also one that begins late."""
    entries = []
    for name, solver, first in product(PROCESSES, SOLVERS, (0, 12)):
        process = Process.from_dict(PROCESSES[name])
        if process.kind not in SOLVERS[solver]["processes"] or process.train_steps < 20:
            continue
        made = linear(process, solver, 20, first=first)
        chosen = None if made is None else made[[0, 1, -1]].reshape(-1).tolist()
        entries.append({"process": name, "solver": solver, "first": first, "matrices": chosen})
    return entries


WEIGHTS, CHANNELS = [3.0, 2.0], 2  # of the trajectories' samples; guided of 3 channels of 2 × 2
PLANS: list[dict[str, Any]] = [
    {},
    {"interval": [0.2, 0.7]},
    *({"policy": name} for name in POLICIES),
    {"policy": "apg eta=0.5 momentum=0.25 norm_threshold=2", "interval": [0.3, 1.0]},
    {"policy": "zero_star zero_init_steps=0", "interval": [0.0, 0.5]},
    *({"cache": name} for name in CACHES),
    *({"cache": "taylorseer", "settings": {"max_order": order, "cache_interval": 3}} for order in (0, 2)),
    {
        "cache": "taylorseer",
        "settings": {"disable_cache_before_step": 0, "disable_cache_after_step": 12},
        "interval": [0.25, 0.75],
    },
    {"cache": "easycache", "settings": {"cache_threshold": 0.2, "disable_cache_before_step": 2}, "policy": "zero_star"},
]


def evaluate(x: np.ndarray, t: float, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Return what a network of `respond` predicts, and variance of each sample: its negatives see half the time."""
    own, variance = respond(x, t)
    away, _ = respond(x, t / 2)
    away = away * np.float32(0.75)
    if groups is Groups.OWN:
        return own, variance
    if groups is Groups.APART:
        return np.concatenate([own, away]), np.concatenate([variance, variance])
    weights = np.array(WEIGHTS, np.float32).reshape(-1, 1, 1, 1)
    guided = own + (weights - 1) * (own - away)
    return np.concatenate([guided[:, :CHANNELS], own[:, CHANNELS:]], axis=1), variance


def trajectories() -> list[dict[str, Any]]:
    """Each policy and cache with a solver of each kind of process: the result, and the rows of each sample."""
    entries = []
    for (name, solver), plan_ in product([("defaults", "ddpm"), ("odd", "dpm++"), ("flow", "euler")], PLANS):
        process, steps, noise = Process.from_dict(PROCESSES[name]), 16, draw(3, 2)
        settings, words, times = plan_.get("settings", {}), plan_.get("policy"), plan(process, solver, steps)
        groups = plan_guidance(process, times.tolist(), 1, True, plan_.get("interval"), words)
        policy, cache = make_policy(words), make_cache(plan_.get("cache"), settings, steps, 1)
        mix = partial(policy.mix, weights=np.array(WEIGHTS), channels=CHANNELS) if policy else None
        run = Trajectory(solve(process, solver, steps, noise((2, 3, 2, 2)), noise), times, groups, mix, cache)
        asked = []
        while run.done < steps:
            asked.append(now := run.asks())
            run.tell(*(None, None) if now is None else evaluate(run.state, times[run.done], now))
        x = run.state.reshape(-1)
        entry = {"process": name, "solver": solver, "steps": steps, **plan_}
        entries.append(entry | {"rows": [0 if now is None else now.rows for now in asked], "x": x.tolist()})
    return entries


def noises() -> list[dict[str, Any]]:
    entries = []
    for seed in (0, 42, 2**32 + 7, 2**64 - 1):
        stream, draws = Noise(seed), []
        for size in (1, 3, 15, 16, 17, 40, 2, 64):
            draws.append({"size": size, "values": stream.normal((size,)).tolist()})
        entries.append({"seed": seed, "bits": Noise(seed).bits(4).tolist(), "draws": draws})
    return entries


def goldens() -> dict[str, Any]:
    full = Process.from_dict(PROCESSES["defaults"])
    seeds = [5, 6, 7]
    each = draw(seeds, 3)
    return {
        "processes": PROCESSES,
        "betas": {name: Process.from_dict(table).betas[::7].tolist() for name, table in PROCESSES.items()},
        "alpha_bar": {name: Process.from_dict(table).alpha_bar[::7].tolist() for name, table in PROCESSES.items()},
        "every_step": {spacing: timesteps(full, "ddim", 250, spacing).tolist() for spacing in SPACINGS},
        "runs": [*runs(), *started()],
        "matrices": matrices(),
        "beta_quantiles": {str(p): beta_quantile(np.array([p])).item() for p in (1e-9, 0.001, 0.2, 0.5, 0.7, 0.999)},
        "trajectories": trajectories(),
        "noise": noises(),
        "schedulings": schedulings(),
        "seeds": {"seeds": seeds, "draws": [each((3, 1, 2, 9)).reshape(-1).tolist() for _ in range(2)]},
    }


def text() -> str:
    """JSON with one entry a line, so that a change can be read."""
    parts = []
    for key, value in goldens().items():
        if isinstance(value, dict):
            lines = [f"{json.dumps(name)}: {json.dumps(inner)}" for name, inner in value.items()]
        else:
            lines = [json.dumps(inner) for inner in value]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        parts.append(f"{json.dumps(key)}: {opening}\n" + ",\n".join(lines) + f"\n{closing}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{FILE}: {FILE.stat().st_size} bytes\n")
