"""The gate's figures as JUnit XML, as CI systems read it: a suite a graph, a case a figure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from dit_export.verify.metrics import Metric


def xml(name: str, metrics: Sequence[Metric], located: Sequence[str]) -> str:
    root = ElementTree.Element("testsuites", _counts(metrics) | {"name": name})
    for graph in dict.fromkeys(metric.graph for metric in metrics):
        same = [metric for metric in metrics if metric.graph == graph]
        suite = ElementTree.SubElement(root, "testsuite", _counts(same) | {"name": graph})
        seen: dict[str, int] = {}
        for metric in same:  # a case has the same name in every run, so that CI can follow it
            seen[metric.title] = number = seen.get(metric.title, 0) + 1
            title = f"{metric.title}, {'number' if metric.step is None else 'step'} {number}"
            case = ElementTree.SubElement(suite, "testcase", {"classname": f"{name}.{graph}", "name": title})
            if metric.passed:
                ElementTree.SubElement(case, "system-out").text = str(metric)
            else:
                failure = ElementTree.SubElement(case, "failure", {"message": str(metric), "type": "regression"})
                failure.text = "\n".join([str(metric), *located])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(metrics: Sequence[Metric]) -> dict[str, str]:
    failed = sum(not metric.passed for metric in metrics)
    return {"tests": str(len(metrics)), "failures": str(failed), "errors": "0", "skipped": "0"}
