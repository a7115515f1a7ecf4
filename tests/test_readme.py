"""The README's commands, run as they stand in an empty folder; the programs of docs/network.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tour_runs(tmp_path: Path) -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/network.md"))
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "sh", "python", "python"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for language, block in blocks:
        command = ["bash", "-e", "-c", block] if language == "sh" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)

    build, runs, python, engine = printed
    last = build.splitlines()[-1]
    assert last == "sample: dit-run sample first-bundle --labels 250 750"
    assert "verified" in build
    assert "verified" in runs
    assert "S/8 at 128 px" in runs
    assert python == "(2, 128, 128, 3)\n"
    assert not engine  # it only defines a function; tests/test_custom_network.py builds such a network
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first-bundle", "first.png"]
