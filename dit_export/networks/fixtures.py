"""Conditions and prompts that stand in for a user's, in the reference, the parity checks and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_export.networks import Network
from dit_export.networks.text import PromptEncoder
from dit_runtime.bundle.manifest import Port
from dit_runtime.conditions.condition import Rows
from dit_runtime.conditions.text import templated
from dit_runtime.sampling.noise import Noise

NULL = 2**15  # the number of the null row where a port has no constant: no series is as long
TEXTS = ("a photo of a cat", "", "two red boats at sea, seen from a hill, in the style of an old map of 1920")
LONG = "a long road, " * 200
SHORTEST = 5  # the null row's mask marks one token of so many


def conditions(network: Network, count: int) -> Rows:
    """Return `count` rows: classes spread over the port's values, seeded normal numbers, masks of falling lengths, and
    weights of guidance from 1 to 8.

    The first mask marks every token. Numbers are float16 values, so that a file can store them as float16.
    """
    return {port.name: _rows(network, port, count) for port in network.conditions}


def null(network: Network) -> Rows:
    """Return one row, what guidance leads away from: the network's constants, or a row that no series has."""
    return {port.name: _null(network, port) for port in network.conditions}


def another(ports: Sequence[Port], condition: Rows, negative: Rows) -> Rows:
    """Give each row another condition: the next class that is not the null, numbers and masks of the next row.

    The null row stands in where that is equal to the row's own.
    """
    moved = {port.name: _moved(port, condition[port.name], negative[port.name]) for port in ports}
    each = [(rows == condition[name]).reshape(len(rows), -1).all(axis=1) for name, rows in moved.items()]
    same = np.logical_and.reduce(each)
    return {
        name: np.where(same.reshape(-1, *[1] * (rows.ndim - 1)), negative[name], rows) for name, rows in moved.items()
    }


def tokenize(text: PromptEncoder, words: Sequence[str]) -> Rows:
    """Return the ids and masks of prompts, as a bundle's tokenizers give them."""
    from tokenizers import Tokenizer

    rows: Rows = {}
    for prompt in text.prompts:
        tokenizer = Tokenizer.from_str(text.tokenizers[prompt.tokenizer])
        encodings = tokenizer.encode_batch(templated(words, prompt))
        rows[prompt.ids] = np.array([encoding.ids for encoding in encodings], np.int64)
        if prompt.mask:
            rows[prompt.mask] = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    return rows


def token_ids(text: PromptEncoder) -> Rows:
    """Return made-up ids for two prompts, the second with a mask that is half empty."""
    rows: Rows = {}
    for number, prompt in enumerate(text.prompts):
        bits = Noise(number).bits(2 * prompt.tokens).reshape(2, prompt.tokens)
        rows[prompt.ids] = (bits % prompt.size).astype(np.int64)
        if prompt.mask:
            lengths = np.array([prompt.tokens, (prompt.tokens + 1) // 2])
            rows[prompt.mask] = (np.arange(prompt.tokens) < lengths[:, None]).astype(np.int64)
    return rows


def _moved(port: Port, rows: NDArray[Any], null: NDArray[Any]) -> NDArray[Any]:
    if port.dtype != "int64":
        return np.roll(rows, -1, axis=0)
    following = (rows + 1) % port.size
    return np.where(following == null, (following + 1) % port.size, following)


def _rows(network: Network, port: Port, count: int) -> NDArray[Any]:
    if port.masks:
        tokens = port.shape[0]
        lengths = [max(1, tokens - row * tokens * (SHORTEST - 1) // (SHORTEST * count)) for row in range(count)]
        return _masks(port, lengths)
    if port.dtype != "int64":
        return np.stack([_numbers(network, port, row) for row in range(count)])
    excluded = network.null.get(port.name, port.size - 1)
    values = np.array([value for value in range(port.size) if value != excluded] or [0], np.int64)
    if port.shape:
        return values[np.stack([_integers(network, port, row, len(values)) for row in range(count)])]
    return values[(2 * np.arange(count) + 1) * len(values) // (2 * count)]


def _null(network: Network, port: Port) -> NDArray[Any]:
    constant = network.null.get(port.name)
    if constant is not None:
        return np.full((1, *port.shape), constant, port.dtype)
    if port.masks:
        return _masks(port, [max(1, port.shape[0] // SHORTEST)])
    if port.dtype != "int64":
        return _numbers(network, port, NULL)[None]
    if port.shape:
        return _integers(network, port, NULL, port.size)[None]
    return np.array([port.size - 1])


def _masks(port: Port, lengths: list[int]) -> NDArray[Any]:
    return (np.arange(port.shape[0]) < np.array(lengths)[:, None]).astype(port.dtype)


def _stream(network: Network, port: Port, row: int) -> Noise:
    """A stream of its own for each port and row, so that ports of one shape differ."""
    return Noise(row + (network.conditions.index(port) << 16))


def _numbers(network: Network, port: Port, row: int) -> NDArray[np.float32]:
    if port.name == network.guidance_port:
        (bits,) = _stream(network, port, row).bits(1)
        return np.array(1 + bits % (7 * 16 + 1) / 16, np.float32)
    return _stream(network, port, row).normal(port.shape).astype(np.float16).astype(np.float32)


def _integers(network: Network, port: Port, row: int, size: int) -> NDArray[np.int64]:
    bits = _stream(network, port, row).bits(math.prod(port.shape))
    return (bits % size).astype(np.int64).reshape(port.shape)
