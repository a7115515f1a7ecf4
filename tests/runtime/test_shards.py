"""Many pictures as shards: what is in the files, and what a killed run leaves for the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import Pipeline, shards
from dit_runtime.bundle import manifest
from dit_runtime.cli import main

FIELDS = ("--steps", "3", "--guidance", "2")


@pytest.fixture(scope="module")
def folder(handmade) -> Path:
    return handmade("labels")


def sample(bundle: Path, into: Path, *options: str, count: int = 23) -> int:
    words = ["--count", str(count), "--shards", str(into), "--shard-size", "5", "--batch", "2", "--threads", "1"]
    return main(["sample", str(bundle), *words, *FIELDS, *options])


def read(into: Path) -> dict[int, tuple[int, bytes]]:
    """Return each picture's class and bytes by its seed; a seed that is there twice is an error."""
    pictures: dict[int, tuple[int, bytes]] = {}
    for file in sorted(into.glob("shard-*.npz")):
        with np.load(file) as arrays:
            assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].ndim == 4
            for seed, label, picture in zip(arrays["seeds"], arrays["arr_1"], arrays["arr_0"], strict=True):
                assert int(seed) not in pictures
                pictures[int(seed)] = int(label), picture.tobytes()
    return pictures


def test_each_picture_is_the_pipelines(folder, tmp_path, capsys) -> None:
    assert sample(folder, tmp_path / "shards", "--seed", "40", "--labels", "3", "1", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"output": str(tmp_path / "shards"), "count": 23, "shards": 5, "drawn": 5}
    assert "23 of 23 pictures" in printed.err
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "series.json",
        *(f"shard-{number:05d}.npz" for number in range(5)),
    ]
    drawn = read(tmp_path / "shards")
    assert [*drawn] == [*range(40, 63)] and [label for label, _ in drawn.values()] == [3, 1] * 11 + [3]
    with Pipeline.load(folder, threads=1) as pipe:
        for first, count in ((40, 2), (44, 1), (45, 2), (62, 1)):  # calls of two, and one at the end of a shard of 5
            seeds = range(first, first + count)
            labels = [[3, 1][seed % 2] for seed in seeds]
            alone = pipe.sample(labels, seed=[*seeds], steps=3, guidance=2)
            assert [drawn[seed] for seed in seeds] == [
                (label, picture.tobytes()) for label, picture in zip(labels, alone, strict=True)
            ]


def test_without_labels_all_classes_in_turn(folder, tmp_path) -> None:
    with Pipeline.load(folder, threads=1) as pipe:
        classes = pipe.manifest.classes
    assert sample(folder, tmp_path / "shards", count=2 * classes) == 0
    assert [label for label, _ in read(tmp_path / "shards").values()] == [*range(classes)] * 2


def test_what_is_there_stays_and_what_is_damaged_is_drawn_again(folder, tmp_path, capsys) -> None:
    into = tmp_path / "shards"
    assert sample(folder, into) == 0
    first = read(into)
    files = [shards.path(into, number) for number in range(5)]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-30])  # torn
    files[3].write_bytes(files[0].read_bytes())  # another's
    with np.load(files[4]) as arrays:
        np.savez(files[4], **{**arrays, "arr_0": arrays["arr_0"][:, :, :-1]})
    written = files[0].stat().st_mtime_ns
    (into / ".shard-00001.partial-0a.npz").write_bytes(b"killed while it wrote")
    capsys.readouterr()
    assert sample(folder, into, "--json") == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 4
    assert read(into) == first and files[0].stat().st_mtime_ns == written
    assert not [*into.glob("*partial-*")]


@pytest.mark.parametrize(("seed", "kind"), [(2**63 - 3, np.uint64), (2**64 - 5, np.uint64), (-5, np.int64)])
def test_seeds_to_the_last(folder, tmp_path, seed, kind, capsys) -> None:
    """Seeds on both sides of 2**63 too."""
    into, first = tmp_path / "shards", ("--seed", str(seed))
    assert sample(folder, into, *first, count=5) == 0
    with np.load(shards.path(into, 0)) as arrays:
        assert arrays["seeds"].dtype == kind and arrays["seeds"].tolist() == [*range(seed, seed + 5)]
    if seed == 2**64 - 5:
        assert sample(folder, tmp_path / "more", *first, count=6) == 2
        assert "seeds are" in capsys.readouterr().err and not (tmp_path / "more").exists()


def test_a_bit_of_a_file_may_be_wrong(folder, started, tmp_path) -> None:
    """Whatever it is a bit of, the shard is whole or not."""
    contract = manifest.read(folder)
    series = shards.Series(**json.loads((started / shards.NAME).read_text()))
    shape, file = shards.picture_shape(contract, series), shards.path(started, 0)
    content = file.read_bytes()
    assert shards.is_whole(started, series, 0, shape)
    damaged = shards.path(tmp_path, 0)
    whole = []
    for place in range(len(content) - 1000, len(content), 3):  # two small arrays, and the archive's table
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        whole.append(shards.is_whole(tmp_path, series, 0, shape))
    assert {*whole} == {True, False}  # the table also has times and flags that nobody reads


TORN = """
import os, signal, sys
from dit_runtime import shards
from dit_runtime.cli import main
def torn(file, **arrays):
    if "shard-00002" in file.name:
        file.write(b"PK")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, **arrays)
write, shards.np.savez = shards.np.savez, torn
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on(folder, tmp_path) -> None:
    """Killed with SIGKILL while it writes a shard: none is lost, none is there twice."""
    into = tmp_path / "shards"
    options = ["--count", "30", "--shard-size", "5", *FIELDS, "--threads", "1"]
    command = [sys.executable, "-c", TORN, "sample", str(folder), "--shards", str(into), *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len([*into.glob("shard-*.npz")]) == 2 and len([*into.glob("*partial-*")]) == 1
    assert main(["sample", str(folder), "--shards", str(into), *options]) == 0
    assert main(["sample", str(folder), "--shards", str(tmp_path / "whole"), *options]) == 0
    assert read(into) == read(tmp_path / "whole") and len(read(into)) == 30
    assert not [*into.glob("*partial-*")]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("holds shards of another series: seed differ", ["--seed", "1"]),
        ("another series: fields differ", ["--solver", "ddim"]),
        ("need both --count N and --shards DIR", ["--count"]),
        ("--latents does not go with --shards", ["--latents", "x.npy"]),
        ("--output does not go with --shards", ["-o", "x.png"]),
        ("--seed has several values", ["--seed", "1", "2"]),
        ("--workers is 2; expected 1 or more, and --ray", ["--workers", "2"]),
        ("batch is 0", ["--batch", "0"]),
        ("class 'no such class' is not known", ["--labels", "no such class"]),
    ],
)
def test_what_is_refused(folder, started, words, options, capsys) -> None:
    if options == ["--count"]:
        assert main(["sample", str(folder), "--count", "3"]) == 2
    else:
        assert sample(folder, started, *options, count=5) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def started(folder, tmp_path_factory) -> Path:
    into = tmp_path_factory.mktemp("shards") / "shards"
    assert sample(folder, into, count=5) == 0
    return into


def test_other_files_and_another_bundle(folder, handmade, tmp_path, started, capsys) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.series.partial-0a.json").touch()  # killed while it began
    assert sample(folder, tmp_path / "a", count=5) == 0
    assert sample(folder, tmp_path) == 2
    assert "holds other files" in capsys.readouterr().err
    assert sample(handmade("wide"), started, count=5) == 2
    assert "sha256" in capsys.readouterr().err
