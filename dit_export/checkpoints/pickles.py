"""Refuse pickles of weights that PyTorch's restricted reader would hash or show without end.

Sixty tuples of two references each have 2^60 parts. Python hashes all of them where such a tuple is a key, and shows
all of them in an error message. The opcodes say how large a tuple is before it exists.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

PARTS = 10_000  # of a tuple, tuples in it included
OPCODES = 1 << 20  # 60 a tensor is usual
LEGACY = 5  # pickles at the start of a file that is no zip
GLOBAL = 0  # in the place of a value's parts: a class or a function
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def require_bounded(path: Path) -> None:
    """Raise UnpicklingError, or what else reading a damaged file raises."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith("data.pkl"):
                    with archive.open(member) as stream:
                        _require_bounded(stream)
    else:
        with path.open("rb") as file:
            for _ in range(LEGACY):
                if file.peek(1):
                    _require_bounded(file)


def _require_bounded(stream: IO[bytes]) -> None:
    stack: list[int] = []  # the parts of each value
    outer: list[list[int]] = []  # the stacks below each mark
    memo: dict[Any, int] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number == OPCODES:
            raise UnpicklingError(f"more than {OPCODES} opcodes")
        name, before = opcode.name, opcode.stack_before
        if name == "MARK":
            outer.append(stack)
            stack = []
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        else:
            operands: list[int] = []
            if pickletools.markobject in before:
                operands, stack = stack, outer.pop()
                before = before[: before.index(pickletools.markobject)]
            if before:
                operands = stack[-len(before) :] + operands
                del stack[-len(before) :]
            if name in ("REDUCE", "NEWOBJ") and operands[0] != GLOBAL:
                raise UnpicklingError("calls what is no class and no function")
            parts = 1
            if name in TUPLES:
                parts += sum(max(1, operand) for operand in operands)
                if parts > PARTS:
                    raise UnpicklingError(f"a tuple of more than {PARTS} parts")
            stack += [GLOBAL if name == "GLOBAL" else parts for _ in opcode.stack_after]
