"""The README's table says of each precision of each backend where it has run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dit_runtime.facts import FACTS

README = Path(__file__).parents[2] / "README.md"
DOCS = README.with_name("docs")
STATES = r"runs in CI|run on a GPU on \d{4}-\d\d-\d\d|compiled in CI, never executed|never executed"


def table(text: str) -> dict[tuple[str, str], set[str]]:
    """Return the states of each backend and precision; a backend has a row for each kind of device."""
    states: dict[tuple[str, str], set[str]] = {}
    section = text.partition("\n| backend | precisions | state |\n")[2].partition("\n\n")[0]
    row = re.compile(r"^\| `([\w-]+)`[^|]* \| ([\w, ]+) \| (.+) \|$", re.MULTILINE)
    for backend, precisions, state in row.findall(section):
        for precision in precisions.split(", "):
            states.setdefault((backend, precision), set()).add(state)
    return states


def gaps(text: str) -> set[tuple[str, str]]:
    """Return each backend and precision of which the table has no state, or that it should not have."""
    known = {(backend, precision) for backend, precisions in FACTS["precisions"].items() for precision in precisions}
    stated = {pair for pair, states in table(text).items() if all(re.match(STATES, state) for state in states)}
    return known ^ stated


def of_gpus(text: str) -> list[str]:
    """Return the table's rows that say whether a GPU has executed them."""
    section = text.partition("\n| backend | precisions | state |\n")[2].partition("\n\n")[0]
    return [row for row in section.splitlines() if re.search("never executed|run on a GPU", row)]


@pytest.mark.parametrize("page", ["tensorrt.md", "gpu.md"])
def test_the_guides_say_it_in_the_same_words(page: str) -> None:
    rows = of_gpus(README.read_text(encoding="utf-8"))
    assert len(rows) == 3 and of_gpus((DOCS / page).read_text(encoding="utf-8")) == rows


def test_each_precision_of_each_backend_has_a_state() -> None:
    assert gaps(README.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("old", "new"), [(", fp8", ""), ("bf16, int8 | runs in CI", "bf16, fp4 | runs in CI"), ("runs in CI", "works")]
)
def test_a_table_with_a_gap_is_seen(old: str, new: str) -> None:
    assert gaps(README.read_text(encoding="utf-8").replace(old, new)) != set()
