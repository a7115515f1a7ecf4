"""Pictures from files, the hostile ones among them: what is read, and what is refused in one line."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_runtime import Pipeline, UsageError
from dit_runtime.cli import main
from dit_runtime.facts import LIMITS
from dit_runtime.images import png
from dit_runtime.picture_files import fit, read_mask, read_picture

SIZE = (24, 16)  # height, width
PICTURE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of(picture: np.ndarray = PICTURE) -> Any:
    return Image.fromarray(picture)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.fixture
def bundles(request) -> Callable[[str], Path]:
    return request.getfixturevalue("handmade")


def handmade(width: int, height: int, depth: int = 8, colour: int = 2, lines: bytes = b"") -> bytes:
    """A PNG of one's own: what Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def sixteen(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a number, grey or RGB."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return handmade(values.shape[1], values.shape[0], 16, 2 if values.ndim == 3 else 0, lines)


def test_what_is_read(tmp_path) -> None:
    for content in (png(PICTURE), saved(of()), saved(of(), "WEBP", lossless=True)):
        np.testing.assert_array_equal(read_picture(content, *SIZE), PICTURE)
    (tmp_path / "cat").write_bytes(png(PICTURE))
    np.testing.assert_array_equal(read_picture(tmp_path / "cat", *SIZE), PICTURE)
    smooth = np.asarray(of(PICTURE[:3, :3]).resize(SIZE[::-1], Image.Resampling.BICUBIC))
    assert np.abs(read_picture(saved(of(smooth), "JPEG", quality=95), *SIZE).astype(int) - smooth).mean() < 8


def test_a_picture_of_another_size_is_stretched() -> None:
    """As diffusers' image processor does it."""
    from diffusers.image_processor import VaeImageProcessor

    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(of(), height=40, width=64)[0]
    expected = np.rint(127.5 * (np.moveaxis(expected.numpy(), 0, -1) + 1))
    np.testing.assert_array_equal(read_picture(png(PICTURE), 40, 64), expected)
    np.testing.assert_array_equal(fit(PICTURE[None], 40, 64)[0], expected)
    assert np.abs(fit(PICTURE[None], 40, 64, "bicubic")[0] - expected).max() > 1


def test_what_becomes_rgb() -> None:
    grey = PICTURE[..., 0]
    wide = PICTURE.astype(np.uint16) * 256 + 200
    alpha = np.concatenate([PICTURE, grey[..., None]], axis=2)
    threefold = np.repeat(grey[..., None], 3, axis=2)
    for content, expected in (
        (saved(of(grey)), threefold),
        (sixteen(wide[..., 0]), threefold),
        (sixteen(wide), PICTURE),
        (saved(Image.fromarray(alpha)), PICTURE),
        (saved(of().quantize(256)), np.asarray(of().quantize(256).convert("RGB"))),
    ):
        np.testing.assert_array_equal(read_picture(content, *SIZE), expected)
    red = Image.new("CMYK", SIZE[::-1], (0, 255, 255, 0))
    assert np.abs(read_picture(saved(red, "JPEG"), *SIZE).astype(int) - (255, 0, 0)).max() < 4


def test_a_cameras_jpeg_with_previews() -> None:
    """MPO: other pictures follow the first one, which is the photograph."""
    several = saved(of(), "MPO", save_all=True, append_images=[of(PICTURE[::-1])], quality=100)
    np.testing.assert_array_equal(read_picture(several, *SIZE), read_picture(saved(of(), "JPEG", quality=100), *SIZE))


