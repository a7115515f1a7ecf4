"""Scripts for bash, zsh and fish that complete a program's commands, options and values, made from its parsers.

What an option takes is read from its choices, its `Known` names and its metavar: BUNDLE and FOLDER are folders, FILE…
and CHECKPOINT are files. The scripts do not start Python.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from dit_runtime.console import answer
from dit_runtime.options import Command, Known, Parser

SHELLS = ("bash", "zsh", "fish")
FOLDERS = ("BUNDLE", "FOLDER")


class Option(NamedTuple):
    """An option, or with no flags a positional argument, as a shell completes it."""

    flags: tuple[str, ...]
    values: tuple[str, ...]  # that are known
    path: str  # "file" or "folder"; "": the value is no path
    takes: bool  # whether a value follows
    text: str


class Page(NamedTuple):
    """The words that may follow those of a command."""

    words: tuple[str, ...]  # "demo", "show"
    text: str
    options: tuple[Option, ...]
    commands: tuple[tuple[str, str], ...]  # name and text of each


def pages(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[Page]:
    """Yield the page of a program, and of each of its commands."""
    commands = tuple((name, _first(part)) for name, part in parser.commands.items())
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    yield Page(words, _first(parser), tuple(map(_option, actions)), commands)
    for name, part in parser.commands.items():
        yield from pages(part, (*words, name))


def _first(parser: Parser) -> str:
    return (parser.description or "").split("\n")[0].rstrip(".")


def _option(action: argparse.Action) -> Option:
    known = action.choices or (action.type if isinstance(action.type, Known) else ())
    name = action.metavar if isinstance(action.metavar, str) else ""
    is_folder = any(word in FOLDERS for word in re.findall("[A-Z]+", name))
    path = "folder" if is_folder else "file" if re.search("FILE|CHECKPOINT", name) else ""
    text = re.split("[;:.] ", (action.help or "") % {"prog": ""})[0] if action.help is not argparse.SUPPRESS else ""
    return Option(tuple(action.option_strings), tuple(map(str, known)), path, action.nargs != 0, text)


def script(parser: Parser, shell: str) -> str:
    """Return the script that completes a program's commands in a shell; the shell sources or autoloads it."""
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return "\n".join(write(parser.prog, list(pages(parser)))) + "\n"


