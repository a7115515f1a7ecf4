"""Commands and their options: the parser, its help page, what commands share, and the bundle that they open."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dit_runtime import backends, console
from dit_runtime.bundle.signature import read_key
from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import VERSION
from dit_runtime.pipeline import Pipeline

WIDTH = 100  # of a help page, on a terminal that is wider


class Known(tuple[str, ...]):
    """The names that an option completes to. It takes others too: they are checked where they are used."""

    def __call__(self, text: str) -> str:
        return text


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Lays a help page out: `-o, --output FILE`, and `…` for values that repeat."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns, WIDTH) - 2
        super().__init__(prog, **{"max_help_position": 28, "width": width} | options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # which names have

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        name = action.metavar if isinstance(action.metavar, str) else default_metavar
        repeated = {"+": f"{name} …", "*": f"[{name} …]", "?": f"[{name}]"}
        if isinstance(action.metavar, tuple) and action.nargs == "+":
            return f"{action.metavar[0]} [{action.metavar[1]} …]"
        return repeated.get(str(action.nargs)) or super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = self._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
        return f"{', '.join(action.option_strings)} {values}".rstrip()


class Parser(argparse.ArgumentParser):
    """Raises its errors as UsageError, so that they are one line too. Options are written in full."""

    def __init__(self, **options: Any) -> None:
        usual: dict[str, Any] = {"formatter_class": Formatter, "allow_abbrev": False, "add_help": False}
        super().__init__(**usual | options)
        self._positionals.title, self._optionals.title = "arguments", "general"
        self.add_argument("-h", "--help", action="help", help="print this page")
        self.commands: dict[str, Parser] = {}
        self.examples: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here, so that the error names the command's own page."""
        options, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized argument {rest[0]}{nearest(rest[0], self._option_string_actions)}")
        return options, rest

    def format_help(self) -> str:
        groups = self._action_groups
        groups.append(groups.pop(groups.index(self._optionals)))  # what all commands have comes last
        self.usage = f"{self.prog} {self._synopsis()}"
        return super().format_help()

    def _synopsis(self) -> str:
        if self.commands:
            return "COMMAND [OPTION …]"
        layout = Formatter(self.prog)
        required = [action for action in self._actions if action.option_strings and action.required]
        words = [f"{action.option_strings[0]} {layout._format_args(action, '')}" for action in required]
        words += [layout._format_args(action, action.dest) for action in self._positionals._group_actions]
        return " ".join([*words, "[OPTION …]"])


class Command(NamedTuple):
    """A command: one line in its program's help, and a page of its own."""

    name: str
    text: str  # what it does, as an imperative
    add_options: Callable[[Parser], object]
    run: Callable[[argparse.Namespace], int]
    examples: Sequence[str] = ()  # the words after the program's name; ` # …` says what they do
    parts: Mapping[str, Sequence[Command]] = {}  # commands of its own, by group


def add_commands(parser: Parser, groups: Mapping[str, Sequence[Command]]) -> Parser:
    """Give a program, or a command, its commands; its help lists them by group."""
    adder = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS)
    lines = [parser.description or "", ""]
    for title, commands in groups.items():
        lines.append(f"{title}:")
        for command in commands:
            lines.append(f"  {command.name:<11} {command.text}")
            parser.commands[command.name] = _add(parser, adder, command)
    parser.description = "\n".join(lines)
    parser.epilog = f"`{parser.prog} COMMAND --help` has the options of a command, with examples."
    return parser


def _add(root: Parser, adder: Any, command: Command) -> Parser:
    parser: Parser = adder.add_parser(command.name, description=f"{command.text[0].upper()}{command.text[1:]}.")
    if command.parts:
        return add_commands(parser, command.parts)
    command.add_options(parser)
    add_general(parser)
    parser.set_defaults(command=command.run, root=root)
    set_examples(parser, command.examples)
    return parser


def set_examples(parser: Parser, examples: Sequence[str]) -> None:
    if examples:
        program = parser.prog.split()[0]
        parser.examples = [f"{program} {example.format(program=program)}" for example in examples]
        parser.epilog = "\n  ".join(["examples:", *parser.examples])


def add_general(parser: Parser) -> None:
    """Add the options that all commands have."""
    add = parser.add_argument
    add("--quiet", action="store_true", help="print no progress, no notes and no tables of what passed")
    add(console.JSON, action="store_true", help="print one JSON object on standard output, for errors too")
    add_debug(parser)


def add_debug(parser: Parser) -> None:
    parser.add_argument(console.DEBUG, action="store_true", help="show the traceback of an error")


def add_version(parser: Parser) -> None:
    text = "print the version of the package"
    parser.add_argument("--version", action="version", version=f"{parser.prog} {VERSION}", help=text)


def add_bundle(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")


def add_engine(parser: Parser, low_memory: bool = True) -> Any:
    group = parser.add_argument_group("engine")
    group.add_argument("--threads", type=int, metavar="N", help="threads of an engine; default: the engine's choice")
    group.add_argument(
        "--provider", type=Known(("cpu", "cuda")), metavar="NAME", help="ONNX Runtime's provider: cpu, cuda, cuda:N"
    )
    if low_memory:
        group.add_argument("--low-memory", action="store_true", help="keep one stage in memory at a time")
    return group


def add_public_key(add: Callable[..., object]) -> None:
    text = "open a bundle only if the owner of this Ed25519 key has signed it"
    add("--public-key", type=read_public_key, metavar="FILE", help=text)


def read_public_key(file: str) -> bytes:
    return read_key(Path(file))


def add_size(parser: Any, rest: str = "default: its first") -> None:
    text = f"one of the bundle's sizes, 512 or 512x768 for height x width; {rest}"
    parser.add_argument("--size", metavar="SIZE", help=text)


def load_bundle(options: argparse.Namespace, size: str | None = None) -> Pipeline:
    names = ("threads", "provider", "low_memory", "public_key")
    pipe = Pipeline.load(options.bundle, size=size, **{name: getattr(options, name) for name in names})
    lines = [backends.note(stage.backend, stage.precision) for stage in pipe.manifest.stages]
    for line in dict.fromkeys(lines):
        if line:
            console.note(options, f"note: {line}")
    return pipe
