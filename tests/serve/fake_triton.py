"""A double of Triton's Python backend: its module, requests and senders, and a reader of config.pbtxt."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np


class TritonModelException(Exception):
    pass


class TritonError:
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL, NOT_FOUND = "invalid", "unavailable", "cancelled", "internal", "none"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    @staticmethod
    def from_dlpack(name: str, array: np.ndarray) -> Tensor:
        if not array.flags.c_contiguous:
            raise TritonModelException("DLPack tensor is not contiguous")
        return Tensor(name, array.copy())

    def as_numpy(self) -> np.ndarray:
        raise AssertionError("with NumPy 2 this is wrong in Triton 24.10")

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.array for tensor in output_tensors}
        self.error = error


class Sender:
    """Keeps the responses; nothing may follow the final one."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.final, self.cancelled = threading.Event(), False

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert not self.final.is_set(), "a response after the final one"
        self.responses.append(response)
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Asked:
    """A request; `timeout` is in microseconds."""

    def __init__(self, timeout: int = 0, **fields: Any) -> None:
        self.fields, self.sender, self._timeout = fields, Sender(), timeout

    def get_response_sender(self) -> Sender:
        return self.sender

    def timeout(self) -> int:
        return self._timeout


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    values: dict[str, float] = {}  # noqa: RUF012  # of the model that is loaded next: each has a dict of its own

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str]) -> Any:
        assert labels == {"model": "demo"}
        values = self.values
        values[self.name] = 0

        def increment(value: float) -> None:
            assert self.kind == "counter" and value > 0
            values[self.name] += value

        return SimpleNamespace(increment=increment, set=lambda value: values.update({self.name: value}))


TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


def get_input_tensor_by_name(request: Asked, name: str) -> Tensor | None:
    return Tensor(name, request.fields[name]) if name in request.fields else None


def words(text: str | bytes) -> np.ndarray:
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def read(text: str) -> dict[str, Any]:
    """Parse a config.pbtxt; of maps that are repeated fields it makes dicts, as Triton's JSON has them."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[\[\]{}:,]', text)
    table, rest = _message(tokens, "")
    assert not rest
    for name in ("parameters",):
        if name in table:
            entries = table[name] if isinstance(table[name], list) else [table[name]]
            table[name] = {entry["key"]: entry["value"] for entry in entries}
    return table


def _message(tokens: list[str], end: str) -> tuple[dict[str, Any], list[str]]:
    table: dict[str, Any] = {}
    while tokens and tokens[0] != end:
        name, tokens = tokens[0], tokens[1:]
        if tokens[0] == ":":
            tokens = tokens[1:]
        value, tokens = _value(tokens)
        table[name] = value if name not in table else [*_listed(table[name]), value]
    return table, tokens[1:]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(tokens: list[str]) -> tuple[Any, list[str]]:
    first, tokens = tokens[0], tokens[1:]
    if first == "{":
        return _message(tokens, "}")
    if first == "[":
        items = []
        while tokens[0] != "]":
            item, tokens = _value(tokens)
            items.append(item)
            if tokens[0] == ",":
                tokens = tokens[1:]
        return items, tokens[1:]
    if first.startswith('"'):
        return first[1:-1], tokens
    return {"true": True, "false": False}.get(first, int(first) if re.fullmatch(r"-?\d+", first) else first), tokens
