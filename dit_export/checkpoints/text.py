"""Text encoders and tokenizers of a pipeline that diffusers wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.utils import logging

from dit_export.checkpoints.files import Place, Renamed, find_weights, first_line, open_weights, sha256
from dit_export.checkpoints.schema import INDEX, read_config_json, read_index
from dit_export.networks.streaming import stream
from dit_export.networks.text import PromptEncoder, Text, Tokens
from dit_runtime.bundle.manifest import Prompt
from dit_runtime.errors import UsageError

OTHERWISE = "pass --without-text-encoders to build for prompt embeddings"
# Texts whose ids must be transformers' own: empty, short, longer than most prompts, and with letters beyond ASCII.
SAMPLES = ("", "a photo of a cat", "Ünïcode – Größe 12, “quoted”,  and   spaces 東京 🙂", "a long road, " * 200)


class Encoder(NamedTuple):
    """A text encoder whose parameters have no values, and where those are."""

    module: nn.Module
    places: Mapping[nn.Parameter, Place]


def read_text(folder: Path, text: Text, transformer: nn.Module, tokens: int) -> tuple[PromptEncoder, dict[str, Any]]:
    """Read the encoders of a pipeline for captions of so many tokens; return their sha256 by file, too."""
    classes = parts(folder)
    places: dict[nn.Parameter, Place] = {}
    models: dict[str, Any] = {}
    with quiet():
        for name, kind in classes.items():
            if name.startswith("tokenizer"):
                models[name] = _tokenizer(folder / name, kind)
            else:
                models[name], own = _encoder(folder / name, kind)
                places |= own
    entries = [entry for entry in text.prompts if entry.tokenizer in models]
    try:
        module = text.module(models, transformer, tokens).eval().requires_grad_(False)
        if not entries:
            raise KeyError(text.prompts[0].tokenizer)
    except KeyError as error:
        raise UsageError(f"{folder}: {error.args[0]} is missing: {OTHERWISE}") from None
    for entry in entries:
        _require_embeddings(models, entry.tokenizer, folder)
    weights = _streamed(module, places, folder)
    made = [_prompt(models[entry.tokenizer], entry, tokens, folder / entry.tokenizer) for entry in entries]
    prompts, tokenizers = tuple(prompt for prompt, _ in made), {prompt.tokenizer: content for prompt, content in made}
    files = {name: sha256(_files(folder / name)) for name in classes}
    return PromptEncoder(module, prompts, text.gives, tokenizers, weights), files


def _streamed(module: nn.Module, places: Mapping[nn.Parameter, Place], folder: Path) -> Mapping[str, Tensor]:
    """Let the module's parts read their weights when they run; return these by their names in the module."""
    inside = dict(module.named_parameters(remove_duplicate=False))
    if lost := [path for path, parameter in inside.items() if parameter not in places]:
        raise UsageError(f"{folder}: transformers makes {lost[0]} of several weights as it loads them: {OTHERWISE}")
    weights = Renamed({path: places[parameter] for path, parameter in inside.items()})
    stream(module, weights)
    return weights


def parts(folder: Path) -> dict[str, str]:
    """Return the transformers class of each text encoder and tokenizer that a pipeline has, by folder."""
    classes = {}
    for name, entry in read_index(folder).items():
        if name.startswith(("text_encoder", "tokenizer")) and isinstance(entry, list) and entry[-1]:
            if not (folder / name).is_dir():
                raise UsageError(f"{folder / name}: not there, and {INDEX} names it: {OTHERWISE}")
            classes[name] = str(entry[-1])
    return classes


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bar of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _files(folder: Path) -> list[Path]:
    """Return an encoder's config and weights, or all files of a tokenizer."""
    if folder.name.startswith("tokenizer"):
        return sorted(path for path in folder.iterdir() if path.is_file())
    return [folder / "config.json", *_weights(folder)]


def _weights(folder: Path) -> list[Path]:
    """Return an encoder's files of weights, whose names may be older than safetensors."""
    older = any((folder / f"pytorch_model.bin{end}").is_file() for end in ("", ".index.json"))
    return find_weights(folder, "pytorch_model" if older and not any(folder.glob("model*.safetensors*")) else "model")


