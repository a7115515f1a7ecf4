"""PyTorch's value of any traced tensor, by the name that the tensor has in the ONNX graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx.node import map_aggregate

from dit_runtime.errors import UsageError

NONE: Mapping[str, Tensor] = {}  # every parameter is real


class Place(NamedTuple):
    """Locate a tensor in the traced program."""

    node: str
    part: int | None = None  # of a node that gives several tensors


class Unread:
    """A weight that is read whenever an operator takes it."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self._weights, self._name = weights, name

    def read(self) -> Tensor:
        return self._weights[self._name].float()


class Oracle:
    """Runs a traced program in PyTorch, not a hand-written twin of it; `weights` stand for parameters that are fake.

    The program is `ONNXProgram.exported_program`: decomposed, and with the names of the ONNX graph. `names` lists every
    tensor that it can value. Missing are those within one operator of PyTorch, such as the product before a bias.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        weights: Mapping[str, Tensor] = NONE,
        outputs: Sequence[str] = ("prediction",),
    ) -> None:
        self._program, self._weights = program, weights
        self._places: dict[str, Place] = {}
        self._nodes = {node.name: node for node in program.graph.nodes}
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                self._places[node.name] = Place(node.name)
            elif isinstance(value, list | tuple):  # the exporter's names for the outputs of Split
                self._places |= {f"{node.name}_split_{i}": Place(node.name, i) for i in range(len(value))}
        for name, node_name in zip(outputs, program.graph_signature.user_outputs, strict=True):
            self._places[name] = Place(str(node_name))

    @property
    def names(self) -> Collection[str]:
        return self._places.keys()

    def node(self, name: str) -> torch.fx.Node:
        """Return the node of the program that gives a tensor, or all parts of a Split."""
        return self._nodes[self._places[name].node]

    @torch.no_grad()
    def __call__(self, names: Collection[str], **inputs: Tensor) -> dict[str, Tensor]:
        """Return the values of these tensors for inputs by port; ports that none of them depends on may be missing."""
        if unknown := sorted(set(names) - self._places.keys()):
            raise UsageError(f"{unknown[0]}: the traced program has no tensor of this name")
        places = {name: self._places[name] for name in names}
        recorder = Recorder(self._program.graph_module, [self._nodes[place.node] for place in places.values()])
        recorder.run(*self._arguments(inputs))
        return {name: recorder[place] for name, place in places.items()}

    def _arguments(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        program, arguments = self._program, list[Any]()
        rows = next((len(value) for value in inputs.values()), 1)
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                value = inputs.get(spec.arg.name)
                if value is None:  # its number of rows may be read all the same
                    shape = self._nodes[spec.arg.name].meta["val"].shape
                    value = torch.zeros(()).expand(rows, *shape[1:])
                arguments.append(value)
            elif spec.target in self._weights:
                arguments.append(Unread(self._weights, str(spec.target)))
            elif spec.target in program.state_dict:
                arguments.append(program.state_dict[spec.target])
            else:
                arguments.append(program.constants[str(spec.target)])
        return arguments


class Recorder(torch.fx.Interpreter):
    """Keeps the values of some nodes, and runs what they depend on."""

    def __init__(self, module: torch.fx.GraphModule, nodes: Collection[torch.fx.Node]) -> None:
        super().__init__(module)
        self._wanted = set(nodes)
        self._needed, stack = set(nodes), list(nodes)
        while stack:
            terms = [term for term in stack.pop().all_input_nodes if term not in self._needed]
            self._needed.update(terms)
            stack += terms
        self._values: dict[str, Any] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        if node not in self._needed and node.op != "placeholder":  # which takes the next argument
            return None
        value = super().run_node(node)
        if node in self._wanted:
            self._values[node.name] = value
        return value

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> Any:
        values = super().fetch_args_kwargs_from_env(n)
        return map_aggregate(values, lambda value: value.read() if isinstance(value, Unread) else value)

    def __getitem__(self, place: Place) -> Tensor:
        value = self._values[place.node]
        return value if place.part is None else value[place.part]
