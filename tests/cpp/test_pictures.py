"""dit-generate starts from pictures as Python does, and refuses the files that it does not read."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_runtime import Pipeline, verify
from dit_runtime.facts import LIMITS
from dit_runtime.picture_files import read_mask, read_picture
from tests.cpp.test_same_pictures import same_latents

SIDE = 32
PICTURE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
WHITE = np.where(np.arange(SIDE) < 16, 255, 0).astype(np.uint8)[None].repeat(SIDE, 0)  # left of the middle
OPTIONS = {"steps": 5, "seed": [4, 5], "output": "latents"}


def flags(file: Path, engine: str = "onnxruntime") -> list[object]:
    return ["--steps", 5, "--seed", 4, 5, "--backend", engine, "-o", file]


@pytest.fixture
def saved(tmp_path) -> dict[str, Path]:
    """The files of an image and of masks: white, and transparent where that is white."""
    clear = np.dstack([PICTURE, 255 - WHITE])
    arrays = {"image": PICTURE, "mask": WHITE, "clear": clear}
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in arrays}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "unipc"])
@pytest.mark.parametrize("mask", ["", "mask", "clear"])
def test_the_same_latents(handmade, dit_generate, saved, tmp_path, engine, solver, mask) -> None:
    """Image-to-image, and inpainting with a mask of either kind."""
    words, fields = ["--strength", 0.7, "--solver", solver], {"strength": 0.7, "solver": solver}
    if mask:
        words += ["--mask", saved[mask]]
        fields["mask"] = WHITE
    file = tmp_path / "x.npy"
    done = dit_generate(handmade("pictured"), "--labels", 1, 3, "--image", saved["image"], *words, *flags(file, engine))
    assert done.returncode == 0, done.stderr
    with Pipeline.load(handmade("pictured"), threads=1) as pipe:
        expected = pipe.sample([1, 3], image=PICTURE, **fields, **OPTIONS)
        plain = pipe.sample([1, 3], solver=solver, **OPTIONS)
    assert same_latents(np.load(file), expected) and not same_latents(plain, expected)


def test_one_for_each_sample(handmade, dit_generate, saved, tmp_path) -> None:
    Image.fromarray(PICTURE[::-1]).save(tmp_path / "other.png")
    files = ["--image", saved["image"], tmp_path / "other.png", "--mask", saved["mask"], saved["image"]]
    done = dit_generate(handmade("pictured"), "--labels", 1, 3, *files, *flags(tmp_path / "x.npy"))
    assert done.returncode == 0, done.stderr
    masks = np.stack([WHITE, read_mask(saved["image"], SIDE, SIDE)])
    with Pipeline.load(handmade("pictured"), threads=1) as pipe:
        expected = pipe.sample([1, 3], image=np.stack([PICTURE, PICTURE[::-1]]), mask=masks, **OPTIONS)
    assert same_latents(np.load(tmp_path / "x.npy"), expected)


def test_a_picture_for_a_port(handmade, dit_generate, saved, tmp_path) -> None:
    """As in super-resolution: one picture, a sample a seed."""
    done = dit_generate(handmade("enlarged"), "--image", saved["image"], *flags(tmp_path / "x.npy"))
    assert done.returncode == 0, done.stderr
    with Pipeline.load(handmade("enlarged"), threads=1) as pipe:
        expected, other = (pipe.sample(image=picture, **OPTIONS) for picture in (PICTURE, PICTURE[::-1]))
    assert same_latents(np.load(tmp_path / "x.npy"), expected) and not same_latents(other, expected)


WAYS = {
    "image": ("pictured", ["--labels", 1, 3, "--strength", 0.6]),
    "mask": ("pictured", ["--labels", 1, 3, "--strength", 1, "--mask", "mask"]),
    "port": ("enlarged", []),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits(handmade, dit_generate, saved, tmp_path, way) -> None:
    """On ONNX Runtime; the encoder is as deterministic as the rest."""
    kind, words = WAYS[way]
    words = [saved.get(word, word) for word in words]
    done = dit_generate(handmade(kind), "--image", saved["image"], *words, *flags(tmp_path / "x.npz"))
    assert done.returncode == 0, done.stderr
    fields = {"image": {"strength": 0.6}, "mask": {"strength": 1.0, "mask": WHITE}, "port": {}}[way]
    labels = [1, 3] if way != "port" else []
    with Pipeline.load(handmade(kind), threads=1) as pipe, np.load(tmp_path / "x.npz") as drawn:
        expected = pipe.sample(labels, image=PICTURE, **fields, **OPTIONS | {"output": "images"})
        np.testing.assert_array_equal(drawn["arr_0"], expected)


@pytest.mark.parametrize("kind", ["pictured", "enlarged"])
def test_verify_says_what_python_says(handmade, dit_generate, kind) -> None:
    with Pipeline.load(handmade(kind), threads=1) as pipe:
        expected = {figure.name: figure.limit for figure in verify.verify(pipe)}
    said = json.loads(dit_generate(handmade(kind), "--verify", "--json").stdout)
    assert said["passed"] and {check["name"]: check["limit"] for check in said["checks"]} == expected
    assert expected["encoder: mean of pictures, PSNR in dB"] == 60


def forms() -> dict[str, Image.Image]:
    """Pictures of every kind of 8 bits a channel that a PNG file has."""
    colours = Image.fromarray(PICTURE)
    grey, few = colours.convert("L"), colours.quantize(60)
    return {
        "rgb": colours,
        "rgba": Image.fromarray(np.dstack([PICTURE, WHITE])),
        "grey": grey,
        "grey with alpha": Image.merge("LA", (grey, Image.fromarray(WHITE))),
        "palette": few,
    }


@pytest.mark.parametrize("kind", forms())
def test_files_are_read_as_python_reads_them(handmade, dit_generate, tmp_path, kind) -> None:
    """As a picture and as a mask, which are what Pillow makes of them."""
    file, out = tmp_path / "in.png", tmp_path / "x.npy"
    forms()[kind].save(file)
    done = dit_generate(handmade("pictured"), "--labels", 1, 3, "--image", file, "--mask", file, *flags(out))
    assert done.returncode == 0, done.stderr
    with Pipeline.load(handmade("pictured"), threads=1) as pipe:
        fields = {"image": read_picture(file, SIDE, SIDE), "mask": read_mask(file, SIDE, SIDE)}
        assert same_latents(np.load(out), pipe.sample([1, 3], **fields, **OPTIONS))


def png(picture: object, **options: object) -> bytes:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, "PNG", **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A header, and no pixels."""
    header, data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data))
    return png(PICTURE)[:8] + b"".join(chunks)