def test_a_palette_with_alpha(recwarn) -> None:
    """Its colours are read, and Pillow does not warn."""
    palette = of().quantize(16)
    content = saved(palette, transparency=bytes([255] * 16))
    np.testing.assert_array_equal(read_picture(content, *SIZE), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(read_mask(content, *SIZE), np.asarray(palette.convert("RGB").convert("L")))
    assert not recwarn.list


def test_a_picture_is_turned() -> None:
    """EXIF's 6 says that the camera was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(PICTURE, -1)
    np.testing.assert_array_equal(read_picture(saved(of(), exif=exif), *turned.shape[:2]), turned)


def test_masks() -> None:
    """White, or where it is transparent, is drawn anew."""
    grey = np.zeros(SIZE, np.uint8)
    grey[:10] = 255
    np.testing.assert_array_equal(read_mask(saved(of(grey)), *SIZE), grey)
    opaque = np.full((*SIZE, 1), 255, np.uint8)
    coloured = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_mask(saved(of(np.concatenate([coloured, opaque], 2))), *SIZE), grey)
    holes = np.concatenate([PICTURE, grey[..., None]], axis=2)
    np.testing.assert_array_equal(read_mask(saved(of(holes)), *SIZE), 255 - grey)
    np.testing.assert_array_equal(read_mask(sixteen(grey.astype(np.uint16) * 256), *SIZE), grey)


def animated(kind: str) -> bytes:
    return saved(of(), kind, save_all=True, append_images=[of(PICTURE[::-1])], lossless=True)


JPEG = saved(of(), "JPEG")
BOMB = handmade(50_000, 50_000, lines=b"\0" * 10_000_000)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "image: not a picture in PNG, JPEG, WEBP"),
    "text": (b"a cat\n" * 20, "not a picture in PNG, JPEG, WEBP"),
    "another format": (saved(of(), "GIF"), "not a picture in PNG, JPEG, WEBP"),
    "a bomb": (BOMB, r"2500000000 pixels\) exceeds limit"),
    "a bomb in grey": (handmade(2**31 - 1, 2**31 - 1, 1, 0), "cannot be read as a picture|pixels; expected at most"),
    "a line too long": (handmade(LIMITS["pixels"] + 1, 1), "x 1 pixels; expected at most"),
    "no columns": (handmade(0, 7), "cannot be read as a picture|not a picture"),
    "no lines": (handmade(7, 0), "cannot be read as a picture|not a picture"),
    "a cut PNG": (png(PICTURE)[:-40], "cannot be read as a picture"),
    "a cut JPEG": (JPEG[: len(JPEG) // 2], "cannot be read as a picture"),
    "a cut header": (png(PICTURE)[:20], "cannot be read as a picture|not a picture"),
    "a wrong sum": (png(PICTURE)[:30] + b"!" + png(PICTURE)[31:], "cannot be read as a picture|not a picture"),
    "text that is a bomb": (
        saved(of())[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 100_000_000)) + saved(of())[33:],
        "cannot be read as a picture|not a picture",
    ),
    "an animated PNG": (animated("PNG"), "an animation of 2 frames; expected one picture"),
    "an animated WebP": (animated("WEBP"), "an animation of 2 frames; expected one picture"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [read_picture, read_mask])
def test_hostile_pictures(name, read: Callable[..., Any], recwarn) -> None:
    """Each is one line, without a warning, and takes little memory."""
    content, words = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(UsageError, match=words) as error:
        read(content, *SIZE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 and not recwarn.list
    assert peak < 150_000_000


def test_a_name_stands_in_the_message(tmp_path) -> None:
    with pytest.raises(UsageError, match="mask: not a picture"):
        read_mask(b"?", *SIZE, name="mask")
    with pytest.raises(UsageError, match=r"nowhere\.png: no such file"):
        read_picture(tmp_path / "nowhere.png", *SIZE)


def test_without_pillow(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UsageError, match=r"reading pictures needs Pillow: pip install 'dit-runtime\[images\]'"):
        read_picture(png(PICTURE), *SIZE)


def test_the_command(bundles, tmp_path, capsys) -> None:
    """The same latents as the request's; a picture that is damaged is one line."""
    bundle, out = bundles("pictured"), tmp_path / "latents.npy"
    (tmp_path / "cat.png").write_bytes(png(PICTURE))
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ["sample", str(bundle), "--labels", "1", "--steps", "4", "-o", str(out)]
    files = ["--image", str(tmp_path / "cat.png"), "--strength", "0.5", "--mask", str(tmp_path / "mask.png")]
    assert main([*command, *files]) == 0
    with Pipeline.load(bundle, threads=1) as pipe:
        image = fit(PICTURE[None], 32, 32)
        expected = pipe.sample([1], steps=4, image=image, strength=0.5, mask=mask, output="latents")
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)
    (tmp_path / "cat.png").write_bytes(BOMB)
    capsys.readouterr()
    assert main([*command, *files]) == 2
    assert capsys.readouterr().err.count("\n") == 1
