"""Text encoders and tokenizers of a pipeline's folder: ids are transformers' own, and nothing is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch._subclasses.fake_tensor import FakeTensor

from dit_export.checkpoints import load
from dit_export.checkpoints import text as reader
from dit_export.checkpoints.files import Weights
from dit_export.checkpoints.text import SAMPLES, tokenizer_json
from dit_export.graph import onnxfile, trace
from dit_export.recipe import Recipe
from dit_runtime.errors import UsageError
from tests.families import tiny
from tests.networks.test_streaming import Watched
from tests.networks.tiny import pixart

TEXTS = [*SAMPLES, "  Two RED boats, at sea:\n1920 ", "été", "a" * 300]


def ids(content: str, texts: list[str] = TEXTS) -> list[list[int]]:
    return [encoding.ids for encoding in Tokenizer.from_str(content).encode_batch(texts)]


def test_clip_from_a_vocabulary_and_merges(tmp_path) -> None:
    """As SD3's repositories have it; one merge more is another tokenizer."""
    model = json.loads(tiny.clip_tokenizer().backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert ids(tokenizer_json(tokenizer, 77)) == expected and {len(row) for row in expected} == {77}
    assert ids(tokenizer_json(tokenizer, 76)) != expected
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[1:], ""]))
    other = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert ids(tokenizer_json(other, 77)) != expected


def test_t5_from_a_sentencepiece_model(tmp_path) -> None:
    """As PixArt's repositories have it: the judge is the package sentencepiece."""
    file, lines = (
        io.BytesIO(),
        ["a photo of a cat on the roof", "two red boats at sea in 1920", "the old map of a town"],
    )
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=30, minloglevel=2, **special
    )
    (tmp_path / "spiece.model").write_bytes(file.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    content = tokenizer_json(transformers.T5Tokenizer.from_pretrained(tmp_path), 64)
    judge = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    for text in (*lines, "A map, １２ é", "", " lead"):
        expected = [*judge.encode(text), 1]
        assert ids(content, [text])[0] == expected + [0] * (64 - len(expected))


def test_sides_and_special_tokens() -> None:
    tokenizer = tiny.byte_tokenizer("<|user|>", bos="<s>", padding_side="left")
    pad, bos, user = (tokenizer.convert_tokens_to_ids(name) for name in ("<pad>", "<s>", "<|user|>"))
    text = "<|user|>ab"
    assert ids(tokenizer_json(tokenizer, 6), [text]) == [[pad, pad, bos, user, *tokenizer("ab").input_ids[1:]]]
    assert ids(tokenizer_json(tokenizer, 4, special=False), [text])[0][:2] == [pad, user]
    tokenizer.padding_side = "right"
    assert ids(tokenizer_json(tokenizer, 5), [text])[0][-1] == pad
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="has no padding token"):
        tokenizer_json(tokenizer, 6)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A PixArt with its text encoder, as its pipeline writes it, but for the VAE."""
    tokenizer = tiny.t5_tokenizer()
    pixart(caption_channels=64).save_pretrained(tmp_path / "transformer")
    tiny.t5(tokenizer).save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DPMSolverMultistepScheduler"}')
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def read(folder: Path, **recipe):
    return load(Recipe(checkpoint=str(folder), latents_only=True, **recipe))


def test_what_a_folder_holds(folder) -> None:
    loaded = read(folder)
    (prompt,) = loaded.text.prompts
    assert (prompt.ids, prompt.mask, prompt.tokens, prompt.lowercase) == ("ids", "ids_mask", 300, True)
    assert prompt.size == len(tiny.t5_tokenizer()) and loaded.text.tokenizers.keys() == {prompt.tokenizer}
    assert loaded.source["text"].keys() == {"text_encoder", "tokenizer"}
    assert not loaded.text.module.training and not any(w.requires_grad for w in loaded.text.module.parameters())
    tokens = {
        "ids": torch.randint(3, 90, (2, 300)),
        "ids_mask": (torch.arange(300) < torch.tensor([[7], [300]])).long(),
    }
    encoder = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        captions, mask = loaded.text.module(**tokens)
        assert torch.equal(captions, encoder(tokens["ids"], attention_mask=tokens["ids_mask"])[0])
    assert torch.equal(mask, tokens["ids_mask"].float())
    assert read(folder, caption_tokens=20).text.prompts[0].tokens == 20
    without = read(folder, without_text_encoders=True)
    assert without.text is None and "text" not in without.source


def rename(folder: Path, change) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


TIED = {"shared.weight": "encoder.embed_tokens.weight"}


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {f"transformer.{name}": value for name, value in weights.items()},
        lambda weights: weights | {TIED.get(name, name): value.clone() for name, value in weights.items()},
        lambda weights: weights | {"decoder.position_ids": torch.arange(9)[None]},  # of an older file, and not read
        lambda weights: {name: value.half() for name, value in weights.items()},
        lambda weights: {name: value.bfloat16() for name, value in weights.items()},
    ],
    ids=["prefix", "both of a tied pair", "position_ids", "fp16", "bf16"],
)
def test_names_and_types_of_weights(folder, change) -> None:
    """Whatever transformers reads, and in float32."""
    rename(folder, change)
    same_as_transformers(folder)


def test_shards(folder) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    tiny.t5(tiny.t5_tokenizer()).bfloat16().save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    loaded = same_as_transformers(folder)
    assert len([name for name in loaded.source["text"]["text_encoder"] if name.endswith(".safetensors")]) > 3


def same_as_transformers(folder: Path):
    loaded = read(folder, caption_tokens=12)
    assert {parameter.dtype for parameter in loaded.text.module.parameters()} == {torch.float32}
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    encoder = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        captions, _ = loaded.text.module(ids, torch.ones_like(ids))
        expected = encoder(ids, attention_mask=torch.ones_like(ids))[0]
    assert torch.equal(captions, expected) and captions.std() > 0.1
    return loaded


def test_weights_are_read_where_they_are_used(folder, tmp_path, monkeypatch) -> None:
    """While the encoder runs and while its graph is written, one part's weights are in memory."""
    opened: list[Watched] = []
    monkeypatch.setattr(reader, "open_weights", lambda paths: opened.append(Watched(Weights(paths))) or opened[-1])
    text = read(folder, caption_tokens=12).text
    (watched,) = opened
    assert watched.bytes == 0 and all(isinstance(parameter, FakeTensor) for parameter in text.module.parameters())
    largest = max(weight.nbytes for weight in text.weights.values())
    watched.peak = 0
    text.module(torch.ones(1, 12, dtype=torch.int64), torch.ones(1, 12, dtype=torch.int64))
    trace.export_prompt(text).save(tmp_path / "prompt.onnx", external_data=True)
    assert 0 < watched.peak <= 1.2 * largest and watched.bytes == 0
    graph = onnxfile.load(tmp_path / "prompt.onnx")
    constants = {tensor.name: tensor.values for tensor in onnxfile.constants(graph)}
    name = "t5.encoder.block.1.layer.1.DenseReluDense.wo.weight"
    np.testing.assert_array_equal(constants[name], text.weights[name].T.numpy())


