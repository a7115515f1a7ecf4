"""A body of multipart/form-data (RFC 7578), as OpenAI's clients send pictures; its size was checked before."""

from __future__ import annotations

import re
from typing import NamedTuple

from dit_serve.faults import Fault

MOST_PARTS = 32
MOST_HEAD = 1024  # bytes of a part's headers
BOUNDARY = re.compile(r'multipart/form-data *;(?:.*;)? *boundary=(?:"([^"\\]{1,70})"|([^\s";]{1,70})) *(?:;.*)?', re.I)
NAME = re.compile(
    rb'^content-disposition *: *form-data *;(?:[^"\r\n]|"[^"\r\n]*")*?\bname="([a-z_]{1,40})(\[\])?" *(?:;|\r|$)',
    re.I | re.M,
)


class Part(NamedTuple):
    name: str  # without the [] of a list's
    content: bytes


def parse_form(kind: str, content: bytes) -> list[Part]:
    """Return the parts of a body whose Content-Type is `kind`; raise Fault(400) where it is damaged."""
    match = BOUNDARY.fullmatch(kind.strip())
    if match is None:
        raise Fault(400, "the body has no boundary in its Content-Type")
    delimiter = b"\r\n--" + (match[1] or match[2]).encode("latin-1")
    whole = b"\r\n" + content
    if whole.count(delimiter) > MOST_PARTS + 1:
        raise Fault(400, f"the body has more than {MOST_PARTS} parts")
    before, *sections = whole.split(delimiter)
    if before or not sections or not sections[-1].startswith(b"--"):
        raise Fault(400, "the body is not multipart/form-data, or was cut")
    return [_part(section) for section in sections[:-1]]


def _part(section: bytes) -> Part:
    head, blank, content = section.partition(b"\r\n\r\n")
    match = NAME.search(head) if len(head) <= MOST_HEAD else None
    if not (head.startswith(b"\r\n") and blank and match):
        raise Fault(400, "a part of the body has no name that is known")
    return Part(match[1].decode("latin-1"), content)
