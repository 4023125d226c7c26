"""`anix COMMAND ...`, the installed command: each command is the script of that name, from any folder."""

from __future__ import annotations

import difflib
import importlib
import sys
from types import ModuleType

from train.base.console import run_cli
from train.base.errors import ExitCode, Halt

COMMANDS = ("new", "prepare", "plan", "train", "recipe", "sample", "report", "demo", "convert", "show", "quality", "fetch", "publish", "tiny_world")


def main() -> int | None:
    """Run the command that sys.argv names and return its exit code. Raises Halt(USAGE) for an unknown one."""
    name, rest = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if name in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if name else sys.stderr)
        return ExitCode.DONE if name else ExitCode.USAGE
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise Halt(ExitCode.USAGE, f"anix {name}: no such command{meant} There are {', '.join(COMMANDS)}")
    sys.argv = [f"anix {name}", *rest]  # argparse names the program by it
    code: int | None = _module(name).main()
    return code


def usage() -> str:
    """The commands, each with the first sentence of its room."""
    lines = [f"  {name:<11} {(_module(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    return "\n".join(["usage: anix COMMAND [arguments]; anix COMMAND --help says more", "", *lines])


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"train.tools.commands.{name}")


def entry() -> None:
    """What the installed command calls; exits."""
    run_cli(main)
