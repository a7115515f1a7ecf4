"""Build a speech DiT, with random weights, and sample mel spectrograms where PyTorch is absent.

    python examples/speech.py [FOLDER]

The network is a flow from noise to a mel spectrogram [frames, mel bands]. It reads the ids of a text with a mask of its
length, and it is guided away from an empty text. A vocoder would make sound of the result.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.bundle.build import build
from dit_export.checkpoints import Loaded
from dit_export.networks import Network, Port
from dit_export.recipe import Recipe
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process, Sampler

FRAMES, MEL = 32, 20
LETTERS = " abcdefghijklmnopqrstuvwxyz"  # ids are positions in it, from 1; 0 is no text
LENGTH = 24  # letters
WIDTH, HEADS, DEPTH = 48, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, vector: Tensor, bias: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(vector))[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, tokens, D / heads) each
        x = x + gate * self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Speech(nn.Module):
    """Predict the velocity of a spectrogram at the time t: 1 is noise, 0 is data. Letters and frames attend jointly."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(1 + len(LETTERS), WIDTH)
        self.frames, self.head = nn.Linear(MEL, WIDTH), nn.Linear(WIDTH, MEL)
        self.positions = nn.Parameter(torch.randn(LENGTH + FRAMES, WIDTH))
        self.time = nn.Linear(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.register_buffer("frequencies", torch.logspace(0, 3, 16))

    def forward(self, mel: Tensor, t: Tensor, text: Tensor, spoken: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        vector = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        bias = F.pad((spoken - 1) * 1e4, (0, FRAMES))[:, None, None].expand(-1, -1, LENGTH + FRAMES, -1)
        x = torch.cat([self.letters(text), self.frames(mel)], dim=1) + self.positions  # (N, letters + frames, D)
        for block in self.blocks:
            x = block(x, vector, bias)
        return self.head(x[:, LENGTH:])


def network() -> Network:
    torch.manual_seed(0)
    return Network(
        Speech().eval().requires_grad_(False),
        ports=(
            Port("mel", "state", "float32", (FRAMES, MEL)),
            Port("t", "time", "float32", ()),
            Port("text", "condition", "int64", (LENGTH,), size=1 + len(LETTERS)),
            Port("spoken", "condition", "float32", (LENGTH,), masks="text"),
        ),
        null={"text": 0, "spoken": 1},  # guidance leads away from no text
        guidance=2.0,
        model={"name": "speech"},
    )


def texts(*words: str) -> dict[str, np.ndarray]:
    """Return the ids of texts, and masks of their lengths."""
    ids = [[1 + LETTERS.index(letter) for letter in text] + [0] * (LENGTH - len(text)) for text in words]
    spoken = [[float(place < len(text)) for place in range(LENGTH)] for text in words]
    return {"text": np.array(ids, np.int64), "spoken": np.array(spoken, np.float32)}


PROCESS = Process(prediction="velocity", sampler=Sampler(solver="euler", steps=16))
SAMPLE = """
import sys
sys.modules |= {"torch": None, "dit_export": None}  # as on a phone: importing either fails
import numpy as np
from dit_runtime import Pipeline

bundle, texts, mel = sys.argv[1:]
with Pipeline.load(bundle) as pipe:
    np.save(mel, pipe.sample(condition=dict(np.load(texts)), seed=0, output="latents"))
"""


def main(folder: Path) -> np.ndarray:
    """Build into the folder, and return the spectrograms of two texts."""
    bundle, inputs, mel = folder / "bundle", folder / "texts.npz", folder / "mel.npy"
    loaded = Loaded(network(), vae=None, labels=(), process=PROCESS, source={"kind": "python"})
    if not build(Recipe(backend="onnxruntime", output=str(bundle)), Progress(), loaded=loaded).passed:
        raise SystemExit("the bundle differs from PyTorch")
    np.savez(inputs, **texts("good morning", "see you"))
    subprocess.run([sys.executable, "-c", SAMPLE, bundle, inputs, mel], check=True)
    return np.load(mel)


if __name__ == "__main__":
    print("mel", main(Path(sys.argv[1] if len(sys.argv) > 1 else "speech")).shape)
