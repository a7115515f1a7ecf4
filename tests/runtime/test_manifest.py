"""Format 2: what a manifest may say, what it refuses in one line, and the schema that says the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dit_runtime import BundleError
from dit_runtime.bundle import manifest, records
from dit_runtime.bundle.parsing import parse
from dit_runtime.cli import main
from dit_runtime.facts import FACTS

KINDS = ("labels", "pictured", "captioned", "wave", "video", "free", "prompted", "embedded", "sizes")
SCHEMA = json.loads((Path(__file__).parents[2] / "runtime/manifest.schema.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, kind: isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "boolean"),
    "const": lambda value, only: value == only,
    "enum": lambda value, known: value in known,
    "anyOf": lambda value, parts: any(fits(value, part) for part in parts),
    "$ref": lambda value, name: fits(value, SCHEMA["$defs"][name.removeprefix("#/$defs/")]),
    "minimum": lambda value, least: value >= least,
    "maximum": lambda value, most: value <= most,
    "maxItems": lambda value, most: len(value) <= most,
    "maxProperties": lambda value, most: len(value) <= most,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minLength": lambda value, least: len(value) >= least,
    "minItems": lambda value, least: len(value) >= least,
    "items": lambda value, part: all(fits(inner, part) for inner in value),
    "required": lambda value, names: value.keys() >= {*names},
    "properties": lambda value, parts: all(fits(value[key], part) for key, part in parts.items() if key in value),
}
WORDS = ("description", "title", "$schema", "$defs", "additionalProperties")


def fits(value: Any, schema: dict) -> bool:
    """The part of JSON Schema that ours uses; a keyword that is not known fails the test."""
    if not all(CHECKS[key](value, part) for key, part in schema.items() if key not in WORDS):
        return False
    rest = schema.get("additionalProperties", {})
    others = value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ()
    return all(rest is not False and fits(value[key], rest) for key in others)


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / manifest.NAME).read_text())


def changed(good: dict, place: tuple, value: Any) -> dict:
    bad = copy.deepcopy(good)
    inner = bad
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return bad


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_is_written(handmade, tmp_path, kind) -> None:
    contract = manifest.read(handmade(kind))
    assert parse(json.loads(contract.to_json())) == contract
    assert fits(json.loads(contract.to_json()), SCHEMA)


def test_the_schema_has_every_field_and_word() -> None:
    for record, part in (
        (records.Manifest, SCHEMA),
        (records.Port, SCHEMA["$defs"]["port"]),
        (records.Size, SCHEMA["$defs"]["of_a_size"]),
        (records.Stage, SCHEMA["$defs"]["stage"]),
        (records.TensorSpec, SCHEMA["$defs"]["tensor"]),
        (records.Prompt, SCHEMA["$defs"]["prompt"]),
        (records.Guidance, SCHEMA["properties"]["guidance"]),
        (records.File, SCHEMA["properties"]["files"]["additionalProperties"]),
    ):
        assert {field.name for field in fields(record)} == part["properties"].keys()
    port, stage = SCHEMA["$defs"]["port"]["properties"], SCHEMA["$defs"]["stage"]["properties"]
    assert tuple(port["role"]["enum"]) == records.ROLES and tuple(stage["runs"]["enum"]) == records.RUNS
    assert tuple(SCHEMA["$defs"]["dtype"]["enum"]) == records.DTYPES
    assert SCHEMA["properties"]["format"]["const"] == records.FORMAT


def test_what_a_manifest_says(handmade) -> None:
    labels, captioned, wave = (manifest.read(handmade(kind)) for kind in ("labels", "captioned", "wave"))
    assert (labels.state.name, labels.time.name, labels.classes, labels.without_null) == ("latents", "timesteps", 5, ())
    assert (labels.step.name, labels.update.name, labels.end.name) == ("denoiser", "update", "decoder")
    assert [spec.name for spec in labels.step.grouped] == ["conditioning"]
    assert (captioned.classes, captioned.without_null, captioned.update) == (0, ("captions",), None)
    assert [stage.runs for stage in wave.before_loop] == ["condition", "condition", "time", "time+condition"]
    assert wave.end is None and wave.mixes_guidance and not manifest.read(handmade("free")).mixes_guidance
    assert manifest.read(handmade("video")).classes == 3  # without names


STEP, BEFORE = ("stages", 1), ("stages", 0)
TIME = {"name": "timesteps", "dtype": "float32", "shape": ["rows"]}


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("ports", 0, "shape"), [], "port latents: got float32 [], expected float32 of rank 1 or more"),
        (("ports", 0, "role"), "condition", "state ports: got [], expected exactly one"),
        (("ports", 0, "dtype"), "float16", "dtype: got float16, expected one of float32, int64"),
        (("ports", 0, "shape", 1), 0, "shape: got [2, 0, 4], expected sizes of 1 to 16777216"),
        (("ports", 1, "shape"), [2], "port timesteps: got float32 [2], expected float32 of rank 0"),
        (("ports", 0, "shape", 1), 1 << 25, "expected sizes of 1 to 16777216"),
        (("ports", 0, "shape"), [1] * 9, "got [1, 1, 1, 1, 1, 1, 1, 1, 1] a row, expected at most 1073741824"),
        (("ports", 0, "shape"), [2, 1 << 24, 64], "a row, expected at most 1073741824 numbers in 8 dimensions"),
        (("ports", 0, "shape"), [5, 1 << 24], "port 0 (latents): got [5, 16777216] a row, expected at most 268435456"),
        (("ports", 2, "shape"), [3, 1 << 24], "port 2 (labels): got [3, 16777216] a row, expected at most 268435456"),
        (("ports", 2, "size"), 0, "size: got 0, expected 1 to 16777216 values"),
        (("ports", 2, "size"), 1 << 25, "size: got 33554432, expected 1 to 16777216 values"),
        (("ports", 0, "size"), 3, "size: got 3, expected 0, for it is float32"),
        (("ports", 1, "name"), "latents", "port or tensor 'latents' stands there 2 times, expected once"),
        (("ports", 2, "masks"), "latents", "masks 'latents', expected a condition port"),
        (("ports", 2, "picture"), True, "port of a picture: labels: got condition int64 [], expected a condition"),
        (("ports", 0, "picture"), True, "port of a picture: latents: got state float32 [2, 4, 4], expected"),
        (("ports", 2, "colour"), "red", "unknown key 'colour'; known: name, role"),
        (("null",), {"captions": 0.0}, "null: got captions, expected one of the condition ports labels"),
        (("null", "labels"), 6, "null: labels: got 6, expected 0 to 5"),
        (("null", "labels"), 2, "null: labels: got 2, expected 5, after all classes"),
        (("null", "labels"), 5.0, "null: labels: got 5.0, expected a number of int64"),
        (("null", "labels"), 10**400, "expected a number of int64"),
        (("labels",), ["ant"], "labels: got 1 names, expected 5"),
        (("guidance", "channels"), 3, "guidance: channels: got 3, expected 1 to 2"),
        (("guidance",), None, "guidance: got None, expected a table of channels"),
        (("guidance", "default"), "4", "guidance: default: got 4, expected a number of float32"),
        (("guidance", "default"), 1e39, "guidance: default: got 1e+39, expected a number of float32"),
        (("guidance", "port"), "labels", "guidance: port: got labels, expected a condition port of float32 []"),
        (("guidance", "port"), 0, "guidance: port: got 0, expected str"),
        (("process", "sampler", "steps"), 0, "steps is 0; expected an integer from 1 to 16777216"),
        (("process", "sampler", "steps"), 4.0, "steps is 4.0; expected an integer"),
        (("stages",), None, "manifest: stages: got None, expected a list"),
        (("process",), None, "manifest lacks 'process'"),
        (("process", "train_steps"), 1 << 25, "train_steps is 33554432; expected an integer from 2 to 16777216"),
        (("process", "sampler", "steps_offset"), 1 << 25, "expected an integer from 0 to 16777216"),
        (("process", "beta_start"), 10**400, "expected a finite number"),
        (("process", "beta_end"), 0.999999, "the betas leave no signal at the last step"),
        (("process", "beta_start"), 1e-17, "process: the betas add no noise at the first step"),
        (("ports", 2, "name"), "previous", "a port is called 'previous', as a tensor of a bundle's stages"),
        (("files",), None, "manifest lacks 'files'"),
        (("files", "denoiser.onnx", "size"), -1, "files: denoiser.onnx: size: got -1, expected 0 or more"),
        ((*STEP, "runs"), "loop", "runs: got loop, expected one of prompt, condition, time"),
        ((*STEP, "runs"), "end", "stages that run 'step': got [], expected one"),
        ((*STEP, "name"), "conditioner", "stage 'conditioner' stands there 2 times"),
        ((*STEP, "max_batch"), 0, "max_batch: got 0, expected 1 to 16777216"),
        ((*STEP, "max_batch"), 1 << 25, "max_batch: got 33554432, expected 1 to 16777216"),
        ((*STEP, "max_batch"), True, "max_batch: got True, expected int"),
        ((*STEP, "engines"), {"openvino": []}, "engines of openvino: got [], expected a list of files"),
        ((*STEP, "onnx"), "other.onnx", "other.onnx has no size and sha256 under files"),
        ((*STEP, "reads", 0, "shape", 1), 3, "latents is: got float32 ['batch', 3, 4, 4], expected"),
        ((*STEP, "reads", 1, "shape", 0), "batch", "expected float32 ['groups', 'batch', 2, 8]"),
        ((*STEP, "reads", 1, "name"), "context", "reads: got context, expected one of timesteps, labels, conditioning"),
        ((*STEP, "reads", 2, "shape"), ["rows"], "guidance is: got float32 ['rows'], expected float32 ['batch']"),
        ((*STEP, "gives", 0, "name"), "epsilon", "gives: got ['epsilon', 'variance'], expected prediction"),
        ((*BEFORE, "runs"), "condition", "(runs 'condition') reads: got timesteps, expected one of labels"),
        ((*BEFORE, "runs"), "time", "(runs 'time') reads: got labels, expected one of timesteps"),
        ((*BEFORE, "reads", 1, "dtype"), "float32", "labels is: got float32 ['rows'], expected int64 ['rows']"),
        ((*BEFORE, "reads"), [TIME, TIME], "input of stage conditioner 'timesteps' stands there 2 times"),
        ((*BEFORE, "gives", 0, "shape"), ["rows", "n"], "conditioning has the shape: got ['rows', 'n']"),
        ((*BEFORE, "gives", 0, "dtype"), "int64", "conditioning is: got int64 ['rows', 2, 8], expected float32"),
        ((*BEFORE, "gives", 0, "name"), "", "name: got '', expected a name"),
        ((*BEFORE, "gives", 0, "shape"), ["rows", *[1] * 9], "a row, expected at most 1073741824 numbers"),
        ((*BEFORE, "gives", 0, "name"), "guidance", "port or tensor 'guidance' stands there 2 times"),
        (("stages", 2, "gives", 0, "name"), "before", "stage update gives: got before, next, expected kept, next"),
        (("stages", 3, "gives", 0, "shape", 1), 4, 'expected ["batch", 3, height, width]'),
        (("stages", 3, "gives", 0, "shape"), ["batch", 3, 1, 2, 4, 4], "height, width], or frames before the height"),
        (("batch_invariant",), 1, "batch_invariant: got 1, expected bool"),
        (("presets",), [], "presets: got [], expected a table"),
        (("presets", "quick"), 3, "preset quick: got 3, expected a table of steps, "),
        (("presets", ""), {}, "presets: got '', expected a name"),
        (("presets", "quick", "step"), 3, "unknown key 'step' (did you mean \"steps\"?); known: steps, "),
        (("presets", "quick", "steps"), 3.0, "preset quick: steps: got 3.0, expected 1 to 1000"),
        (("presets", "quick", "steps"), 1001, "preset quick: steps: got 1001, expected 1 to 1000"),
        (("presets", "quick", "guidance"), 1e39, "preset quick: guidance: got 1e+39, expected a number of float32"),
        (("presets", "quick", "solver"), "euler", "preset quick: solver: got euler, expected one of ddpm, ddim"),
        (("presets", "quick", "spacing"), ["even"], "preset quick: spacing: got ['even'], expected a text"),
        (("presets", "quick", "guidance_interval"), [0.7, 0.2], "[0.7, 0.2], expected two numbers from 0 to 1"),
        (("presets", "quick", "guidance_interval"), [0, 1, 1], "[0, 1, 1], expected two numbers from 0 to 1"),
        (("presets", "quick", "cache"), "tailor", "preset quick: cache: got tailor, expected one of taylorseer"),
        (("presets", "quick", "max_order"), 1.0, "max_order: got 1.0, expected an integer up to 16777216"),
        (("presets", "quick", "measured"), 6, "preset quick: measured: got 6, expected a table"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_in_one_line(bundle, place, value, words) -> None:
    path = bundle / manifest.NAME
    path.write_text(json.dumps(changed(table(bundle), place, value)))
    with pytest.raises(BundleError) as error:
        manifest.read(bundle)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("format",), 1),
        (("ports", 0, "role"), "image"),
        (("ports", 0, "shape"), [1] * 9),
        (("ports", 0, "shape", 1), 1 << 25),
        (("ports", 2, "size"), 1 << 25),
        (("null", "labels"), 1e39),
        (("guidance", "default"), 1e39),
        (("process", "sampler", "steps"), 0),
        (("stages", 1, "runs"), "once"),
        (("stages", 1, "max_batch"), 1 << 25),
        (("stages", 0, "gives", 0, "dtype"), "int64"),
        (("stages", 0, "gives", 0, "name"), ""),
        (("process", "train_steps"), 1 << 25),
        (("process", "sampler", "steps_offset"), 1 << 25),
        (("presets", "quick", "step"), 3),
        (("presets", "quick", "measured"), 6),
        (("files",), None),
        (("colour",), "red"),
    ],
    ids=str,
)
def test_the_schema_refuses_too(handmade, place, value) -> None:
    assert not fits(changed(table(handmade("labels")), place, value), SCHEMA)


def test_a_video_may_be_as_large_as_published(handmade) -> None:
    """LTX-Video's longest is of 257 frames."""
    longest = ["batch", 3, 257, 704, 1216]
    good = table(handmade("labels"))
    place = "stages", [stage["runs"] for stage in good["stages"]].index("end"), "gives", 0, "shape"
    parsed = parse(changed(good, place, longest))
    assert parsed.end is not None and list(parsed.end.gives[0].shape) == longest


