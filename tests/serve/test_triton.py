"""A bundle in Triton's Python backend: the repository, and the class that its model.py loads, on a double of Triton."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_export.bundle import signing, triton
from dit_export.cli import main
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest, signature
from dit_serve.triton import TritonPythonModel
from tests.serve import fake_triton
from tests.serve.fake_triton import Asked, MetricFamily, words
from tests.serve.serving import until
from tests.serve.watched import Watched

WAIT = 60


@pytest.fixture
def export(folder, tmp_path, capsys) -> Callable[..., Path]:
    """Write the bundle as the model "demo" and return its folder."""

    def write(*options: str) -> Path:
        command = ["triton", str(folder), "-o", str(tmp_path / "repository"), "--name", "demo", "--threads", "1"]
        assert main([*command, *options]) == 0, capsys.readouterr().err
        assert str(tmp_path / "repository/demo") in capsys.readouterr().out
        return tmp_path / "repository/demo"

    return write


@contextmanager
def loaded(model: Path, change: Callable[[dict[str, Any]], object] = dict) -> Iterator[TritonPythonModel]:
    """Load model.py as Triton does."""
    hook, MetricFamily.values = sys.unraisablehook, {}
    sys.modules["triton_python_backend_utils"] = fake_triton
    try:
        spec = importlib.util.spec_from_file_location("model", model / "1/model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = fake_triton.read((model / "config.pbtxt").read_text())
        change(config)
        instance = module.TritonPythonModel()
        instance.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(model),
                "model_version": "1",
                "model_name": config["name"],
            }
        )
        try:
            yield instance
        finally:
            instance.finalize()
    finally:
        sys.unraisablehook = hook
        sys.modules.pop("triton_python_backend_utils", None)


def asked(prompt: str | bytes = "1", timeout: int = 0, **fields: Any) -> Asked:
    fields = {"num_inference_steps": np.int32(3), **fields}
    values = {
        name: words(value) if isinstance(value, str | bytes) else np.array([value]) for name, value in fields.items()
    }
    return Asked(timeout, prompt=words(prompt), **values)


def answered(model: TritonPythonModel, *requests: Asked) -> list[list[fake_triton.InferenceResponse]]:
    assert model.execute(requests) is None
    assert all(request.sender.final.wait(WAIT) for request in requests)
    return [request.sender.responses for request in requests]


def test_it_draws_the_bundles_pictures(export, folder) -> None:
    """And says which seeds; images of a request come together, a random seed is another one each time."""
    with Pipeline.load(folder, threads=1) as pipe:
        alone = pipe.sample([1, 1], seed=[7, 8], steps=3, guidance=2.0, solver="ddim")
    fields = {"seed": np.uint64(7), "num_inference_steps": np.int32(3), "guidance_scale": np.float32(2)}
    with loaded(export()) as model:
        request = asked("1", n=np.int32(2), solver="ddim", **fields)
        ((response,), (free,), (other,)) = answered(model, request, asked("2"), asked("2"))
    assert response.error is None
    assert np.array_equal(response.outputs["images"], alone)
    assert response.outputs["images"].dtype == np.uint8
    assert response.outputs["seeds"].tolist() == [7, 8] and response.outputs["seeds"].dtype == np.uint64
    assert free.outputs["images"].shape == (1, 32, 32, 3)
    assert free.outputs["seeds"] != other.outputs["seeds"]


def test_a_decoupled_model_sends_each_image(export, folder) -> None:
    with Pipeline.load(folder, threads=1) as pipe:
        alone = pipe.sample([1, 1, 1], seed=[3, 4, 5], steps=2)
    with loaded(export("--decoupled")) as model:
        fields = {"n": np.int32(3), "seed": np.uint64(3), "num_inference_steps": np.int32(2)}
        (responses,) = answered(model, asked("1", **fields))
    assert [response.outputs["seeds"].tolist() for response in responses] == [[3], [4], [5]]
    assert np.array_equal(np.concatenate([response.outputs["images"] for response in responses]), alone)


def test_the_config_is_the_manifests(export) -> None:
    folder = export("--deadline", "5", "--provider", "cpu")
    config = fake_triton.read((folder / "config.pbtxt").read_text())
    assert config["backend"] == "python" and config["max_batch_size"] == 0 and config["name"] == folder.name
    assert {entry["name"]: entry.get("optional", False) for entry in config["input"]} == {
        "prompt": False,
        **dict.fromkeys(["n", "seed", "num_inference_steps", "guidance_scale", "solver", "preset"], True),
    }
    assert [entry["dims"] for entry in config["output"]] == [[-1, 32, 32, 3], [-1]]
    values = {key: value["string_value"] for key, value in config["parameters"].items()}
    assert values == {"threads": "1", "provider": "cpu", "deadline": "5.0"}
    assert "model_transaction_policy" not in config
    (warmup,) = config["model_warmup"]
    files = {entry["key"]: (folder / "warmup" / entry["value"]["input_data_file"]) for entry in warmup["inputs"]}
    assert files["prompt"].read_bytes() == b"0"
    assert np.frombuffer(files["num_inference_steps"].read_bytes(), np.int32) == 2
    assert not [*folder.parent.glob(".*")]


def test_the_config_of_other_bundles(handmade) -> None:
    """Sizes, prompts and presets are asked for where a bundle has them."""

    def asked_for(kind: str) -> tuple[set[str], list[int]]:
        config = fake_triton.read(triton.config(manifest.read(handmade(kind)), "demo", False, {}))
        return {entry["name"] for entry in config["input"]}, config["output"][0]["dims"]

    always = {"prompt", "n", "seed", "num_inference_steps", "guidance_scale", "solver"}
    assert asked_for("sizes") == (always | {"size"}, [-1, -1, -1, 3])
    assert asked_for("prompted") == (always | {"negative_prompt"}, [-1, 32, 32, 3])
    assert asked_for("free") == (always, [-1, 32, 32, 3])


@pytest.mark.parametrize(
    ("request_", "words_"),
    [
        (asked("999"), "label"),
        (asked(b"\xff"), "prompt is not UTF-8"),
        (asked("1" * 70_000), "prompt has more than 65536 values"),
        (asked(n=np.int32(9)), "n must be an integer from 1 to 8"),
        (asked(guidance_scale=np.float32(np.nan)), "guidance_scale must be one finite number"),
        (asked(num_inference_steps=np.int32(0)), "num_inference_steps must be"),
        (Asked(prompt=words("1"), seed=np.array([1, 2], np.uint64)), "seed must be one finite number"),
        (Asked(seed=np.array([1], np.uint64)), "prompt is missing"),
        (asked(solver="magic"), "magic"),
    ],
)
def test_what_a_client_gets_wrong(drawing, request_, words_) -> None:
    ((response,),) = answered(drawing, request_)
    assert (response.error.code, words_ in response.error.message) == ("invalid", True), response.error.message


@pytest.fixture(scope="module")
def drawing(folder, tmp_path_factory) -> Iterator[TritonPythonModel]:
    repository = tmp_path_factory.mktemp("triton") / "repository"
    assert main(["triton", str(folder), "-o", str(repository), "--name", "demo", "--threads", "1"]) == 0
    with loaded(repository / "demo", lambda config: config["parameters"].update(max_steps={"string_value": "9"})) as it:
        yield it


def test_limits_are_parameters(drawing) -> None:
    """The bundle's own steps are too many here, as those of a preset would be."""
    ten, nine = asked(num_inference_steps=np.int32(10)), asked(num_inference_steps=np.int32(9))
    ((response,), (drawn,), (default,)) = answered(drawing, ten, nine, Asked(prompt=words("1")))
    assert response.error.message == "num_inference_steps must be an integer from 1 to 9" and drawn.error is None
    assert default.error.message == "num_inference_steps must be at most 9"