def _encoder(folder: Path, kind: str) -> Encoder:
    """Build an encoder in float32 without reading its weights, each of which must be there.

    transformers has its own rules for the names of weights, and ties some. So it loads numbers in their place, one for
    each name in the checkpoint, spread over the weight's shape without taking memory.
    """
    loader = getattr(transformers, kind, None)
    if loader is None:
        raise UsageError(f"{folder}: transformers has no {kind}: {OTHERWISE}")
    read_config_json(folder / "config.json")
    weights = open_weights(_weights(folder))
    keys = list(weights)
    numbers = {key: torch.tensor(float(number)).expand(weights[key].shape) for number, key in enumerate(keys)}
    try:
        config = loader.config_class.from_pretrained(folder, local_files_only=True)
        options = {"dtype": torch.float32, "output_loading_info": True}
        encoder, report = loader.from_pretrained(None, config=config, state_dict=numbers, **options)
    except Exception as error:  # what transformers raises of a config shares no base class but this
        raise UsageError(f"{folder}: {kind} refuses it: {first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"{folder}: the weights do not fit: {missing[0]} is missing ({len(missing)} in all)")

    def places(tensors: Mapping[Any, Tensor]) -> dict[Any, Place]:
        """Return where the values of these are; what transformers computed of several weights has no one number."""
        single = {key: value for key, value in tensors.items() if value.untyped_storage().nbytes() == value.itemsize}
        own = {key: keys[int(value.flatten()[0])] for key, value in single.items()}
        return {key: (weights, name) for key, name in own.items() if weights[name].shape == tensors[key].shape}

    stored = encoder.state_dict().keys()
    buffers = {name: buffer for name, buffer in encoder.named_buffers() if name in stored}
    if lost := sorted(buffers.keys() - places(buffers).keys()):
        raise UsageError(f"{folder}: transformers makes {lost[0]} of several weights as it loads them: {OTHERWISE}")
    values = {name: value.to(buffers[name].dtype) for name, value in Renamed(places(buffers)).items()}
    encoder.load_state_dict(values, strict=False, assign=True)
    return Encoder(encoder.eval(), places({parameter: parameter for parameter in encoder.parameters()}))


def _tokenizer(where: Path, kind: str) -> Any:
    loader = getattr(transformers, kind, transformers.AutoTokenizer)
    try:
        return loader.from_pretrained(where, local_files_only=True)
    except Exception as error:  # nor what it raises of a tokenizer
        raise UsageError(f"{where}: {kind} refuses it: {first_line(error)}") from None


def _require_embeddings(models: Mapping[str, Any], name: str, folder: Path) -> None:
    """Refuse a tokenizer whose largest id has no embedding in its text encoder."""
    encoder = models.get(name.replace("tokenizer", "text_encoder"))
    last = max(models[name].get_vocab().values())
    if encoder is not None and last >= (count := encoder.get_input_embeddings().num_embeddings):
        what = f"its largest id is {last}, and its encoder embeds ids below {count}"
        raise UsageError(f"{folder / name}: {what}: take the tokenizer of the encoder, or {OTHERWISE}")


def _prompt(tokenizer: Any, entry: Tokens, tokens: int, where: Path) -> tuple[Prompt, str]:
    """Return a tokenizer's view of prompts, and its tokenizer.json."""
    if entry.chat is not None:
        message, options = {"role": "user", "content": "{}"}, {"tokenize": False, "add_generation_prompt": True}
        made = tokenizer.apply_chat_template([message], **options, **entry.chat)
        if made != entry.template:
            raise UsageError(f"{where}: its chat template makes {made!r} of a prompt, expected {entry.template!r}")
    before = entry.before() if entry.before else ""
    length = tokens + entry.extra if entry.tokens is None else entry.tokens
    length += len(tokenizer.encode(before)) if before else 0
    if length < 1:
        raise UsageError(
            f"caption-tokens {tokens}: expected more than {-entry.extra}, for {entry.tokenizer} has the rest"
        )
    tokenizer.padding_side = entry.side or tokenizer.padding_side
    content = tokenizer_json(tokenizer, length, entry.special, str(where))
    size = max(tokenizer.get_vocab().values()) + 1
    prompt = Prompt(
        ids=entry.ids,
        tokens=length,
        size=size,
        tokenizer=f"{entry.ids}.tokenizer.json",
        mask=entry.mask,
        template=before + entry.template,
        negative=entry.negative or (entry.template if before else ""),
        lowercase=entry.lowercase,
    )
    return prompt, content


def tokenizer_json(tokenizer: Any, length: int, special: bool = True, where: str = "tokenizer") -> str:
    """Return a tokenizer.json that by itself gives the ids of transformers' tokenizer, cut and padded to `length`."""
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        lacks = "padding token" if tokenizer.is_fast else "form of the package tokenizers"
        raise UsageError(f"{where}: has no {lacks}: {OTHERWISE}")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
        length=length,
    )
    table = json.loads(backend.to_str())
    if not special:
        table["post_processor"] = None
    content = json.dumps(table, ensure_ascii=False)
    fixed = {"padding": "max_length", "truncation": True, "max_length": length, "add_special_tokens": special}
    expected = tokenizer(list(SAMPLES), **fixed)
    got = Tokenizer.from_str(content).encode_batch(list(SAMPLES))
    for text, encoding, ids, mask in zip(SAMPLES, got, expected.input_ids, expected.attention_mask, strict=True):
        if encoding.ids != ids or encoding.attention_mask != mask:
            raise UsageError(f"{where}: its tokenizer.json gives other ids for {text[:20]!r} than transformers does")
    return content
