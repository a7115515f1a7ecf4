"""The body of a request for images, checked before anything is drawn."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NoReturn

from dit_runtime.errors import nearest
from dit_serve.faults import Fault
from dit_serve.form import Part

OUTPUTS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
FORMS = ("b64_json", "bytes")
MOST_WORDS = 8000  # characters of a prompt
MOST_SEED = 2**63
FILES = ("image", "mask")
OF_FILES = ("files", "start")
NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")
KINDS = {"n": int, "seed": int, "num_inference_steps": int, "guidance_scale": float, "strength": float}


@dataclass(frozen=True)
class Limits:
    images: int = 8
    steps: int = 250
    pixels: int = 2**24  # of all images of a request
    body: int = 64 << 10  # bytes
    form: int = 12 << 20  # bytes of a body with pictures


@dataclass(frozen=True)
class Body:
    """Names and meanings are those of OpenAI's API, and of the extensions that image servers have in common."""

    prompt: str
    model: str | None = None
    n: int = 1
    size: str | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    solver: str | None = None
    preset: str | None = None
    response_format: str = "b64_json"
    output_format: str = "png"
    previews: int = 0  # of a job, for each image
    user: str | None = None  # taken and not used, as in other servers
    strength: float | None = None  # of an edit
    files: Mapping[str, bytes] = field(default_factory=dict)  # of an edit: image, mask
    start: Mapping[str, Any] = field(default_factory=dict)  # what they hold, as fields of the runtime's request

    @property
    def seeds(self) -> list[int]:
        """Return each image's: they follow one another."""
        first = secrets.randbits(32) if self.seed is None else self.seed
        return [first + number for number in range(self.n)]


def parse(content: bytes, limits: Limits) -> Body:
    """Return a body's fields; raise Fault(400) where one is unknown, missing, or not of its type and range."""
    return _check(_object(content), limits, hidden=("strength", *OF_FILES))


def parse_edit(parts: Iterable[Part], limits: Limits) -> Body:
    """Return the fields of a form's parts, where numbers are text."""
    table: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, content in parts:
        if name in table or name in files:
            raise Fault(400, f"{name} stands in the body twice; expected once", name if name in FILES else None)
        if name in FILES:
            files[name] = content
        else:
            table[name] = _number(name, content)
    if "image" not in files:
        raise Fault(400, "image is missing", "image")
    if "previews" in table:
        raise Fault(400, "an edit has no previews", "previews")
    return replace(_check(table, limits, hidden=OF_FILES), files=files)


def _number(name: str, content: bytes) -> Any:
    """Return what a field of this name has as text; what is no number stays text, for its check."""
    text = content.decode("utf-8", "replace")
    kind = KINDS.get(name, str)
    try:
        return kind(text) if NUMBER.fullmatch(text) else text
    except ValueError:
        return text


def _object(content: bytes) -> dict[str, Any]:
    try:
        table = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Fault(400, "the body is not JSON") from None
    if not isinstance(table, dict):
        raise Fault(400, "the body is not a JSON object")
    return table


def _check(table: Mapping[str, Any], limits: Limits, hidden: Collection[str]) -> Body:
    known = {entry.name: entry for entry in fields(Body) if entry.name not in hidden}
    values = {name: value for name, value in table.items() if value is not None}
    for name in values:
        if name not in known:
            close = nearest(name, known) if len(name) < 40 else ""
            raise Fault(400, f"the body has a field that is not known{close}; known: {', '.join(known)}")
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise Fault(400, f"{name} is missing", name)
    checks: dict[str, Callable[[Any], bool]] = {
        "prompt": lambda value: isinstance(value, str) and len(value) <= MOST_WORDS,
        "model": lambda value: isinstance(value, str),
        "n": lambda value: _integer(value, 1, limits.images),
        "size": lambda value: isinstance(value, str),
        "seed": lambda value: _integer(value, 0, MOST_SEED),
        "num_inference_steps": lambda value: _integer(value, 1, limits.steps),
        "guidance_scale": lambda value: type(value) in (int, float) and 0 <= value <= 100,
        "negative_prompt": lambda value: isinstance(value, str) and len(value) <= MOST_WORDS,
        "solver": lambda value: isinstance(value, str),
        "preset": lambda value: isinstance(value, str),
        "response_format": FORMS.__contains__,
        "output_format": OUTPUTS.__contains__,
        "previews": lambda value: _integer(value, 0, 4),
        "user": lambda value: isinstance(value, str),
        "strength": lambda value: type(value) in (int, float) and 0 < value <= 1,
    }
    expected = {
        "prompt": f"a string of at most {MOST_WORDS} characters",
        "n": f"an integer from 1 to {limits.images}",
        "seed": f"an integer from 0 to {MOST_SEED}",
        "num_inference_steps": f"an integer from 1 to {limits.steps}",
        "guidance_scale": "a number from 0 to 100",
        "response_format": " or ".join(FORMS),
        "output_format": ", ".join(OUTPUTS),
        "previews": "an integer from 0 to 4",
        "strength": "a number above 0, up to 1",
    }
    for name, value in values.items():
        if not (isinstance(value, str | int | float) and checks[name](value)):
            raise Fault(400, f"{name} must be {expected.get(name, 'a string')}", name)
    body = Body(**values)
    if body.response_format == "bytes" and body.n != 1:
        raise Fault(400, "response_format bytes has one image: n must be 1", "n")
    return body


def _integer(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
