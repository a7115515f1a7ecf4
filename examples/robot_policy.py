"""Build the action head of a robot policy, with random weights, and sample actions where PyTorch is absent.

    python examples/robot_policy.py [FOLDER]

The head is a flow from noise to the next actions [horizon, action size]. It reads the features of an observation, as
a vision encoder gives them, and the robot's proprioception. Nothing decodes its state: the state is the result.
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

HORIZON, ACTION = 16, 7  # actions a chunk, numbers an action
FEATURES, FEATURE, PROPRIOCEPTION = 12, 24, 9
WIDTH, HEADS, DEPTH = 48, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mix = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.look = nn.MultiheadAttention(WIDTH, HEADS, kdim=FEATURE, vdim=FEATURE, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, vector: Tensor, features: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(vector))[:, None].chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.mix(h, h, h, need_weights=False)[0]
        x = x + self.look(self.norm(x), features, features, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


class ActionHead(nn.Module):
    """Predict the velocity of actions at the time t: 1 is noise, 0 is data."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(ACTION, WIDTH), nn.Linear(WIDTH, ACTION)
        self.positions = nn.Parameter(torch.randn(HORIZON, WIDTH))
        self.time, self.proprioception = nn.Linear(32, WIDTH), nn.Linear(PROPRIOCEPTION, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.register_buffer("frequencies", torch.logspace(0, 3, 16))

    def forward(self, actions: Tensor, t: Tensor, features: Tensor, proprioception: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        vector = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.proprioception(proprioception)
        x = self.tokens(actions) + self.positions  # (N, horizon, D)
        for block in self.blocks:
            x = block(x, vector, features)
        return self.head(x)


def network() -> Network:
    torch.manual_seed(0)
    return Network(
        ActionHead().eval().requires_grad_(False),
        ports=(
            Port("actions", "state", "float32", (HORIZON, ACTION)),
            Port("t", "time", "float32", ()),
            Port("features", "condition", "float32", (FEATURES, FEATURE)),
            Port("proprioception", "condition", "float32", (PROPRIOCEPTION,)),
        ),
        guidance=1.0,  # policies run without guidance
        model={"name": "robot-policy"},
    )


def observations(count: int) -> dict[str, np.ndarray]:
    """Return random numbers in the place of a camera and of joints."""
    random = np.random.default_rng(0)
    shapes = {"features": (count, FEATURES, FEATURE), "proprioception": (count, PROPRIOCEPTION)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


PROCESS = Process(prediction="velocity", sampler=Sampler(solver="euler", steps=10))
SAMPLE = """
import sys
sys.modules |= {"torch": None, "dit_export": None}  # as on a robot: importing either fails
import numpy as np
from dit_runtime import Pipeline

bundle, observations, actions = sys.argv[1:]
with Pipeline.load(bundle) as pipe:
    np.save(actions, pipe.sample(condition=dict(np.load(observations)), seed=0, output="latents"))
"""


def main(folder: Path) -> np.ndarray:
    """Build into the folder, and return the actions of two observations."""
    bundle, inputs, actions = folder / "bundle", folder / "observations.npz", folder / "actions.npy"
    loaded = Loaded(network(), vae=None, labels=(), process=PROCESS, source={"kind": "python"})
    if not build(Recipe(backend="onnxruntime", output=str(bundle)), Progress(), loaded=loaded).passed:
        raise SystemExit("the bundle differs from PyTorch")
    np.savez(inputs, **observations(2))
    subprocess.run([sys.executable, "-c", SAMPLE, bundle, inputs, actions], check=True)
    return np.load(actions)


if __name__ == "__main__":
    print("actions", main(Path(sys.argv[1] if len(sys.argv) > 1 else "robot-policy")).shape)
