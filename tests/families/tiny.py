"""Tiny tokenizers, text encoders and a VAE, and the comparison of a bundle with diffusers' own pipeline.

A test of a family makes its pipeline of these, with a transformer of two or three blocks:

    case = Case(pipeline, build(pipeline, folder), {"height": 64, "width": 64})
    accept(case)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dit_export.bundle import build as building
from dit_export.recipe import Recipe
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.images import psnr
from dit_runtime.progress import Progress
from tests.networks.tiny import randomize
from tests.pixart import small_vae

PROMPT, OTHER, NEGATIVE = "a photo of a cat", "two red boats at sea, 1920", "blurry"
PROMPTS = (PROMPT, "dog", "an old map of the town and its river")  # of different lengths
SEED, STEPS, GUIDANCE = 42, 4, 3.0
SAME, ANOTHER = 80.0, 40.0  # dB: fp32 sums in another order through a run; what a wrong input must stay under


def clip_tokenizer(tokens: int = 77) -> Any:
    """A CLIPTokenizer with all bytes, a few merges, and CLIP's order of the special tokens at the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>")]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens)


def t5_tokenizer(tokens: int = 512) -> Any:
    """A T5Tokenizer of letters and a few words; what it does not have is <unk>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in ascii_lowercase + ascii_lowercase.upper() + digits + punctuation]
    pieces += [(f"▁{word}", -5.0) for word in ("a", "of", "cat", "photo", "the")]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=tokens)


def byte_tokenizer(*special: str, bos: str = "", eos: str = "", pad: str = "<pad>", **options: Any) -> Any:
    """A tokenizer of single bytes and `special` tokens, which a template may hold; `bos` and `eos` go around a text.

    `options` are transformers': padding_side="left", model_max_length.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys(token for token in (pad, bos, eos, *special) if token)))
    around = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    if around:
        single = " ".join(part for part in (bos, "$A", eos) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    names = {"bos_token": bos or None, "eos_token": eos or None, "pad_token": pad}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | options)


def clip(
    tokenizer: Any, width: int = 32, projection: int | None = 24, layers: int = 2, seed: int = 0, **config: Any
) -> Any:
    """CLIP's text encoder with its projection, or without."""
    fields = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection or width,
        pad_token_id=tokenizer.pad_token_id,
        **fields | config,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return randomize(kind(settings), seed)


def t5(tokenizer: Any, width: int = 64, layers: int = 2, seed: int = 0) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    return randomize(transformers.T5EncoderModel(config), seed)


def vae(channels: int = 16, **config: Any) -> Any:
    """An AutoencoderKL of 8 pixels a latent, with the shift and the scale of those with 16 channels."""
    torch.manual_seed(0)
    fields = {"shift_factor": 0.1159, "scaling_factor": 0.3611, "use_quant_conv": False, "use_post_quant_conv": False}
    return small_vae(latent_channels=channels, **fields | config).eval()


def build(pipeline: Any, folder: Path, **recipe: Any) -> Path:
    """Save a pipeline and build its verified bundle."""
    pipeline.save_pretrained(folder / "checkpoint")
    fields = {"checkpoint": str(folder / "checkpoint"), "output": str(folder / "bundle"), "backend": "onnxruntime"}
    built = building.build(Recipe(**fields | {"max_batch": 2} | recipe), Progress(io.StringIO()))
    assert built.passed, [figure for figure in built.checks if not figure.passed]
    return built.folder


def on_backend(backend: str, bundle: Path, folder: Path) -> Path:
    """Return a copy of a bundle whose graphs run on a backend of the CPU."""
    folder.mkdir()
    for file in bundle.iterdir():
        if file.is_file() and file.name != manifest.NAME:
            (folder / file.name).hardlink_to(file)
    contract = first = manifest.read(bundle)
    for size in first.each_size:
        contract = contract.at(size.size)
        contract = replace(contract, stages=tuple(replace(stage, backend=backend) for stage in contract.stages))
    manifest.write(folder, contract.at(first.size))
    return folder


@dataclass(frozen=True)
class Case:
    """A pipeline of diffusers and its bundle."""

    pipeline: Any
    bundle: Path
    call: Mapping[str, Any] = field(default_factory=dict)  # what every call of the pipeline has: height, width, …
    weight: str = "guidance_scale"  # what the pipeline calls guidance
    negative: str | None = NEGATIVE  # None: the pipeline takes no negative prompt
    size: str | None = None  # of a bundle with several

    def theirs(
        self, prompts: Sequence[str] = (PROMPT,), seed: int = SEED, guidance: float = GUIDANCE, steps: int = STEPS
    ) -> NDArray[np.float32]:
        """Return pictures [N, H, W, 3] or videos [N, F, H, W, 3] in [0, 1]; seeds count up from `seed`."""
        options = {self.weight: guidance, "num_inference_steps": steps, "output_type": "np", **self.call}
        if self.negative is not None:
            options["negative_prompt"] = [self.negative] * len(prompts)
        generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
        self.pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            result = self.pipeline(prompt=list(prompts), generator=generators, **options)
        return np.asarray(result.frames if "frames" in result else result.images)

    def ours(
        self,
        prompts: Sequence[str] = (PROMPT,),
        seed: int = SEED,
        guidance: float = GUIDANCE,
        steps: int = STEPS,
        **request: Any,
    ) -> NDArray[np.float32]:
        """Return the bundle's pictures as `theirs`, before they are rounded to 8 bits."""
        seeds = [seed + number for number in range(len(prompts))]
        options = {"prompt": list(prompts), "negative_prompt": self.negative} | request
        with Pipeline.load(self.bundle, threads=1, size=self.size) as pipe:
            options |= {"seed": seeds, "guidance": guidance, "steps": steps, "output": "latents"}
            return np.moveaxis(pipe.engines.decode(pipe.sample(**options)), 1, -1)


def distances(got: NDArray[Any], expected: NDArray[Any]) -> list[float]:
    """Return the PSNR of each picture in dB; 200 where the two are equal."""
    return [min(psnr(*pair, peak=1.0), 200.0) for pair in zip(got, expected, strict=True)]


def accept(case: Case, guided: bool = True) -> None:
    """Compare pictures: one prompt, with guidance and without, and three prompts at once; and what must differ.

    `guided` is False where the weight changes nothing (a distilled network without guidance).
    """
    expected = case.theirs()
    assert min(distances(case.ours(), expected)) >= SAME
    changes: list[dict[str, Any]] = [{"prompts": (OTHER,)}, {"seed": SEED + 9}]
    changes += [{"guidance": 2 * GUIDANCE}] if guided else []
    for change in changes:
        assert max(distances(case.ours(**change), expected)) < ANOTHER, change
    assert min(distances(case.ours(PROMPTS), case.theirs(PROMPTS))) >= SAME
    if guided:
        assert min(distances(case.ours(guidance=1.0), case.theirs(guidance=1.0))) >= SAME
