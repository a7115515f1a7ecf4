"""Text encoders as a stage: token ids in, condition ports out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_runtime.bundle.manifest import Prompt

if TYPE_CHECKING:  # the command line imports this package and must not wait for PyTorch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """State what one tokenizer of a pipeline makes of a prompt."""

    ids: str  # the name of the input of the module
    tokenizer: str  # folder of the pipeline: "tokenizer_2"
    tokens: int | None = None  # None: as many as a caption has, and `extra` more
    extra: int = 0
    mask: str = ""  # the name of the input that marks the prompt's tokens; "": the module takes none
    template: str = "{}"  # around the prompt
    negative: str = ""  # the template of negative prompts; "": the same
    chat: Mapping[str, Any] | None = None  # options by which the tokenizer's chat template must make the template
    before: Callable[[], str] | None = None  # what stands before a prompt that is no negative, on top of its tokens
    lowercase: bool = False  # strip and lower the user's words before they go into the template
    special: bool = True  # whether the tokenizer adds its own tokens around the template
    side: str = ""  # where padding goes, "left" or "right"; "": where the tokenizer puts it


@dataclass(frozen=True)
class Text:
    """State how a family's pipelines make conditions of prompts.

    `module` takes the pipeline's encoders and tokenizers by folder, the transformer, and the number of a caption's
    tokens. It returns a module that takes ids and masks by name and returns the ports in `gives`. Where a pipeline
    lacks a tokenizer, the module is called without its ids; a KeyError of an encoder that is missing is the user's.
    """

    module: Callable[[Mapping[str, Any], Any, int], nn.Module]
    prompts: tuple[Tokens, ...]
    gives: tuple[str, ...]  # condition ports, in the order of the module's results


@dataclass(frozen=True)
class PromptEncoder:
    """A pipeline's encoders as one module in eval mode and float32, and its tokenizers."""

    module: nn.Module  # its parameters may be fakes; see `streaming`
    prompts: tuple[Prompt, ...]
    gives: tuple[str, ...]
    tokenizers: Mapping[str, str]  # the content of each prompt's tokenizer.json, by file of the bundle
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # of parameters that are fakes, by their names in it
