"""Prompts: words to ids, ids to conditions, once a prompt; and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dit_runtime import BundleError, Pipeline, Request, UsageError
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Prompt, Stage, TensorSpec
from dit_runtime.bundle.parsing import parse
from dit_runtime.cli import main
from dit_runtime.conditions.text import PromptMemo

WORDS = ["<pad>", "<end>", "<user>", "a", "red", "cat", "on", "the", "roof", "no"]
SHORT, LONG, WIDTH = 5, 8, 3  # tokens of the two tokenizers, and numbers a token
ROOF = "a red cat on the roof"  # six words: cut by the first tokenizer, whole in the second
PROMPTS = (
    Prompt("ids", SHORT, len(WORDS), "ids.json", mask="ids_mask", template="<user> {}", negative="{}", lowercase=True),
    Prompt("long_ids", LONG, len(WORDS), "long_ids.json"),
)


def save_tokenizer(path: Path, tokens: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<end>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=tokens)
    tokenizer.save(str(path))


def save_graph(path: Path) -> None:
    """captions = table[ids] + mean(other[long_ids]); mask = float(ids_mask)."""
    random = np.random.default_rng(1)
    tables = {name: random.standard_normal((len(WORDS), WIDTH)).astype(np.float32) for name in ("table", "other")}
    tables["tokens"] = np.array([1])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["own"]),
        helper.make_node("Gather", ["other", "long_ids"], ["all"]),
        helper.make_node("ReduceMean", ["all", "tokens"], ["mean"]),
        helper.make_node("Add", ["own", "mean"], ["captions"]),
        helper.make_node("Cast", ["ids_mask"], ["mask"], to=TensorProto.FLOAT),
    ]
    integers, floats = TensorProto.INT64, TensorProto.FLOAT
    inputs = [("ids", SHORT), ("ids_mask", SHORT), ("long_ids", LONG)]
    graph = helper.make_graph(
        nodes,
        "prompt",
        [helper.make_tensor_value_info(name, integers, ["rows", tokens]) for name, tokens in inputs],
        [
            helper.make_tensor_value_info("captions", floats, ["rows", SHORT, WIDTH]),
            helper.make_tensor_value_info("mask", floats, ["rows", SHORT]),
        ],
        [numpy_helper.from_array(values, name) for name, values in tables.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


@pytest.fixture(scope="module")
def prompted(handmade, tmp_path_factory) -> Path:
    """The hand-made bundle of captions, with a prompt stage before its own."""
    folder = Path(shutil.copytree(handmade("captioned"), tmp_path_factory.mktemp("prompted") / "bundle"))
    for prompt in PROMPTS:
        save_tokenizer(folder / prompt.tokenizer, prompt.tokens)
    save_graph(folder / "prompt.onnx")
    (folder / "prompt.onnx.data").touch()
    reads = [TensorSpec(port.name, port.dtype, ("rows", *port.shape)) for prompt in PROMPTS for port in prompt.ports]
    gives = [TensorSpec("captions", "float32", ("rows", SHORT, WIDTH)), TensorSpec("mask", "float32", ("rows", SHORT))]
    stage = Stage("prompt", "prompt", tuple(reads), tuple(gives), "prompt.onnx", max_batch=2)
    contract = manifest.read(folder)
    files = manifest.describe_files(folder)
    manifest.write(folder, replace(contract, stages=(stage, *contract.stages), prompts=PROMPTS, files=files))
    return folder


@pytest.fixture
def pipe(prompted):
    with Pipeline.load(prompted, threads=1) as opened:
        yield opened


def draw(pipe: Pipeline, **options) -> np.ndarray:
    return pipe.sample(**{"steps": 3, "seed": 5, "output": "latents", "guidance": 3.0} | options)


def test_words_become_ids(pipe) -> None:
    """Around the words stands each prompt's template; one is lowered, one is not; a text is cut, or padded."""
    rows = pipe.engines.tokenizers(["  A Red CAT", ROOF])
    assert rows["ids"].tolist() == [[2, 3, 4, 5, 1], [2, 3, 4, 5, 1]]
    assert rows["long_ids"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8, 1, 0]]
    assert rows["ids_mask"].tolist() == [[1] * 5] * 2 and rows["ids_mask"].dtype == np.int64
    rows = pipe.engines.tokenizers("no", negative=True)
    assert rows["ids"].tolist() == [[9, 1, 0, 0, 0]] and rows["ids_mask"].tolist() == [[1, 1, 0, 0, 0]]
    assert pipe.engines.tokenizers("", negative=True)["ids"].tolist() == [[1, 0, 0, 0, 0]]


