"""The gate's figures as JUnit XML, as CI systems read it: a suite a stage, a case a figure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from dit_export.verify.metrics import sentence
from dit_runtime.verify import Figure


def xml(name: str, figures: Sequence[Figure], located: Sequence[str]) -> str:
    root = ElementTree.Element("testsuites", _counts(figures) | {"name": name})
    for stage in dict.fromkeys(figure.stage for figure in figures):
        same = [figure for figure in figures if figure.stage == stage]
        suite = ElementTree.SubElement(root, "testsuite", _counts(same) | {"name": stage})
        numbers: dict[str, int] = {}
        for figure in same:  # a case has the same name in every run, so that CI can follow it
            numbers[figure.metric] = number = numbers.get(figure.metric, 0) + 1
            place = f"number {number}" if figure.step is None else f"step {figure.step}"
            title = f"{figure.metric}, {place}"
            case = ElementTree.SubElement(suite, "testcase", {"classname": f"{name}.{stage}", "name": title})
            if figure.passed:
                ElementTree.SubElement(case, "system-out").text = sentence(figure)
            else:
                failure = ElementTree.SubElement(case, "failure", {"message": sentence(figure), "type": "regression"})
                failure.text = "\n".join([sentence(figure), *located])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(figures: Sequence[Figure]) -> dict[str, str]:
    failed = sum(not figure.passed for figure in figures)
    return {"tests": str(len(figures)), "failures": str(failed), "errors": "0", "skipped": "0"}
