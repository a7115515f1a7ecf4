"""docs/benchmarks.md and its chart are in step with the committed results."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from dit_export.bench import history
from dit_runtime.errors import UsageError

DOCS = Path(__file__).parents[2] / "docs"
CIRCLE = "{http://www.w3.org/2000/svg}circle"


def test_the_page_and_the_chart_are_those_of_the_results() -> None:
    results = history.read(DOCS / "benchmarks")
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert text == history.page(text, results), "run: make benchmarks"
    assert (DOCS / "benchmarks.svg").read_text(encoding="utf-8") == history.svg(results), "run: make benchmarks"


def test_a_result_without_a_place_is_refused() -> None:
    results = history.read(DOCS / "benchmarks")
    results["2026-12-01-s-2.json"] = results["2026-11-22-s-2.json"]
    with pytest.raises(UsageError, match=r"the folder has .*2026-12-01-s-2.json"):
        history.page((DOCS / "benchmarks.md").read_text(encoding="utf-8"), results)


def test_a_chart_has_a_point_a_form_and_day(tmp_path: Path) -> None:
    """Results that have a note give none; a day's last result replaces the others."""
    first = json.loads((DOCS / "benchmarks/2026-11-28-xl-2.json").read_text(encoding="utf-8"))
    later = copy.deepcopy(first) | {"date": "2026-12-05"}
    later["rows"] = [row for row in later["rows"] if row["name"] == "ours-openvino-int8"]
    noted = later | {"date": "2026-12-06", "note": "with other settings"}
    for name, result in (("a", first), ("b", later), ("c", later), ("d", noted)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    drawn = ET.fromstring(history.svg(history.read(tmp_path)))
    ours = [row for row in first["rows"] if row["kind"] == "ours"]
    assert len([*drawn.iter(CIRCLE)]) == len(ours) + 1
    days = [element.text for element in drawn.iter() if element.text in ("28 Nov", "05 Dec", "06 Dec")]
    assert days == ["28 Nov", "05 Dec"]
