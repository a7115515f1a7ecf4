"""Prompts: words to token ids with each tokenizer of a bundle, and a memo of the prompt stage's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import manifest
from dit_runtime.bundle.records import Manifest, Prompt, Stage
from dit_runtime.conditions.condition import Rows
from dit_runtime.conditions.memo import BUDGET
from dit_runtime.errors import BundleError, NotFinite, UsageError

Words = str | Sequence[str]


class Tokenizers:
    """A bundle's tokenizers, each opened when a prompt first needs it."""

    def __init__(self, folder: Path, contract: Manifest) -> None:
        self._folder, self._contract = folder, contract
        self._opened: dict[str, Any] = {}  # by file

    def __call__(self, words: Words, negative: bool = False, whole: bool = True) -> Rows:
        """Return the prompt stage's inputs, a row for each text.

        A tokenizer that takes less than the whole text cuts it, as diffusers' pipelines do. Where all would cut it,
        it is refused, unless it need not be `whole`.
        """
        texts = as_texts(words, "negative prompt" if negative else "prompt")
        prompts = self._contract.prompts
        encoded = [self._open(prompt).encode_batch(templated(texts, prompt, negative)) for prompt in prompts]
        for text, encodings in zip(texts, zip(*encoded, strict=True), strict=True):
            if whole and all(encoding.overflowing for encoding in encodings):
                pairs = zip(encodings, prompts, strict=True)
                counts = ", ".join(f"{_count(encoding)} of at most {prompt.tokens}" for encoding, prompt in pairs)
                raise UsageError(f"the prompt {text[:40]!r}… is too long: it has {counts} tokens; shorten it")
        rows: Rows = {}
        for prompt, encodings in zip(prompts, encoded, strict=True):
            if wrong := {len(encoding.ids) for encoding in encodings} - {prompt.tokens}:
                what = f"{prompt.tokenizer} gives {wrong.pop()} ids, expected {prompt.tokens}"
                raise BundleError(f"{self._folder}: {what}; rebuild the bundle")
            rows[prompt.ids] = np.array([encoding.ids for encoding in encodings], np.int64)
            if prompt.mask:
                rows[prompt.mask] = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        return rows

    def _open(self, prompt: Prompt) -> Any:
        file = prompt.tokenizer
        if file not in self._opened:
            try:
                from tokenizers import Tokenizer  # here, so that arrays of ids need NumPy alone
            except ImportError:
                way = "pip install 'dit-runtime[text]', or pass token ids"
                raise UsageError(f"prompts need the package tokenizers: {way}") from None
            manifest.check_files(self._folder, self._contract, [file])
            try:
                self._opened[file] = Tokenizer.from_file(str(manifest.inside(self._folder, file)))
            except Exception as error:  # the package raises no class of its own
                raise BundleError(f"{self._folder}: {file} is no tokenizer: {error}") from None
        return self._opened[file]


def as_texts(words: Words, what: str) -> list[str]:
    """Return one text a row; refuse what is no text."""
    texts = [words] if isinstance(words, str) else list(words)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{what} {text!r}; expected text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what} {text!r} is not Unicode text") from None
    if not texts:
        raise UsageError(f"no {what}; pass at least one")
    return texts


def templated(texts: Sequence[str], prompt: Prompt, negative: bool = False) -> list[str]:
    """Return the prompts as a tokenizer takes them."""
    template = (negative and prompt.negative) or prompt.template
    return [template.replace("{}", text.lower().strip() if prompt.lowercase else text) for text in texts]


def _count(encoding: Any) -> int:
    """Return how many tokens a text has, with those around it."""
    parts = [encoding, *encoding.overflowing]
    words = sum(part.special_tokens_mask.count(0) for part in parts)
    pairs = zip(encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    return int(words + sum(special and counted for special, counted in pairs))


class PromptMemo:
    """A memo of the prompt stage's results for the latest prompts, by their ids and masks, in so many bytes."""

    def __init__(self, stage: Stage, compute: Callable[..., Mapping[str, NDArray[Any]]], budget: int = BUDGET) -> None:
        """Run nothing yet; `compute` takes the stage and its inputs."""
        self._stage, self._compute, self._budget = stage, compute, budget
        self._encoded: dict[bytes, Rows] = {}  # the latest last

    def __call__(self, rows: Rows) -> Rows:
        """Return the stage's outputs for these inputs; distinct rows that are not there run, each once."""
        names, stage = [spec.name for spec in self._stage.reads], self._stage
        count = len(rows[names[0]])
        keys = [b"".join(rows[name][row].tobytes() for name in names) for row in range(count)]
        encoded = {key: self._encoded.pop(key) for key in dict.fromkeys(keys) if key in self._encoded}
        missing = [row for row, key in enumerate(keys) if key not in encoded and keys.index(key) == row]
        for first in range(0, len(missing), stage.max_batch):
            some = missing[first : first + stage.max_batch]
            outputs = self._compute(stage, {name: rows[name][some] for name in names})
            for name, values in outputs.items():
                if not np.isfinite(values).all():
                    raise NotFinite(f"the {stage.name}'s {name} holds values that are not finite")
            for place, row in enumerate(some):
                encoded[keys[row]] = {name: values[place].copy() for name, values in outputs.items()}
        self._encoded |= encoded
        self._forget()
        return {spec.name: np.stack([encoded[key][spec.name] for key in keys]) for spec in stage.gives}

    def _forget(self) -> None:
        """Drop the oldest prompts over the budget."""
        sizes = {key: sum(values.nbytes for values in part.values()) for key, part in self._encoded.items()}
        excess = sum(sizes.values()) - self._budget
        for key, size in sizes.items():
            if excess <= 0:
                break
            del self._encoded[key]
            excess -= size