def test_a_prompt_is_its_ids(pipe) -> None:
    """Words, their ids and what the stage gives of these draw the same; no negative is the negative prompt ""."""
    expected = draw(pipe, prompt=["a cat", ROOF], negative_prompt="", seed=[5, 6])
    ids, away = pipe.engines.tokenizers(["a cat", ROOF]), pipe.engines.tokenizers([""], negative=True)
    np.testing.assert_array_equal(draw(pipe, prompt=["a cat", ROOF], seed=[5, 6]), expected)
    np.testing.assert_array_equal(draw(pipe, condition=ids, seed=[5, 6]), expected)
    np.testing.assert_array_equal(draw(pipe, condition=ids, negative=away, seed=[5, 6]), expected)
    captions = pipe.engines.encode(ids)
    assert captions.keys() == {"captions", "mask"}
    np.testing.assert_array_equal(draw(pipe, condition=captions, negative_prompt="", seed=[5, 6]), expected)
    negatives = ["no roof", ""]
    mixed = draw(pipe, prompt=["a cat", ROOF], negative_prompt=negatives, seed=[5, 6])
    assert np.array_equal(mixed[1], expected[1]) and not np.allclose(mixed[0], expected[0], atol=1e-3)
    np.testing.assert_array_equal(draw(pipe, prompt="a cat"), draw(pipe, prompt=["a cat"]))
    assert not np.allclose(draw(pipe, prompt="a cat"), draw(pipe, prompt="a red cat"), atol=1e-3)


def test_a_picture_comes_after_the_prompt(pipe) -> None:
    """A network may read both; the run adds the picture's rows."""
    state, engines = pipe.manifest.state, copy.copy(pipe.engines)
    low = replace(state, name="low", role="condition", picture=True)
    engines.manifest = replace(pipe.manifest, ports=(*pipe.manifest.ports, low))
    assert engines.encode(engines.tokenizers(["a cat"])).keys() == {"captions", "mask"}


def test_one_stage_at_a_time(prompted, pipe) -> None:
    with Pipeline.load(prompted, threads=1, low_memory=True) as lean:
        np.testing.assert_array_equal(draw(lean, prompt="a cat"), draw(pipe, prompt="a cat"))
        assert len(lean.engines.opened) == 1
        lean.engines.encode(lean.engines.tokenizers(["the roof"]))
        assert [*lean.engines.opened] == ["prompt"]


def test_each_prompt_is_encoded_once(pipe) -> None:
    """The latest ones stay within the budget, and no call has more rows than the stage takes."""
    sizes: list[int] = []

    def compute(stage, inputs):
        sizes.append(len(inputs["ids"]))
        return pipe.engines.run(stage, inputs)

    row = 4 * (SHORT * WIDTH + SHORT)
    memo = PromptMemo(pipe.manifest.prompt, compute, budget=3 * row)
    tokens = pipe.engines.tokenizers
    first = memo(tokens(["a cat", "a red cat", "a cat", "roof"]))
    assert sizes == [2, 1] and np.array_equal(first["captions"][0], first["captions"][2])
    again = memo(tokens(["roof", "a red cat", "a cat", "a cat"]))
    assert sizes == [2, 1] and np.array_equal(again["captions"], first["captions"][[3, 1, 0, 0]])
    memo(tokens(["the roof"]))  # drops "roof", the one used the longest ago
    memo(tokens(["a red cat", "a cat"]))
    assert sizes == [2, 1, 1]
    memo(tokens(["roof"]))
    assert sizes == [2, 1, 1, 1]


def test_a_prompt_that_nothing_takes_whole(pipe) -> None:
    draw(pipe, prompt=ROOF)
    with pytest.raises(UsageError) as error:
        draw(pipe, prompt=["a cat", f"{ROOF} on the roof"])
    words = str(error.value)
    assert "it has 11 of at most 5, 10 of at most 8 tokens" in words and ROOF in words and "\n" not in words


