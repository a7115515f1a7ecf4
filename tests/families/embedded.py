"""The comparison of tiny.py for a bundle without text encoders: prompts come as the pipeline's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import Pipeline
from tests.families import tiny


@dataclass(frozen=True)
class Embedded(tiny.Case):
    encode: Callable[[list[str]], NDArray[np.float32]] = None  # type: ignore[assignment]  # prompts to captions

    def ours(
        self,
        prompts: Sequence[str] = (tiny.PROMPT,),
        seed: int = tiny.SEED,
        guidance: float = tiny.GUIDANCE,
        steps: int = tiny.STEPS,
        **request: Any,
    ) -> NDArray[np.float32]:
        options = {"condition": {"captions": self.encode(list(prompts))}, "guidance": guidance, "steps": steps}
        if guidance > 1:
            options["negative"] = {"captions": self.encode([self.negative or ""])}
        options["seed"] = [seed + number for number in range(len(prompts))]
        with Pipeline.load(self.bundle, threads=1) as pipe:
            latents = pipe.sample(**options | request, output="latents")
            return pipe.engines.decode(latents).transpose(0, 2, 3, 1)
