"""Each repair of a traced program, on the smallest network that needs it: right with it, wrong without it."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_export.graph import onnxfile, repairs, trace
from dit_export.passes.attention import plain_attention
from dit_runtime.errors import UsageError

REPAIRS = {repair.__name__: repair for repair in (*repairs.REPAIRS, repairs.split_boolean_wheres)}


class Frequencies(nn.Module):
    def forward(self, x):
        exponents = torch.arange(128, dtype=torch.float32) / 128
        return 1000 * torch.exp(-math.log(10000) * exponents) * x[:, None]


class IdleSqueeze(nn.Module):
    def forward(self, x):
        return x.view(-1, 2, 4).squeeze(1).sum(-1)


class TinyTerm(nn.Module):
    def forward(self, x):
        x = x.view(-1, 2, 4)
        return x / (x.sum(-1, keepdim=True) + 1e-15)


class BooleanMask(nn.Module):
    def forward(self, x):
        x = x.view(-1, 1, 4, 2)
        mask = x[:, :, None, :, 0] > -0.5
        return F.scaled_dot_product_attention(x, x, x, mask)


class BooleanWhere(nn.Module):
    def forward(self, x):
        first, second, third = x[:, :2] > 0, x[:, 2:4] > 0, x[:, 4:6] > 0
        return torch.where(first, second, third).float()


class RotaryTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.1]))
        self.table = torch.polar(torch.ones_like(angles), angles)

    def forward(self, x):
        x = x.view(-1, 4, 1, 4)
        turns = self.table[x.sum((2, 3)).abs().long() % 9].unsqueeze(-2)  # (B, 4, 1, 2)
        turns = torch.cat([turns[..., 1:], turns[..., :1]], -1)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * turns)


CASES = {
    "fold": (Frequencies(), ()),
    "drop_idle_squeezes": (IdleSqueeze(), (8,)),
    "keep_tiny_terms": (TinyTerm(), (8,)),
    "add_masks": (BooleanMask(), (8,)),
    "pair_complex": (RotaryTable(), (16,)),
    "split_boolean_wheres": (BooleanWhere(), (8,)),
}


def run(module: nn.Module, shape: tuple[int, ...], folder) -> tuple[np.ndarray, torch.Tensor]:
    """Return what ONNX Runtime and PyTorch make of three rows, the first of zeros."""
    program = trace.export(module, {"x": torch.ones(2, *shape)}, ["y"])
    program.save(folder / "traced.onnx", external_data=True)
    graph = onnxfile.load(folder / "traced.onnx")
    plain_attention(graph)  # as every graph for ONNX Runtime is lowered
    onnxfile.save(graph, folder / "lowered.onnx")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    session = onnxruntime.InferenceSession(folder / "lowered.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0], module(x)


def test_every_repair_has_a_case() -> None:
    assert CASES.keys() == REPAIRS.keys()


@pytest.mark.parametrize("name", CASES)
def test_with_the_repair(name, tmp_path) -> None:
    got, expected = run(*CASES[name], tmp_path)
    # One rounding of a sum, a product or a softmax; constants and comparisons are exact.
    rounded = name in ("add_masks", "keep_tiny_terms", "pair_complex")
    np.testing.assert_allclose(got, expected, rtol=1e-6 * rounded, atol=1e-6 * (name == "pair_complex"))


@pytest.mark.parametrize("name", CASES)
def test_without_the_repair(name, tmp_path, monkeypatch) -> None:
    """The upstream cause is still there: a repair whose cause is gone can go too."""
    monkeypatch.setattr(trace, "REPAIRS", tuple(repair for repair in trace.REPAIRS if repair.__name__ != name))
    if name == "split_boolean_wheres":
        monkeypatch.setattr(trace, name, lambda graph: 0)
    try:
        got, expected = run(*CASES[name], tmp_path)
    except Exception as error:
        refusals = "[ONNXRuntimeError]", "[ShapeInferenceError]", "Error when translating node"
        assert any(refusal in str(error) for refusal in refusals)
    else:
        assert not np.allclose(got, expected, rtol=0, atol=1e-6)


def test_what_has_no_form_in_pairs() -> None:
    class Conjugate(nn.Module):
        def forward(self, x):
            return torch.view_as_real(torch.view_as_complex(x.view(-1, 2)).reciprocal())

    with pytest.raises(UsageError, match=r"aten\.reciprocal\.default of complex numbers, which has no form"):
        trace.export(Conjugate().eval(), {"x": torch.ones(4, 2)}, ["y"])


def test_what_must_not_be_repaired(tmp_path) -> None:
    """A squeeze that does something, a term that is not tiny, an added mask, weights and real indexing."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            x = x.view(-1, 1, 2, 4) + 1e-5
            weight = self.weight[x[:, 0, 0].abs().long() % 4].unsqueeze(-2)
            return F.scaled_dot_product_attention(x, x, x, x[..., :2]).squeeze(1) * weight.exp()

    program = torch.export.export(Other().eval(), (), {"x": torch.ones(2, 8)}, strict=False)
    module = program.run_decompositions({}).module()
    assert [repair(module) for repair in repairs.REPAIRS] == [0] * len(repairs.REPAIRS)


class Tables(nn.Module):
    """Each layer makes its own form of one table."""

    def forward(self, x):
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        for layer in range(3):
            x = x * angles.cos().repeat(1, 2)[None] + (0.5 + (layer == 2)) * angles.sin().repeat(1, 2)[None]
        return x


def test_equal_constants_are_stored_once() -> None:
    """Two tables and the last layer's own, of the six that the layers read; a table of the same shape is another."""
    module = torch.export.export(Tables(), (torch.ones(2, 16, 8),)).run_decompositions({}).module()
    expected = module(torch.ones(2, 16, 8))
    assert repairs.fold(module) == 6
    folded = {name: value for name, value in module.named_buffers() if name.startswith("folded")}
    assert len(folded) == 3 and len({value.data_ptr() for value in folded.values()}) == 3
    assert torch.equal(module(torch.ones(2, 16, 8)), expected)