IDS = {"ids": [[2, 3, 1, 0, 0]], "ids_mask": [[1, 1, 1, 0, 0]], "long_ids": [[3, 1, 0, 0, 0, 0, 0, 0]]}
CAPTIONS = {"captions": np.ones((1, SHORT, WIDTH))}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "no prompt; pass at least one"),
        ({"prompt": []}, "no prompt; pass at least one"),
        ({"prompt": [3]}, "prompt 3; expected text"),
        ({"prompt": ["\ud800"]}, "is not Unicode text"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, "negative has 2 rows; expected one, or one for each of 1"),
        ({"prompt": "a", "condition": CAPTIONS}, "got both a prompt and arrays in its place: pass one of them"),
        ({"prompt": "a", "condition": IDS}, "got both a prompt and arrays in its place"),
        ({"prompt": "a", "negative_prompt": "", "negative": CAPTIONS}, "got both a negative prompt and arrays"),
        ({"condition": {"ids": IDS["ids"]}}, "condition lacks ids_mask, long_ids; expected an array for each of"),
        ({"condition": IDS | {"ids": [[2, 3, 1]]}}, "ids has shape (1, 3); expected (rows, 5)"),
        ({"condition": IDS | {"ids": [[2, 3, 1, 0, 10]]}}, "ids holds other values than the integers from 0 to 9"),
        ({"condition": IDS | {"ids_mask": [[1, 2, 0, 0, 0]]}}, "ids_mask holds other values than"),
        ({"condition": IDS | CAPTIONS}, "condition has the unknown port 'captions'"),
        ({"labels": 3, "prompt": "a"}, "this bundle takes captions, mask, and no labels"),
    ],
)
def test_refused_in_one_line(pipe, request_, words) -> None:
    with pytest.raises(UsageError) as error:
        draw(pipe, **request_)
    assert words in str(error.value) and "\n" not in str(error.value)
    draw(pipe, condition=IDS)


def test_a_bundle_without_encoders(handmade, opened) -> None:
    with pytest.raises(UsageError, match=r"takes captions, mask, and no prompts, .*; pass arrays \(dit-run: --condi"):
        draw(opened("captioned"), prompt="a cat")
    with pytest.raises(UsageError, match=r"takes labels, and no prompts, .*; pass labels \(dit-run: --labels\)"):
        draw(opened("labels"), prompt="a cat")
    with pytest.raises(UsageError, match="takes captions, mask, and no prompts"):
        draw(opened("captioned"), condition=CAPTIONS, negative_prompt="", negative=CAPTIONS)
    with pytest.raises(UsageError, match="needs an open bundle's tokenizers; pass token ids"):
        contract = manifest.read(handmade("captioned"))
        Request(prompt="a", output="latents").check(replace(contract, **_prompts()))


def _prompts() -> dict:
    stage = Stage("prompt", "prompt", (TensorSpec("ids", "int64", ("rows", 5)),), (), "prompt.onnx")
    return {"prompts": PROMPTS, "stages": (stage,)}