def test_a_client_that_leaves_and_one_that_waits_too_long(export) -> None:
    with loaded(export()) as model:
        batcher = model.model.batcher
        watched = Watched(batcher.pipe.engines.opened["denoiser"], RuntimeError("secret of the engine"))
        batcher.pipe.engines._opened["denoiser"] = watched
        watched.gate = threading.Semaphore(0)
        leaving, late = asked(timeout=10**9, n=np.int32(3)), asked(timeout=30_000_000)
        model.execute([leaving])
        (pending,) = model._pending
        assert all(59 < ticket.deadline - ticket.arrived <= 60 for ticket in pending.tickets)  # the server's
        assert watched.entered.acquire(timeout=WAIT)
        leaving.sender.cancelled = True
        until(lambda: all(ticket.cancelled for pending in model._pending for ticket in pending.tickets))
        model.execute([late])
        (waiting,) = [pending for pending in model._pending if pending.sender is late.sender]
        assert 29 < waiting.tickets[0].deadline - waiting.tickets[0].arrived <= 30
        waiting.tickets[0].deadline = 0.0
        watched.gate.release(10**4)
        assert leaving.sender.final.wait(WAIT) and late.sender.final.wait(WAIT)
        assert [response.error.code for response in leaving.sender.responses] == ["cancelled"]
        assert [response.error.code for response in late.sender.responses] == ["internal"]
        assert "not finished within" in late.sender.responses[0].error.message
        ((refused,),) = answered(model, asked(timeout=1))
        assert refused.error.code == "unavailable" and "too busy" in refused.error.message
        ((failed,),) = answered(model, asked(guidance_scale=np.float32(6.5)))
        assert failed.error.code == "internal" and "secret" not in failed.error.message
        ((drawn,),) = answered(model, asked(num_inference_steps=np.int32(2)))
        assert drawn.error is None and not model._pending
        values = MetricFamily.values
        until(lambda: values["dit_images_total"] == 1 == values["dit_failed_requests_total"])
        assert values["dit_cancelled_requests_total"] == 3 and values["dit_late_requests_total"] == 1
        assert values["dit_active_images"] == 0 and values["dit_batch_places"] >= 1
        answered(model, asked())
        until(lambda: values["dit_images_total"] == 2)


