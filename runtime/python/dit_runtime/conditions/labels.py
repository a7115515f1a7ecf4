"""Class numbers of the names and numbers that users write."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dit_runtime.errors import UsageError, nearest
from dit_runtime.sampling.process import is_integer


def class_number(label: str | int, known: Sequence[str], count: int) -> int:
    """Return the class of a name ("golden retriever", one of its synonyms, or "207"), or of a number."""
    if isinstance(label, str) and not re.fullmatch("-?[0-9]+", label):
        names: dict[str, int] = {}
        for number, name in enumerate(known):  # whole names win over synonyms of others
            names.setdefault(name.strip().lower(), number)
        for number, name in enumerate(known):
            for synonym in name.split(","):
                names.setdefault(synonym.strip().lower(), number)
        if label.strip().lower() not in names:
            if not names:
                raise UsageError(f"class {label!r} is not known: this bundle has no names, only 0 to {count - 1}")
            some = ", ".join([name.partition(",")[0] for name in known[:3]] + ["…"] * (len(known) > 3))
            raise UsageError(f"class {label!r} is not known{nearest(label, names)}; the bundle has {some}")
        return names[label.strip().lower()]
    if not isinstance(label, str) and not is_integer(label):
        raise UsageError(f"label {label!r} is no class; expected a name, or a number from 0 to {count - 1}")
    number = 2**63 - 1 if isinstance(label, str) and len(label) > 18 else int(label)  # which refuses 4300 digits
    if not 0 <= number < count:
        raise UsageError(f"label {number} is out of range; expected 0 to {count - 1}")
    return number