def test_masks_belong_to_tokens(copied) -> None:
    folder = copied("captioned")
    good = table(folder)
    for place, value, words in (
        (("ports", 3, "masks"), "mask", "masks 'mask', expected a condition port that has tokens and is no mask"),
        (("ports", 3, "shape"), [4], "port mask: shape: got [4], expected [5]"),
        (("ports", 3), good["ports"][3] | {"dtype": "int64", "size": 1}, "port mask: size: got 1, expected 2 or more"),
    ):
        with pytest.raises(ValueError, match="port mask") as error:
            parse(changed(good, place, value))
        assert words in str(error.value)


def test_one_port_at_most_takes_a_picture(handmade) -> None:
    twice = table(handmade("wave"))
    for port in twice["ports"][2], twice["ports"][4]:
        port["picture"] = True
    with pytest.raises(ValueError, match=r"ports of a picture: got \['words', 'pooled'\], expected one at most"):
        parse(twice)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("words", 1e300, "null: words: got 1e+300, expected a number of float32"),
        ("words", 10**400, "expected a number of float32"),
        ("words_mask", 0, "null: words_mask: got 0, expected 1, for it is a mask"),
    ],
    ids=str,
)
def test_a_constant_is_one_that_a_guided_request_takes(handmade, name, value, words) -> None:
    good = table(handmade("wave"))
    parse(changed(good, ("null", "words_mask"), 1))
    with pytest.raises(ValueError, match="null") as error:
        parse(changed(good, ("null", name), value))
    assert words in str(error.value)