def add_options(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")


def run(options: argparse.Namespace) -> int:
    text = script(options.root, options.shell)
    answer(options, {"shell": options.shell, "script": text}, text.rstrip())
    return 0


COMMAND = Command(
    "completion",
    "print a script that completes this program's words in a shell",
    add_options,
    run,
    (
        "completion bash > ~/.local/share/bash-completion/completions/{program}",
        "completion zsh > ~/.zfunc/_{program}  # where fpath has ~/.zfunc",
        "completion fish > ~/.config/fish/completions/{program}.fish",
    ),
)


class Print(argparse.Action):
    """Prints the script of a program that has no commands, and ends it."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, value: Any, *__: object) -> NoReturn:
        assert isinstance(parser, Parser)
        print(script(parser, value), end="")
        parser.exit()


def _bash(program: str, known: list[Page]) -> Iterator[str]:
    name = _function(program)
    yield f"{name}() {{"
    yield "    local word=${COMP_WORDS[COMP_CWORD]} last=${COMP_WORDS[COMP_CWORD-1]} path= index"
    if commands := [_path(page) for page in known if page.words]:
        yield "    for ((index = 1; index < COMP_CWORD; index++)); do"
        yield '        case "$path ${COMP_WORDS[index]}" in'
        yield f'            {"|".join(commands)}) path+=" ${{COMP_WORDS[index]}}" ;;'
        yield "        esac"
        yield "    done"
    yield '    case "$path $last" in'
    for page in known:
        for option in page.options:
            if option.flags and option.takes:
                patterns = "|".join(f'"{" ".join(["", *page.words, flag])}"' for flag in option.flags)
                yield f"        {patterns}) {_compgen(option.values, option.path)}; return ;;"
    yield "    esac"
    yield '    case "$path" in'
    for page in known:
        flags = [flag for option in page.options for flag in option.flags]
        free = [option for option in page.options if not option.flags]
        values = [name for name, _ in page.commands] + [value for option in free for value in option.values]
        paths = [option.path for option in free if option.path]
        yield f"        {_path(page)})"
        yield f"            if [[ $word == -* ]]; then {_compgen(flags)}; else {_compgen(values, *paths[:1])}; fi ;;"
    yield "    esac"
    yield "}"
    yield f"complete -F {name} {program}"


def _path(page: Page) -> str:
    return f'"{"".join(f" {word}" for word in page.words)}"'


def _compgen(values: Sequence[str], path: str = "") -> str:
    if values or not path:
        return f"COMPREPLY=($(compgen -W '{' '.join(values)}' -- \"$word\"))"
    return f'compopt -o filenames; COMPREPLY=($(compgen -{"d" if path == "folder" else "f"} -- "$word"))'


def _zsh(program: str, known: list[Page]) -> Iterator[str]:
    yield f"#compdef {program}"
    for page in known:
        yield f"{_function(program, *page.words)}() {{"
        yield "    local state line"
        yield "    _arguments -C \\"
        yield from (f"        {_zsh_option(option)} \\" for option in page.options)
        if not page.commands:
            yield "        && return"
            yield "}"
            continue
        listed = " ".join(f'{name}\\:"{_escaped(text)}"' for name, text in page.commands)
        yield f"        {_quoted(f'1:command:(({listed}))')} '*::argument:->rest' && return"
        yield '    case "$line[1]" in'
        yield from (f"        {name}) {_function(program, *page.words, name)} ;;" for name, _ in page.commands)
        yield "    esac"
        yield "}"
    start = _function(program)  # autoloaded, the file is the function's body; sourced, it defines it
    yield f'if [ "$funcstack[1]" = {start} ]; then {start} "$@"; else compdef {start} {program}; fi'


def _zsh_option(option: Option) -> str:
    paths = {"file": "_files", "folder": "_files -/", "": " "}
    action = f"({' '.join(option.values)})" if option.values else paths[option.path]
    if not option.flags:
        return _quoted(f"*:{_escaped(option.text)}:{action}")
    flags = option.flags[0] if len(option.flags) == 1 else "{" + ",".join(option.flags) + "}"
    return flags + _quoted(f"[{_escaped(option.text)}]" + (f":value:{action}" if option.takes else ""))


def _function(program: str, *words: str) -> str:
    return "_".join(["", program, *words]).replace("-", "_")


def _escaped(text: str) -> str:
    return re.sub(r"([][:\\\"])", r"\\\1", text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish(program: str, known: list[Page]) -> Iterator[str]:
    yield f"complete -c {program} -f"
    for page in known:
        conditions = [f"__fish_seen_subcommand_from {word}" for word in page.words]
        inner = " ".join(name for name, _ in page.commands)
        if inner:
            conditions.append(f"not __fish_seen_subcommand_from {inner}" if conditions else "__fish_use_subcommand")
        start = f"complete -c {program}" + (f" -n '{'; and '.join(conditions)}'" if conditions else "")
        for name, text in page.commands:
            yield f"{start} -a {name} -d {_fish_quoted(text)}"
        for option in page.options:
            yield f"{start} {_fish_option(option)}"


def _fish_option(option: Option) -> str:
    words = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
    paths = {"file": "-F", "folder": "-f -a '(__fish_complete_directories)'", "": ""}
    if option.takes:
        words += ["-r"] if option.flags else []
        words.append(f"-f -a {_fish_quoted(' '.join(option.values))}" if option.values else paths[option.path])
    return " ".join(filter(None, [*words, f"-d {_fish_quoted(option.text)}"]))


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