def test_tokenizers_may_be_missing(pipe, monkeypatch) -> None:
    """Arrays of ids need NumPy alone, with a negative of their own."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'dit-runtime\[text\]', or pass token ids"):
        draw(pipe, prompt="a cat")
    draw(pipe, condition=IDS, negative=IDS)
    draw(pipe, condition=IDS, guidance=1.0)


def test_a_tokenizer_is_checked(prompted, tmp_path) -> None:
    folder = Path(shutil.copytree(prompted, tmp_path / "bundle"))
    path = folder / "long_ids.json"
    whole = path.read_text()
    path.write_text(whole.replace('"roof"', '"goof"'))
    with Pipeline.load(folder) as pipe, pytest.raises(BundleError, match=r"long_ids.json does not have the sha256"):
        draw(pipe, prompt="a")
    for text, words in (
        ("{}", "long_ids.json is no tokenizer"),
        (whole.replace(f'"Fixed": {LONG}', '"Fixed": 9'), "long_ids.json gives 9 ids, expected 8; rebuild the bundle"),
    ):
        assert text != whole
        path.write_text(text)
        contract = json.loads((folder / manifest.NAME).read_text())
        contract["files"]["long_ids.json"] = vars(manifest.describe(path))
        (folder / manifest.NAME).write_text(json.dumps(contract))
        with Pipeline.load(folder) as pipe, pytest.raises(BundleError, match=words):
            draw(pipe, prompt="a")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("prompts",), [], "prompts: got 0, expected some where a stage runs 'prompt'"),
        (("stages", 0, "runs"), "condition", "port or tensor 'captions' stands there 2 times"),
        (("stages", 0), None, "prompts: got 2, expected some where a stage runs 'prompt'"),
        (("prompts", 1), None, "reads: got ids, ids_mask, long_ids, expected ids, ids_mask"),
        (("prompts", 0, "mask"), "", "reads: got ids, ids_mask, long_ids, expected ids, long_ids"),
        (("prompts", 0, "ids"), "captions", "port or tensor 'captions' stands there 2 times"),
        (("prompts", 0, "ids"), "context", "port or tensor 'context' stands there 2 times"),
        (("prompts", 0, "ids"), "guidance", "port or tensor 'guidance' stands there 2 times"),
        (("null", "captions"), 0.0, "null: captions: got 0.0, expected none, for the prompt stage gives it"),
        (("null", "mask"), 1.0, "null: mask: got 1.0, expected none"),
        (("prompts", 0, "tokens"), 6, "ids is: got int64 ['rows', 5], expected int64 ['rows', 6]"),
        (("prompts", 0, "ids"), "", "prompt 0: ids: got '', expected a name"),
        (("prompts", 0, "tokens"), 0, "prompt 0: tokens: got 0, expected sizes of 1 to"),
        (("prompts", 0, "size"), 0, "prompt 0: size: got 0, expected sizes of 1 to"),
        (("prompts", 0, "template"), "words", "prompt 0: template: got words, expected text with {} in one place"),
        (("prompts", 0, "negative"), "{} {}", "prompt 0: negative: got {} {}, expected text with {} in one place"),
        (("prompts", 0, "tokenizer"), "other.json", "other.json has no size and sha256 under files"),
        (("prompts", 0, "words"), "x", "prompt 0 has the unknown key 'words'"),
        (("prompts", 0, "lowercase"), 1, "prompt 0: lowercase: got 1, expected bool"),
        (("stages", 0, "gives", 0, "name"), "caption", "gives: got caption, expected condition ports: captions, mask"),
        (("stages", 0, "gives", 0, "shape"), ["rows", 5, 4], "captions is: got float32 ['rows', 5, 4]"),
        (("stages", 0, "gives", 1), None, "gives: got captions, expected both captions and mask, or none"),
        (("stages", 0, "reads", 0, "dtype"), "float32", "ids is: got float32 ['rows', 5], expected int64"),
    ],
)
def test_a_manifest_that_does_not_fit(prompted, place, value, words) -> None:
    table = json.loads((prompted / manifest.NAME).read_text())
    assert parse(copy.deepcopy(table)) == manifest.read(prompted)
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with pytest.raises(ValueError) as error:
        parse(table)
    assert words in str(error.value)


def test_the_prompt_stage_is_first(prompted) -> None:
    table = json.loads((prompted / manifest.NAME).read_text())
    table["stages"] = [*table["stages"][1:], table["stages"][0]]
    with pytest.raises(ValueError, match=r"stage prompt \(runs 'prompt'\): got a later stage, expected the first"):
        parse(table)


def test_from_the_command_line(prompted, pipe, tmp_path, capsys) -> None:
    out = str(tmp_path / "latents.npy")
    command = ["sample", str(prompted), "--threads", "1", "--steps", "3", "--guidance", "3", "-o", out]
    assert main([*command, "--prompt", "a cat", ROOF, "--negative", "no roof", "--seed", "5", "6"]) == 0
    expected = draw(pipe, prompt=["a cat", ROOF], negative_prompt="no roof", seed=[5, 6])
    np.testing.assert_array_equal(np.load(out), expected)
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == "dit-run: error: no prompt; pass at least one\n"
    assert main(["info", str(prompted)]) == 0
    text = capsys.readouterr().out
    assert "prompt     ids: up to 5 tokens by ids.json, in '<user> {}'" in text
    assert "prompt     long_ids: up to 8 tokens by long_ids.json\n" in text and "once a prompt" in text


def test_warming_and_timing_run_the_stage(prompted, monkeypatch, capsys) -> None:
    ran: list[str] = []
    run = Pipeline.load.__globals__["Engines"].run

    def record(engines, stage, inputs, *into):
        ran.append(stage.name)
        return run(engines, stage, inputs, *into)

    monkeypatch.setattr(Pipeline.load.__globals__["Engines"], "run", record)
    Pipeline.load(prompted, threads=1, warm=[2]).close()
    assert ran[0] == "prompt"
    assert main(["bench", str(prompted), "--threads", "1", "--steps", "2", "--rounds", "1"]) == 0
    assert "prompt, a row" in capsys.readouterr().out


def test_shards_take_prompts_in_turn(prompted, tmp_path) -> None:
    """A picture's class is the number of its prompt; the negative is for all."""
    words = ["--prompt", ROOF, "the cat", "--negative", "no cat", "--count", "5", "--shards", str(tmp_path / "shards")]
    assert main(["sample", str(prompted), *words, "--steps", "2", "--batch", "5", "--seed", "3"]) == 0
    with np.load(tmp_path / "shards/shard-00000.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0] and arrays["seeds"].tolist() == [3, 4, 5, 6, 7]
        drawn = arrays["arr_0"]
    with Pipeline.load(prompted) as pipe:
        prompts = [ROOF, "the cat", ROOF, "the cat", ROOF]
        alone = pipe.sample(prompt=prompts, negative_prompt="no cat", seed=[3, 4, 5, 6, 7], steps=2)
    assert np.array_equal(drawn, alone)
