"""LTX-Video: a bundle's frames are those of diffusers' pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline

from dit_export.checkpoints import load
from dit_export.checkpoints.vae import read_vae
from dit_export.networks.codec import make_decoder
from dit_export.networks.families import family_network
from dit_export.recipe import Recipe
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.cli import main as run
from dit_runtime.errors import UsageError
from tests.families import tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import auraflow, ltx

TOKENS, FRAMES, HEIGHT, WIDTH = 96, 9, 32, 64
SHAPE = (FRAMES, HEIGHT, WIDTH, 3)


def make_vae(**config: Any) -> AutoencoderKLLTXVideo:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,) * 3, "down_block_types": ("LTXVideoDownBlock3D",) * 3}
    blocks |= {"spatio_temporal_scaling": (True,) * 3, "layers_per_block": (1,) * 4, "downsample_type": ("conv",) * 3}
    decoder = {"decoder_block_out_channels": (8,) * 3, "decoder_spatio_temporal_scaling": (True,) * 3}
    decoder |= {"decoder_layers_per_block": (1,) * 4, "decoder_inject_noise": (False,) * 4}
    decoder |= {"upsample_residual": (False,) * 3, "upsample_factor": (1,) * 3}
    vae = AutoencoderKLLTXVideo(latent_channels=8, **blocks | decoder | config)
    vae.latents_mean.normal_(std=0.3)
    vae.latents_std.uniform_(0.5, 2)
    return vae.eval()


def make_pipeline() -> LTXPipeline:
    tokenizer = tiny.t5_tokenizer()
    shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    return LTXPipeline(
        transformer=ltx(),
        scheduler=FlowMatchEulerDiscreteScheduler(base_image_seq_len=1024, **shift),
        vae=make_vae(),
        text_encoder=tiny.t5(tokenizer, width=48, layers=1),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline, resolution = make_pipeline(), f"{HEIGHT}x{WIDTH}"
    with one_thread():
        bundle = tiny.build(
            pipeline, tmp_path_factory.mktemp("ltx"), caption_tokens=TOKENS, resolution=resolution, frames=FRAMES
        )
    call = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": TOKENS}
    return tiny.Case(pipeline, bundle, call)


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    assert case.theirs().shape == (1, *SHAPE)
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """6 vectors a block and 2 of the end are made once a timestep, keys and values of the captions once a prompt."""
    contract = manifest.read(case.bundle)
    timed = [tensor for stage in contract.stages if stage.runs == "time" for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 6 * 2 + 2, 64)]
    assert contract.state.shape == (8, 2, 1, 2) and contract.end.gives[0].shape == ("batch", 3, *SHAPE[:3])
    assert (contract.guidance.default, contract.process.sampler.steps) == (3.0, 50)
    assert contract.model["frames"] == FRAMES and contract.model["resolution"] == f"{HEIGHT}x{WIDTH}"


@pytest.mark.slow
def test_files_of_a_video(case, tmp_path, capsys) -> None:
    command = ["sample", str(case.bundle), "--prompt", tiny.PROMPT, "--negative", "", "--steps", "2", "-o"]
    with Pipeline.load(case.bundle) as pipe:
        videos = pipe.sample(prompt=tiny.PROMPT, negative_prompt="", steps=2)
    assert videos.shape == (1, *SHAPE) and videos.dtype == np.uint8
    assert run([*command, str(tmp_path / "frames")]) == 0
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == [f"0-{n}.png" for n in range(FRAMES)]
    assert run([*command, str(tmp_path / "video.npz")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "video.npz")["arr_0"], videos)
    assert run([*command, str(tmp_path / "grid.png")]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_an_mp4(case, tmp_path) -> None:
    av = pytest.importorskip("av")
    with Pipeline.load(case.bundle) as pipe:
        videos = pipe.sample(prompt=[tiny.PROMPT, tiny.OTHER], negative_prompt="", steps=2, seed=[0, 1])
    assert (
        run(
            [
                "sample",
                str(case.bundle),
                "--prompt",
                tiny.PROMPT,
                tiny.OTHER,
                "--negative",
                "",
                "--steps",
                "2",
                "--seed",
                "0",
                "1",
                "--fps",
                "10",
                "-o",
                str(tmp_path / "two.mp4"),
            ]
        )
        == 0
    )
    with av.open(str(tmp_path / "two.mp4")) as file:
        assert file.streams.video[0].average_rate == 10
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, 2 * WIDTH, 3)
    light = np.array([0.299, 0.587, 0.114])  # colours are stored at half the size

    def gap(frame, video: int) -> float:
        return float(np.abs((frame - videos[video, -1].astype(float)) @ light).mean())

    left, right = frames[-1][:, :WIDTH], frames[-1][:, WIDTH:]
    assert gap(left, 0) < gap(left, 1) / 2 and gap(right, 1) < gap(right, 0) / 2


def test_a_decoder_denormalizes() -> None:
    vae, latents = make_vae(scaling_factor=0.7), torch.randn(2, 8, 2, 1, 2)
    with torch.no_grad():
        raw = LTXPipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, 0.7)
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        assert torch.equal(make_decoder(vae)(latents), expected)
        vae.latents_mean[3] += 1
        assert not torch.equal(make_decoder(vae)(latents), expected)
    assert make_decoder(vae).pixels == 32


@pytest.mark.parametrize(
    ("make", "frames", "words"),
    [
        (ltx, 10, "frames 10; expected 1, or a multiple of 8 more, such as 9 or 17"),
        (ltx, 0, "frames 0; expected 1"),
        (auraflow, 9, "frames 9, but the network draws no videos"),
    ],
)
def test_frames_that_do_not_fit(tmp_path, make, frames, words) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=words):
        load(Recipe(checkpoint=str(tmp_path), latents_only=True, frames=frames, resolution="32x32"))


def test_a_decoder_that_reads_a_timestep_is_refused(tmp_path) -> None:
    make_vae(timestep_conditioning=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="timestep_conditioning is True, expected False"):
        read_vae(tmp_path, 8, 32)


def test_ports() -> None:
    network = family_network(ltx())
    assert [port.shape for port in network.ports] == [(8, 21, 16, 22), (), (128, 48), (128,)]
    assert (network.model["frames"], network.model["resolution"]) == (161, "512x704")
