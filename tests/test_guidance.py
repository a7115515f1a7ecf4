"""Guidance other than the linear one: embedded in the network, and with a rule of the network's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_export.networks import Network, fixtures, rules
from dit_export.verify import parity
from dit_runtime import Pipeline, UsageError
from dit_runtime import cli as runtime
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Port
from dit_runtime.verify import verify
from tests.families.tiny import on_backend
from tests.verify import tiny

BACKENDS = ("onnxruntime", "openvino")
STRENGTH, DEFAULT = Port("strength", "condition", "float32", ()), 3.5
TOLERANCE = 1e-5  # relative L2: fp32 sums in another order through two blocks; measured 3e-7


class Embedded(nn.Module):
    """A network that reads the weight of guidance as it reads the time."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, strength: Tensor) -> Tensor:
        return self.inner(x, t + self.scale * strength, labels)


def embedded(scale: float = 40.0) -> Network:
    inner = tiny.network("labels")
    return replace(
        inner,
        module=Embedded(inner.module, scale).eval(),
        ports=(*inner.ports, STRENGTH),
        null={},
        guidance=DEFAULT,
        guidance_port=STRENGTH.name,
    )


def renormalized() -> Network:
    return replace(tiny.network("labels"), rule=rules.Renormalized(2))


@pytest.fixture(scope="module", params=BACKENDS)
def opened(request, tmp_path_factory, bundles) -> Iterator[dict[str, Pipeline]]:
    folder = tmp_path_factory.mktemp(request.param)
    pipes = {
        name: Pipeline.load(on_backend(request.param, bundle.folder, folder / name), threads=1)
        for name, bundle in bundles.items()
    }
    yield pipes
    for pipe in pipes.values():
        pipe.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, one_thread) -> dict[str, tiny.Bundle]:
    folder = tmp_path_factory.mktemp("guidance")
    with one_thread():
        return {made.__name__: tiny.write(folder / made.__name__, made()) for made in (embedded, renormalized)}


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["embedded", "renormalized"])
def test_a_replay_is_pytorch(opened, name) -> None:
    figures = verify(opened[name])
    assert figures and all(figure.passed for figure in figures), [figure for figure in figures if not figure.passed]


@pytest.mark.parametrize("make", [embedded, renormalized])
def test_a_build_proves_it(opened, bundles, make) -> None:
    """Twice the guidance must be seen, and batches of weights are PyTorch's."""
    pipe, network = opened[make.__name__], make()
    proven = parity.proof(pipe, bundles[make.__name__].reference)
    assert [figure.metric.split(",")[0] for figure in proven] == ["another condition", "t moved by 5 %", "guidance x 2"]
    assert all(figure.passed for figure in (*proven, *parity.graph_parity(pipe, network, None)))
    wrong = embedded(41.0) if network.guidance_port else replace(network, rule=None)
    assert not all(figure.passed for figure in parity.graph_parity(pipe, wrong, None))


def test_a_weight_goes_into_the_port(opened) -> None:
    """The default, one weight, or one a sample, also below 1; the same rows as a condition are the same bits."""
    pipe = opened["embedded"]
    labels = {"labels": np.array([1, 4])}
    options = {"steps": 3, "seed": [5, 6], "output": "latents"}
    for guidance, rows in ((None, [DEFAULT] * 2), (2.0, [2.0] * 2), ([0.5, 6.0], [0.5, 6.0])):
        expected = pipe.sample(condition=labels | {"strength": np.array(rows)}, **options)
        got = pipe.sample(condition=labels, guidance=guidance, **options)
        assert np.array_equal(got, expected)
        near = pipe.sample(condition=labels, guidance=[rows[0] + 0.1, rows[1] + 0.1], **options)
        assert min(distance(near[i], expected[i]) for i in range(2)) > 100 * TOLERANCE


def test_one_evaluation_is_pytorch(opened) -> None:
    """Each row has its own weight."""
    pipe, network = opened["embedded"], embedded()
    condition = fixtures.conditions(network, 3)
    state = np.random.default_rng(0).normal(size=(3, *network.state.shape)).astype(np.float32)
    inputs = {"x": state, "t": np.full(3, 500, np.float32), **condition}
    with torch.no_grad():
        expected, moved = (
            network.module(**{name: torch.from_numpy(rows) for name, rows in values.items()}).numpy()
            for values in (inputs, inputs | {"strength": np.roll(condition["strength"], 1)})
        )
    got, _ = pipe.engines.denoise(state, pipe.engines.inputs(np.array([500.0]), condition, None, np.ones(3)), 0)
    assert distance(got, expected) <= TOLERANCE < 0.01 < distance(got, moved)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"negative": {"labels": np.array([0])}}, "takes its guidance as strength, and no negative"),
        ({"condition": {"labels": np.array([1]), "strength": np.ones(1)}, "guidance": 2.0}, "got both guidance and"),
        ({"guidance": [1.0, 2.0]}, "expected one number or 1, one a sample"),
        ({"guidance": "strong"}, "guidance is 'strong'"),
    ],
)
def test_what_is_refused(opened, request_, words) -> None:
    with pytest.raises(UsageError, match=words):
        opened["embedded"].sample(**{"condition": {"labels": np.array([1])}, "output": "latents"} | request_)