def test_the_schema_has_the_limits_of_the_facts() -> None:
    parts, limits = SCHEMA["$defs"], FACTS["limits"]
    assert parts["size"]["maximum"] == parts["port"]["properties"]["size"]["maximum"] == limits["size"]
    assert parts["stage"]["properties"]["max_batch"]["maximum"] == limits["size"]
    assert parts["steps"]["maximum"] == limits["steps"]
    assert parts["noise"]["properties"]["sampler"]["properties"]["steps_offset"]["maximum"] == limits["steps"]
    rank, free = parts["port"]["properties"]["shape"]["maxItems"], 2  # "groups" and "batch"
    assert rank == limits["rank"] == parts["tensor"]["properties"]["shape"]["maxItems"] - free
    for words in ("row", "port_bytes", "classes", "bundle_bytes", "manifest_bytes"):
        assert f"at most {limits[words]}" in SCHEMA["description"]
    tables = (SCHEMA["properties"], parts["of_a_size"]["properties"], parts["stage"]["properties"])
    counted = {key: part for table in tables for key, part in table.items() if part.get("type") in ("array", "object")}
    most = {key: part.get("maxItems", part.get("maxProperties")) for key, part in counted.items()}
    assert {key: count for key, count in most.items() if count} == {key: limits[key] for key in most if key in limits}


def test_a_stage_reads_only_what_is_earlier(copied) -> None:
    folder = copied("wave")
    stages = table(folder)["stages"]
    with pytest.raises(ValueError, match=r"stage summary .* got context, expected one of words, words_mask, pooled"):
        parse(table(folder) | {"stages": [stages[1], stages[0], *stages[2:]]})
    stages[1]["reads"][0]["name"] = "modulation"  # what changes with time
    with pytest.raises(ValueError, match="stage summary"):
        parse(table(folder) | {"stages": [stages[2], *stages[:2], *stages[3:]]})


def test_format_1_names_the_command(bundle, capsys) -> None:
    path = bundle / manifest.NAME
    path.write_text(json.dumps({"format": 1, "graphs": {}}))
    assert main(["info", str(bundle)]) == 2
    assert "format 1, expected 2: rebuild it with `dit-export build`" in capsys.readouterr().err
