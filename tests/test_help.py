"""The programs' words about themselves: pages of help, their nouns and examples, and completion in three shells."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_export.cli
import dit_runtime.cli
import dit_serve.cli
from dit_runtime.completion import script
from dit_runtime.errors import UsageError
from dit_runtime.options import Parser

CPP = Path(__file__).parents[1] / "runtime/cpp/programs"
PROGRAMS = {"dit-export": dit_export.cli, "dit-run": dit_runtime.cli, "dit-serve": dit_serve.cli}
NOUNS = {
    "ACTION": "info or clear",
    "ADDRESS": "of a machine",
    "BUNDLE": "a bundle's folder",
    "CHECKPOINT": "weights: a folder, a file or an id",
    "CLASS": "a label, by name or number",
    "FILE": "with what its name ends in",
    "FOLDER": "any other folder",
    "KEY": "a name before =",
    "LAYER": "of a network",
    "LOW": "the lower bound, before HIGH",
    "HIGH": "the upper bound",
    "MODEL": "a size of the paper's DiT",
    "N": "an integer",
    "NAME": "that is known: of a preset, a port, a solver",
    "SECONDS": "a time",
    "SHA256": "a sum",
    "SHELL": "bash, zsh or fish",
    "SIZE": "of pictures: 512 or 512x768",
    "TEXT": "of a prompt",
    "VALUE": "after =",
    "X": "a number",
}


def pages(parser: Parser) -> Iterator[Parser]:
    """Yield a program's parser and those of its commands."""
    yield parser
    for inner in parser.commands.values():
        yield from pages(inner)


ALL = {page.prog: page for cli in PROGRAMS.values() for page in pages(cli.parser())}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", ["dit-export", "dit-run", "dit-export demo"])
def test_a_page_of_commands_fits_a_screen(name: str, wide: None) -> None:
    lines = ALL[name].format_help().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    listed = {match[1]: len(match[0]) for line in lines if (match := re.match(r"  ([a-z-]+) +(?=\S)", line))}
    assert listed.keys() >= ALL[name].commands.keys() and len(set(listed.values())) == 1


@pytest.mark.parametrize("name", ALL)
def test_a_page(name: str, wide: None) -> None:
    """Each option is in a group with a title, has a noun of the house for its value, and says what it does."""
    parser, text = ALL[name], ALL[name].format_help()
    assert max(map(len, text.splitlines())) <= max(80, *(len(line) + 2 for line in parser.examples or [""]))
    assert text.startswith(f"usage: {name} ")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help and not action.help.startswith("of "), action
        if action.nargs == 0:
            continue
        metavars = [action.metavar] if isinstance(action.metavar, str) else action.metavar or [action.dest.upper()]
        nouns = {noun for metavar in metavars for noun in re.findall(r"[A-Z0-9]+", metavar)}
        assert nouns and nouns <= NOUNS.keys(), f"{action.option_strings or action.dest}: {nouns - NOUNS.keys()}"
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert "options" not in titles and len(titles) == len(set(titles))
    assert len(parser._optionals._group_actions) <= 6  # what all have; the others have a group of their own