def qwen(conditional: np.ndarray, negative: np.ndarray, weight: float) -> np.ndarray:
    """Guide as the pipeline of Qwen-Image, on tokens (N, D)."""
    mixed = negative + weight * (conditional - negative)
    norms = np.linalg.norm(conditional, axis=-1, keepdims=True), np.linalg.norm(mixed, axis=-1, keepdims=True)
    return mixed * (norms[0] / norms[1])


def tokens(state: np.ndarray, size: int = 2) -> np.ndarray:
    """Return (tokens, C·size) of a state (C, L)."""
    channels, length = state.shape
    return state.reshape(channels, length // size, size).transpose(1, 0, 2).reshape(-1, channels * size)


def test_a_rule_is_the_pipelines(opened) -> None:
    pipe, weights = opened["renormalized"], np.array([1.0, 2.5, 6.0], np.float32)
    own, null = {"labels": np.array([1, 4, 2])}, {"labels": np.array([tiny.CLASSES])}
    state = np.random.default_rng(0).normal(size=(3, *tiny.STATE.shape)).astype(np.float32)

    def predict(condition: dict, negative: dict | None, weights: np.ndarray) -> np.ndarray:
        return pipe.engines.denoise(state, pipe.engines.inputs(np.array([500.0]), condition, negative, weights), 0)[0]

    alone, away = (predict(rows, None, weights) for rows in (own, {"labels": np.repeat(null["labels"], 3)}))
    got = predict(own, null, weights)
    assert np.array_equal(got[0], alone[0])  # weight 1 beside guided samples, to the bit
    for index, weight in enumerate(weights):
        conditional, negative = alone[index], away[index]
        assert distance(tokens(got[index]), qwen(tokens(conditional), tokens(negative), weight)) <= TOLERANCE
        if weight != 1:
            linear = negative + weight * (conditional - negative)
            other = qwen(tokens(conditional, 1), tokens(negative, 1), weight)
            assert distance(got[index], linear) > 0.01 and distance(tokens(got[index], 1), other) > 0.01


def test_a_manifest_says_so(bundles, capsys) -> None:
    folder = bundles["embedded"].folder
    contract = manifest.read(folder)
    assert (contract.guidance.default, contract.guidance.port) == (DEFAULT, "strength")
    assert not contract.mixes_guidance and contract.without_null == ()
    assert runtime.main(["info", str(folder)]) == 0
    assert "guidance 3.5 as strength" in capsys.readouterr().out
    assert runtime.main(["info", str(bundles["renormalized"].folder)]) == 0
    assert "guidance 4 on 4 of 4 channels" in capsys.readouterr().out
    assert (bundles["embedded"].reference.guidance == bundles["embedded"].reference.condition["strength"]).all()


def test_the_command_line_takes_the_bundles_defaults(bundles, tmp_path) -> None:
    folder = bundles["embedded"].folder
    changed = on_backend("onnxruntime", folder, tmp_path / "bundle")
    table = json.loads((changed / manifest.NAME).read_text())
    table["process"]["sampler"]["steps"] = 3
    (changed / manifest.NAME).write_text(json.dumps(table))
    np.save(tmp_path / "labels.npy", np.array([1]))

    def sample(*options: str) -> np.ndarray:
        command = ["sample", str(changed), "--condition", f"labels={tmp_path / 'labels.npy'}", "--threads", "1"]
        assert runtime.main([*command, *options, "-o", str(tmp_path / "x.npy")]) == 0
        return np.load(tmp_path / "x.npy")

    expected = sample("--steps", "3", "--guidance", "3.5")
    assert np.array_equal(sample(), expected)
    assert distance(sample("--steps", "4"), expected) > 0.01 and distance(sample("--guidance", "3"), expected) > 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guidance_port": "weight"}, "guidance: port: got weight, expected a condition port of float32"),
        ({"guidance_port": "labels"}, "guidance: port: got labels, expected a condition port of float32"),
        ({"guidance_port": "strength", "null": {"strength": 1.0}}, "without a constant in null"),
        ({"guidance_port": "strength", "rule": rules.Linear()}, "got a rule of guidance for a network"),
    ],
)
def test_networks_that_are_refused(fields, words) -> None:
    ports = (tiny.STATE, tiny.TIME, tiny.LABELS, STRENGTH)
    with pytest.raises(UsageError, match=words):
        Network(nn.Identity(), ports, **fields)


@pytest.mark.parametrize("rule", [rules.Linear(), rules.Renormalized(2, 2)])
def test_a_weight_of_one_is_the_identity(rule) -> None:
    values = [torch.randn(2, 3, 4, 6) for _ in range(2)]
    assert torch.equal(rule(*values, torch.ones(2, 1, 1, 1)), values[0])
    assert torch.equal(rule(values[0], values[0], torch.full((2, 1, 1, 1), 5.0)), values[0])
    assert not torch.equal(rule(*values, torch.full((2, 1, 1, 1), 1.5)), values[0])
    values[0][:, :, :2] = 0  # whole tokens
    assert torch.equal(rule(*values, torch.ones(2, 1, 1, 1)), values[0])