class Buffered(transformers.T5EncoderModel):
    """An encoder with a buffer in its checkpoint."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.ones(3))


class Computed(transformers.T5EncoderModel):
    """An encoder whose loader computes a weight of those in the file."""

    @classmethod
    def from_pretrained(cls, *args, **options):
        model, report = super().from_pretrained(*args, **options)
        wo = model.encoder.block[1].layer[1].DenseReluDense.wo
        wo.weight = torch.nn.Parameter(2 * wo.weight.detach())
        return model, report


def use_class(folder: Path, kind: type, monkeypatch) -> None:
    monkeypatch.setattr(reader.transformers, kind.__name__, kind, raising=False)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", kind.__name__]}))


def test_buffers_of_a_checkpoint(folder, monkeypatch) -> None:
    use_class(folder, Buffered, monkeypatch)
    rename(folder, lambda weights: weights | {"scale": torch.tensor([3.0, 4.0, 5.0]).bfloat16()})
    scale = read(folder).text.module.t5.scale
    assert scale.tolist() == [3, 4, 5] and scale.dtype == torch.float32


def test_computed_weights_are_refused(folder, monkeypatch) -> None:
    use_class(folder, Computed, monkeypatch)
    name = "t5.encoder.block.1.layer.1.DenseReluDense.wo.weight"
    refused(folder, f"transformers makes {name} of several weights as it loads them: pass --without-text-encoders")


def test_refused_in_one_line(folder) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    whole = load_file(path)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file({key: value for key, value in whole.items() if key != name}, path, {"format": "pt"})
    refused(folder, f"text_encoder: the weights do not fit: {name} is missing (1 in all)")
    save_file(whole | {name: whole[name][:3]}, path, {"format": "pt"})
    refused(folder, "T5EncoderModel refuses it")
    path.unlink()
    refused(folder, "text_encoder: holds neither model.safetensors")
    save_file(whole, path, {"format": "pt"})
    index = json.loads((folder / "model_index.json").read_text())
    for change, words in (
        ({"text_encoder": ["transformers", "T6EncoderModel"]}, "transformers has no T6EncoderModel: pass --without"),
        ({"text_encoder": [None, None]}, "text_encoder is missing: pass --without-text-encoders"),
        ({"tokenizer": [None, None]}, "tokenizer is missing: pass --without-text-encoders"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text_encoder_2: not there, and model_index.json"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        refused(folder, words)
    (folder / "model_index.json").write_text(json.dumps(index))
    assert read(folder).text is not None


def test_a_tokenizer_of_another_encoder(folder) -> None:
    """Its ids would be out of the embedding's range, in the middle of the build."""
    tokenizer = tiny.t5_tokenizer()
    count = len(tokenizer)
    tokenizer.add_tokens(["<sea>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    refused(folder, f"tokenizer: its largest id is {count}, and its encoder embeds ids below {count}: take the")


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UsageError) as error:
        read(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert read(folder, without_text_encoders=True).text is None
