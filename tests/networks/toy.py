"""A pipeline in diffusers' form around a network of a few numbers, whose habits a test chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

CHANNELS, SIDE, TOKENS, WIDTH, WEIGHT = 4, 4, 12, 8, 5.0


def pack(x: Tensor) -> Tensor:
    """Return (B, C, H, W) as (B, H W / 4, 4 C)."""
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Toy(nn.Module):
    """Reads latents (B, C, H, W) or tokens (B, N, D), a time a row or a token, and a caption."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.caption = nn.Linear(width, width), nn.Linear(WIDTH, width)

    def forward(
        self,
        x: Any,
        t: Any,
        caption: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        table: Any = None,
        style: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Any, ...]:
        x = torch.stack(x) if isinstance(x, list) else x
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        mask = torch.ones(caption.shape[:2]) if mask is None else mask
        words = (self.caption(caption) * mask[..., None]).sum(1, keepdim=True)
        t = torch.as_tensor(t, dtype=torch.float32)
        t = t[..., None] if t.ndim == 2 else t.reshape(-1, 1, 1)
        tokens = torch.tanh(self.inner(tokens) + words + t / 1000 + (0 if weight is None else weight[:, None, None]))
        tokens = tokens + (0 if table is None else table[0]) + (0 if style is None else style.reshape(-1, 1, 1))
        return (tokens.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else tokens,)


@dataclass
class ToyPipeline:
    """A flow from noise to latents; each field is a habit of some pipeline of diffusers."""

    guidance: str = "batch"  # "batch" and "swapped": one call; "calls": two; "embedded"; "squared" is no known rule
    sign: float = 1.0  # of the network's result
    times: str = "steps"  # "steps", "sigma", "inverse", "tokens", "number"
    packed: bool = False  # 2 x 2 cells are a token
    lists: bool = False
    longest: bool = False  # captions have as many tokens as the prompt
    scheduler: Any = field(default_factory=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0))

    def __post_init__(self) -> None:
        self.transformer = Toy(4 * CHANNELS if self.packed else CHANNELS).eval().requires_grad_(False)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        words = [torch.tensor([len(word) for word in prompt.split()] or [0]) for prompt in prompts]
        length = max(map(len, words)) if self.longest else TOKENS
        ids = torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in words])
        mask = torch.stack([torch.arange(length) < len(row) for row in words]).float()
        return torch.sin(ids[..., None] + torch.arange(WIDTH)), mask

    def __call__(
        self,
        prompt: Any,
        num_inference_steps: int = 20,
        guidance_scale: float = WEIGHT,
        generator: Any = None,
        output_type: str = "latent",
    ) -> tuple[Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        x = torch.cat([torch.randn((1, CHANNELS, SIDE, SIDE), generator=each) for each in generators])
        if self.packed:
            x = pack(x)
        caption, mask = self.encode(prompts)
        guided = guidance_scale > 1 and self.guidance != "embedded"
        if guided:
            away = self.encode(["" for _ in prompts])
            order = [(caption, mask), away] if self.guidance == "swapped" else [away, (caption, mask)]
            caption, mask = (torch.cat(pair) for pair in zip(*order, strict=True))
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            output = self.predict(x, time, caption, mask, guidance_scale, guided)
            x = self.scheduler.step(output, time, x, return_dict=False)[0]
        return (x,)

    def predict(self, x: Tensor, time: Tensor, caption: Tensor, mask: Tensor, weight: float, guided: bool) -> Tensor:
        rows = len(caption)
        inputs: dict[str, Any] = {"x": torch.cat([x] * (rows // len(x))), "caption": caption, "mask": mask}
        inputs["t"] = {
            "steps": time.expand(rows),
            "sigma": (time / 1000).expand(rows),
            "inverse": (1000 - time).expand(rows),
            "tokens": time.expand(rows, SIDE * SIDE),
            "number": float(time),
        }[self.times]
        inputs |= {"table": (torch.full((1, 1, 1), 0.25), 7), "style": torch.ones(rows), "return_dict": False}
        if self.guidance == "embedded":
            inputs["weight"] = torch.full((rows,), 1000 * weight) / 1e4
        if self.lists:
            inputs["x"] = list(inputs["x"])
        if self.guidance == "calls" and guided:
            half = rows // 2
            outputs = []
            for part in (slice(half, rows), slice(half)):
                cut = {
                    key: value[part] if key in ("x", "caption", "mask", "t", "style") else value
                    for key, value in inputs.items()
                }
                outputs.append(self.transformer(**cut)[0])
            own, away = outputs
        else:
            output = self.transformer(**inputs)[0]
            if not guided:
                return self.sign * output
            parts = output.chunk(2)
            own, away = parts if self.guidance == "swapped" else parts[::-1]
        if self.guidance == "squared":
            return self.sign * (away + weight * (own - away) ** 2)
        return self.sign * (away + weight * (own - away))