WHOLE = png(PICTURE)
REFUSED = {
    "jpeg": (b"\xff\xd8\xff\xe0 and so on", "not a picture in PNG"),
    "empty": (b"", "not a picture in PNG"),
    "16 bits": (png(PICTURE[..., 0].astype(np.uint16) * 257), "16 bits a channel; expected 8"),
    "1 bit": (png(Image.fromarray(WHITE).convert("1")), "1 bits a channel; expected 8"),
    "animated": (png(PICTURE, save_all=True, append_images=[Image.fromarray(PICTURE[::-1])]), "an animation"),
    "bomb": (bomb(2**16, 2**15), f"65536 x 32768 pixels; expected at most {LIMITS['pixels']} in all"),
    "no pixels": (bomb(32, 0), "cannot be read as a picture"),
    "cut": (WHOLE[: len(WHOLE) // 2], "cannot be read as a picture: it ends too early"),
    "damaged": (WHOLE[:200] + bytes(50) + WHOLE[250:], "cannot be read as a picture"),
    "wide": (png(PICTURE[:, :31]), "31 x 32 pixels; expected 32 x 32, the bundle's size"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(handmade, dit_generate, saved, tmp_path, kind) -> None:
    """In one line, as an image and as a mask."""
    content, words = REFUSED[kind]
    (tmp_path / "bad.png").write_bytes(content)
    bad = ["--image", tmp_path / "bad.png"], ["--image", saved["image"], "--mask", tmp_path / "bad.png"]
    for chosen, said in zip(bad, (words, words.replace("the bundle's size", "as the image")), strict=True):
        done = dit_generate(handmade("pictured"), "--labels", 1, *chosen, *flags(tmp_path / "x.npy"))
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{tmp_path / 'bad.png'}: {said}" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strength", 0.5], "got strength without an image to start from"),
        (["--mask", "mask"], "got mask without an image to start from"),
        (["--image", "nowhere.png"], "nowhere.png: it cannot be read"),
        (["--image", "image", "--strength", 0], "strength is 0; expected a number above 0, up to 1"),
        (["--image", "image", "--strength", "much"], "--strength is 'much'; expected a number"),
    ],
)
def test_mistakes(handmade, dit_generate, saved, tmp_path, words, said) -> None:
    words = [saved.get(word, word) for word in words]
    done = dit_generate(handmade("pictured"), "--labels", 1, *words, "-o", tmp_path / "x.npy")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
