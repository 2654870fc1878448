"""The command `rasa`: its help, the scripts for completion, and the start of the command that the first word names.

Nothing here imports torch, which takes seconds. A command is imported once it has been named.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from rasa_theory.commands.parser import Parser
from rasa_theory.common import InputError

COMMANDS = {
    "inspect": (
        "how large updates are, and the rank that they need",
        "--base BASE_DIR --tuned TUNED_DIR --error 0.1",
    ),
    "reconstruct": (
        "how much better RaSA fits updates than LoRA does, with a limit",
        "--rank 8 --k 1",
    ),
    "extract": (
        "a LoRA or RaSA adapter from a fine-tuned model, with its error",
        "--base BASE_DIR --tuned TUNED_DIR --out adapter",
    ),
    "verify": (
        "the laws around Theorem 3.1, tried on random instances",
        "--instances 300 --seed 0",
    ),
}
"""The commands in the order of use: the purpose of each, and the flags of an example."""

_SHELLS = ("bash", "zsh", "tcsh")
_PATHS = ("base", "tuned", "source", "adapters", "out", "replay")  # flags whose values are completed as paths
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rasa` and return its exit status: that of the command, or 2 for bad usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return run(words[0], words[1:])
    parser = _parser()
    try:
        if words and not words[0].startswith("-"):
            raise InputError(f"{words[0]!r} is no command; there are {', '.join(COMMANDS)} (see --help)")
        args = parser.parse_args(words)
    except InputError as error:
        print(f"rasa: {error}", file=sys.stderr)
        return 2
    if args.print_completion is not None:
        print(completion(args.print_completion))
        return 0
    parser.print_help(sys.stderr)
    return 2


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Import the command `name`, run it with `arguments` (None: those of the process), and return its exit status."""
    with _ending_at_once():
        command = importlib.import_module(f"rasa_theory.commands.{name}")
    status: int = command.main(arguments)
    return status


def completion(shell: str) -> str:
    """Return the script that completes the flags of all commands in `shell`, one of bash, zsh and tcsh."""
    import shtab

    with _ending_at_once():
        return shtab.complete(_parser(whole=True), shell)


def _parser(whole: bool = False) -> Parser:
    """The parser of `rasa` itself; `whole`: with the flags of all commands, which are imported for that."""
    parser = Parser(
        prog="rasa",
        description=_overview(),
        usage=None if whole else "rasa COMMAND [flags]",
        epilog='Completion in bash:\n  eval "$(rasa --print-completion bash)"',
    )
    parser.add_argument(
        "--print-completion",
        choices=_SHELLS,
        metavar="SHELL",
        help="print a script that completes flags by TAB in bash, zsh or tcsh (made by shtab: it is static, so a TAB "
        "starts no Python)",
    )
    if whole:
        # argparse asks for a class, but only calls it
        commands = parser.add_subparsers(metavar="COMMAND", parser_class=_parser_of)  # type: ignore[call-overload]
        for name, (purpose, _) in COMMANDS.items():
            commands.add_parser(name, help=purpose, command=name)
    return parser


def _parser_of(command: str, **options: Any) -> Parser:
    """The parser of a command, for argparse, whose own `options` it has already."""
    import shtab

    parser: Parser = importlib.import_module(f"rasa_theory.commands.{command}").flag_parser()
    for action in parser._actions:
        if action.dest in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    return parser


def _overview() -> str:
    """The commands, each with its purpose and an example."""
    lines = [
        "How much more rank-sharing adapters (RaSA) express than LoRA, on fine-tuning updates.",
        "",
    ]
    for name, (purpose, flags) in COMMANDS.items():
        lines += [f"  {name:<13}{purpose}", f"  {'':<13}rasa {name} {flags}"]
    return "\n".join([*lines, "", "rasa COMMAND --help lists the flags of a command, with more examples."])


# An interruption of an import raises whatever the interrupted module makes of it: an ImportError without a cause, say.
# Or nothing is raised, where the module catches all errors and goes on without what it could not import. So the process
# ends in the handler of the signal itself.
@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Context for imports, in which Ctrl-C ends the process at once with exit status 130, since nothing has begun."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored, or somebody else's
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun the first speaks
        os.write(2, b"interrupted; nothing had begun\n")
    os._exit(_INTERRUPTED)