@pytest.mark.parametrize("name", [name for name, parser in ALL.items() if not parser.commands])
def test_its_examples_are_commands(name: str) -> None:
    program, *words = name.split()
    root = PROGRAMS[program].parser()
    assert 1 <= len(ALL[name].examples) <= 3
    for example in ALL[name].examples:
        first, *arguments = shlex.split(example.partition(">")[0], comments=True)
        options = root.parse_args(arguments)
        assert first == program and arguments[: len(words)] == words
        assert name == "dit-serve" or callable(options.command)
        assert example in ALL[name].format_help()


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("dit-run", ["sample", "b", "--lable", "3"], '--lable (did you mean "--labels"?); see dit-run sample --help'),
        ("dit-run", ["sample", "b", "--label", "3"], "unrecognized argument --label"),  # no abbreviations
        ("dit-run", ["info", "b", "c"], "unrecognized argument c; see dit-run info --help"),
        ("dit-run", ["verify"], "required: BUNDLE; see dit-run verify --help"),
        ("dit-run", [], "required: COMMAND; see dit-run --help"),
        ("dit-export", ["demo", "score", "b", "--cuont", "3"], 'did you mean "--count"?); see dit-export demo score'),
        ("dit-serve", ["b", "--prot", "3"], 'did you mean "--port"'),
    ],
)
def test_a_mistake_names_the_page_to_read(program: str, words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        PROGRAMS[program].parser().parse_args(words)
    assert said in str(refused.value)


def usage(name: str) -> str:
    """Return the page of a C++ program, from its source."""
    return re.search(r'R"\((usage: .*?)\)";', (CPP / name).read_text(encoding="utf-8"), re.DOTALL)[1]


def options_of(page: str) -> dict[str, str]:
    """Return the group of each option of a page, by how it is written there."""
    group, options = "", {}
    for line in page.splitlines():
        if re.fullmatch(r"[\w ]+:", line):
            group = line[:-1]
        elif group != "examples" and (option := re.match(r"  (\S.*?)(?:  |$)", line)) and line.startswith("  -"):
            options[option[1]] = group
    return options


@pytest.mark.parametrize(
    ("file", "twin", "own"),
    [
        ("arguments.cpp", "dit-run sample", {"--verify", "--backend NAME", "--version"}),
        ("server/dit_server.cpp", "dit-serve", {"--backend NAME"}),
    ],
)
def test_a_program_in_cpp_has_the_page_of_its_twin(
    file: str, twin: str, own: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options in the same groups, with the same nouns; it has fewer of them, and some of its own."""
    monkeypatch.setenv("COLUMNS", "100")
    page, python = usage(file), options_of(ALL[twin].format_help())
    options = {
        name.replace("--provider, --device", "--provider").replace("FILE.png", "FILE"): group
        for name, group in options_of(page).items()
    }
    assert len(options) > 15 and options.keys() - own <= python.keys()
    assert {name: group for name, group in options.items() if name not in own}.items() <= python.items()
    assert max(map(len, page.splitlines())) <= 110
    program = page.split()[1]
    examples = page.partition("examples:\n")[2].splitlines()
    assert 1 <= len(examples) <= 3 and all(
        example.startswith(f"  {program} BUNDLE") or "=BUNDLE" in example for example in examples
    )
    known = {flag for name in options_of(page) for flag in re.findall(r"--?[a-z][a-z-]*", name)}
    assert {word for example in examples for word in example.split() if re.match("--?[a-z]", word)} <= known
    source = (CPP / file).read_text(encoding="utf-8").partition("(usage: ")[2].partition(')";')[2]
    assert {flag for flag in known if f'"{flag}"' in source} == known  # the parser takes what the page has


BASH = """
source /dev/stdin <<< "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
compopt() { :; }
$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = 'source (printf %s $argv[1] | psub); complete -C "$argv[2]" | string replace -r "\\t.*" ""; true'
# The widget that offers completions needs a terminal: zsh runs in one of its own.
ZSH = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PROMPT=; autoload -Uz compinit; compinit -u -D; source '$1'; compadd() {
  local -a o; builtin compadd -O o \\"\\$@\\"
  print -r -- \\"<<\\${(j:|:)o}>>\\"; builtin compadd \\"\\$@\\" }; print rea''dy"
zpty -r z out '*ready*'
zpty -w -n z "$2"$'\\t'
repeat 40 { zpty -rt z out && print -rn -- "$out"; sleep 0.05 }
"""


def complete(shell: str, text: str, *words: str, file: Path) -> set[str]:
    """Return what a shell offers for the last of the words."""
    if shell == "bash":
        command = ["bash", "--norc", "-c", BASH, "bash", text, *words]
    elif shell == "fish":
        command = ["fish", "--no-config", "-c", FISH, text, " ".join(words)]
    else:
        file.write_text(text)
        command = ["zsh", "-f", "-c", ZSH, "zsh", str(file), " ".join(words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, timeout=60)
    assert done.returncode == 0 and (shell == "zsh" or not done.stderr), done.stderr
    lines = re.findall("<<(.*?)>>", done.stdout) if shell == "zsh" else done.stdout.split("\n")
    return {word for line in lines for word in line.split("|")} - {""}


CASES = [
    (["dit-run", "ver"], {"verify"}, {"sample"}),
    (["dit-run", "sample", "--sol"], {"--solver"}, {"--seed"}),
    (["dit-run", "sample", "--solver", "uni"], {"unipc", "unipc3"}, {"deis"}),
    (["dit-run", "sample", "--json", "--latents", "la"], {"latents.npy"}, {"--latents"}),
    (["dit-run", "cache", "cl"], {"clear"}, {"info"}),
    (["dit-export", "demo", "show-"], {"show-sr"}, {"train"}),
    (["dit-export", "demo", "score", "--cou"], {"--count"}, {"--output"}),
    (["dit-export", "build", "--precision", "f"], {"fp16", "fp8"}, {"int8"}),
    (["dit-serve", "--dead"], {"--deadline"}, {"--port"}),
    (["dit-generate", "--solver", "uni"], {"unipc", "unipc3"}, {"deis"}),
    (["dit-generate", "--json", "--latents", "la"], {"latents.npy"}, {"--latents"}),
    (["dit-server", "--backend", "tens"], {"tensorrt", "tensorrt-rtx"}, {"openvino"}),
    (["dit-server", "--job"], {"--job-deadline"}, {"--deadline"}),
]


@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=pytest.mark.slow), "fish"])
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "latents.npy").touch()
    texts = {name: script(cli.parser(), shell) for name, cli in PROGRAMS.items()}
    texts |= {file.stem.lstrip("_"): file.read_text() for file in (CPP / "completion" / shell).iterdir()}
    for words, offered, not_offered in CASES:
        got = complete(shell, texts[words[0]], *words, file=tmp_path / f"_{words[0]}")
        assert offered <= got and not not_offered & got, (words, got)


def test_the_scripts_of_the_programs_in_cpp_are_those_of_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CPP.parent / "tools")
    scripts = dict(importlib.import_module("completion").scripts())
    assert scripts.keys() == {*(CPP / "completion").glob("*/*")} and len(scripts) == 6
    for path, text in scripts.items():
        assert path.read_text(encoding="utf-8") == text, "run runtime/cpp/tools/completion.py"


def test_the_script_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert dit_runtime.cli.main(["completion", "fish"]) == 0
    assert capsys.readouterr().out == script(dit_runtime.cli.parser(), "fish")
    with pytest.raises(SystemExit) as ended:
        dit_serve.cli.main(["--completion", "bash"])
    assert not ended.value.code and capsys.readouterr().out == script(dit_serve.cli.parser(), "bash")
    assert dit_export.cli.main(["completion", "tcsh"]) == 2
