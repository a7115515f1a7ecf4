"""Write the completion scripts of the C++ programs, from their pages of help: runtime/cpp/programs/completion.

An option that the Python twin has too completes to the twin's values.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime/python")]

import dit_runtime.cli  # noqa: E402
import dit_serve.cli  # noqa: E402
from dit_runtime.completion import SHELLS, script  # noqa: E402
from dit_runtime.options import Known, Parser  # noqa: E402

FOLDER = ROOT / "runtime/cpp/programs"
TWINS = {
    "arguments.cpp": dit_runtime.cli.parser().commands["sample"],
    "server/dit_server.cpp": dit_serve.cli.parser(),
}
FILES = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}  # as the shells look for them


def scripts() -> Iterator[tuple[Path, str]]:
    """Yield each script and its file."""
    for source, twin in TWINS.items():
        text = (FOLDER / source).read_text(encoding="utf-8")
        program = parser(re.search(r'R"\((usage: .*?)\)";', text, re.DOTALL)[1], twin)
        for shell in SHELLS:
            yield FOLDER / "completion" / shell / FILES[shell].format(program.prog), script(program, shell)


def parser(usage: str, twin: Parser) -> Parser:
    """Return a parser that has a page's options."""
    known = {flag: action for action in twin._actions for flag in action.option_strings}
    program = Parser(prog=usage.split()[1])
    for entry in re.findall(r"^  \S.*(?:\n {20,}\S.*)*", usage.partition("examples:\n")[0], re.MULTILINE):
        words, *lines = re.split(r"\s{2,}", entry.strip())
        text = " ".join(lines)
        flags = re.findall(r"(?<!\S)--?[a-z][a-z-]*", words) if words.startswith("-") else []
        metavar = words.rpartition(flags[-1])[2].strip() if flags else words
        names = re.match(r"((?:[\w-]+, )+[\w-]+);", text)  # of an option that the twin has not
        if "--help" in flags:
            continue  # each Parser has it
        if flags and not metavar:
            program.add_argument(*flags, action="store_true", help=text)
        elif flags:
            kind = known[flags[0]].type if flags[0] in known else Known(names[1].split(", ")) if names else str
            program.add_argument(*flags, metavar=metavar, type=kind, help=text)
        elif words.endswith("BUNDLE"):
            program.add_argument("bundle", metavar=words, help=text)
    return program


if __name__ == "__main__":
    for path, text in scripts():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
