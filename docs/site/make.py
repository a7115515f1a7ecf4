"""Write the pages of the documentation site into a folder: `python docs/site/make.py FOLDER`.

Guides are the files of `docs/` and of the root. The reference comes from the code: commands, Python API, C header.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dit_export.cli
import dit_runtime.cli
import dit_serve.cli
from dit_runtime.options import Parser

ROOT = Path(__file__).resolve().parents[2]
# Pages of the root by their names on the site.
PAGES = {"README.md": "index", "ARCHITECTURE.md": "architecture", "CONTRIBUTING.md": "contributing"}
PAGES |= {"CHANGELOG.md": "changes"}
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}
LANGUAGES |= {".c": "c", ".h": "c", ".hpp": "cpp"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)]*)?\)")


def write(folder: Path) -> None:
    """Write all pages; a link to another file of the repository shows that file."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    sources = {ROOT / name: f"{page}.md" for name, page in PAGES.items()}
    sources |= {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    for source, page in sources.items():
        text = source.read_text(encoding="utf-8")
        (folder / page).write_text(LINK.sub(_Links(source, sources, folder), text), encoding="utf-8")
    reference = {"cli": cli(), "python": python(), "c": c(), "schema": schema(), "facts": facts()}
    for name, lines in reference.items():
        (folder / f"reference-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


class _Links:
    """Replaces a link between files by the link between their pages."""

    def __init__(self, source: Path, sources: dict[Path, str], folder: Path) -> None:
        self.source, self.sources, self.folder = source, sources, folder

    def __call__(self, match: re.Match[str]) -> str:
        before, link, anchor = match.groups()
        if "://" in link:
            return match[0]
        path = (self.source.parent / link).resolve()
        return f"{before}{self.sources.get(path) or self._file(path)}{anchor or ''})"

    def _file(self, path: Path) -> str:
        name = path.relative_to(ROOT).as_posix()
        if not path.is_file():
            raise FileNotFoundError(f"{self.source.relative_to(ROOT)} links to {name}, which is not there")
        if path.suffix in LANGUAGES:
            text = f"# {name}\n\n" + "\n".join(_fenced(path.read_text(encoding="utf-8"), LANGUAGES[path.suffix]))
            target = f"files/{name.replace('/', '-')}.md"
            (self.folder / target).write_text(text + "\n", encoding="utf-8")
            return target
        shutil.copy(path, self.folder / path.name)
        return path.name


def cli() -> Iterator[str]:
    yield "# Command line"
    os.environ["COLUMNS"] = "102"
    for program in (dit_export.cli, dit_runtime.cli, dit_serve.cli):
        yield from _pages(program.parser(), "##")


def _pages(parser: Parser, level: str) -> Iterator[str]:
    yield from (f"\n{level} {parser.prog}\n", *_fenced(parser.format_help()))
    for inner in parser.commands.values():
        yield from _pages(inner, "###")


def python() -> Iterator[str]:
    yield "# dit_runtime"
    for name in dit_runtime.__all__:
        value = getattr(dit_runtime, name)
        yield from (f"\n## {name}\n", *_described(name, value))
        for key, member in vars(value).items():
            inner = getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(inner):
                yield from (f"\n### {name}.{key}\n", *_described(key, inner))


def _described(name: str, value: Callable[..., object]) -> Iterator[str]:
    if not (isinstance(value, type) and issubclass(value, Exception)):
        signature = inspect.signature(value)
        parameters = [str(parameter).replace("'", "") for parameter in signature.parameters.values()]
        result = "" if isinstance(value, type) else f" -> {signature.return_annotation}".replace("'", "")
        text = f"{name}({', '.join(parameters)}){result}"
        if len(text) > 100:
            text = f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){result}"
        yield from _fenced(text, "python")
    yield inspect.getdoc(value) or ""


def c() -> Iterator[str]:
    yield "# The C header"
    for path in sorted((ROOT / "runtime/cpp/include/dit").glob("*.h")):
        yield from (f"\n## dit/{path.name}\n", *_fenced(path.read_text(encoding="utf-8"), "c"))


def schema() -> Iterator[str]:
    text = (ROOT / "runtime/manifest.schema.json").read_text(encoding="utf-8")
    yield from ("# Schema of the manifest", "", *_fenced(text, "json"))


def facts() -> Iterator[str]:
    yield from ("# Facts", "", "`runtime/facts.json` holds what Python and C++ have in common.")
    table = json.loads((ROOT / "runtime/facts.json").read_text(encoding="utf-8"))
    for name, value in table.items():
        yield from (f"\n## {name}\n", *_fenced(json.dumps(value, indent=1, ensure_ascii=False), "json"))


def _fenced(text: str, language: str = "text") -> Iterator[str]:
    yield from (f"```{language}", text.rstrip(), "```")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