def test_an_answer_that_is_not_taken_ends_nobody_elses(export, monkeypatch, caplog) -> None:
    """Triton raises where it cannot send; the thread that sends goes on."""
    with loaded(export()) as model:
        lost, tried = asked(), threading.Semaphore(0)

        def refuse(*_: Any, **__: Any) -> None:
            tried.release()
            raise fake_triton.TritonModelException("the response sender is closed")

        monkeypatch.setattr(lost.sender, "send", refuse)
        model.execute([lost])
        assert tried.acquire(timeout=WAIT) and tried.acquire(timeout=WAIT)  # the picture, then the error
        ((drawn,),) = answered(model, asked())
        assert drawn.error is None and not model._pending
    assert "not sent" in [record.message for record in caplog.records]


def test_a_damaged_bundle_is_not_served(export) -> None:
    model = export()
    file = model / "1/bundle/denoiser.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(fake_triton.TritonModelException, match=r"denoiser\.onnx"), loaded(model):
        pass


def test_a_public_key(folder, tmp_path, capsys) -> None:
    """No model is written of a bundle that the key's owner has not signed, or loaded whose signature is gone."""
    key, signed = tmp_path / "key.pem", tmp_path / "signed"
    signing.new_key(key)
    shutil.copytree(folder, signed)
    words_ = "-o", str(tmp_path / "repository"), "--name", "demo", "--public-key", f"{key}.pub"
    assert main(["triton", str(signed), *words_]) == 2 and "not signed" in capsys.readouterr().err
    signing.sign_bundle(signed, key)
    assert main(["triton", str(signed), *words_]) == 0
    model = tmp_path / "repository/demo"
    with loaded(model) as instance:
        ((drawn,),) = answered(instance, asked())
        assert drawn.error is None
    (model / "1/bundle" / signature.NAME).unlink()
    with pytest.raises(fake_triton.TritonModelException, match="not signed"), loaded(model):
        pass
    refused = pytest.raises(fake_triton.TritonModelException, match="public_key is no")
    odd = {"public_key": {"string_value": "key.pem.pub"}}
    with refused, loaded(model, lambda config: config["parameters"].update(odd)):
        pass


def test_what_cannot_be_written(export, handmade, capsys, monkeypatch) -> None:
    """The repository stays as it is, also where the writing itself breaks off."""
    repository = export().parent
    for words_, *command in (
        ("exists already", "--name", "demo"),
        ("expected letters", "--name", "../demo"),
        ("expected a number above 0", "--name", "other", "--deadline", "-1"),
    ):
        bundle = str(handmade("labels"))
        assert main(["triton", bundle, "-o", str(repository), *command]) == 2
        assert words_ in capsys.readouterr().err
    assert main(["triton", str(handmade("captioned")), "-o", str(repository)]) == 2
    assert "a prompt does not give them" in capsys.readouterr().err
    monkeypatch.setattr(triton, "config", lambda *arguments: "".join(1))
    assert main(["triton", str(handmade("labels")), "-o", str(repository), "--name", "other"]) != 0
    assert [path.name for path in repository.iterdir()] == ["demo"]
