"""Exit codes of every command, and the one exception that carries them. Standard library only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from train.base import quiet, streams
from train.base.errors import ExitCode, Halt
from train.base.secrets import MaskingFilter, mask

EXIT_NOTE = "ANIX_EXIT_NOTE"  # environment: files NAME.<rank> for the processes' exit codes, which launchers replace by 1


def _printable(text: str) -> str:
    """Names from untrusted files may hold what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def log_to_stderr() -> None:
    """What our modules log, from INFO on, goes to stderr, without other libraries' idle notices; secrets are masked."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(MaskingFilter())
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("anix")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    quiet.install()


def run_cli(main: Callable[[], int | None], *, answers: bool = True) -> NoReturn:
    """Run `main` and exit with its code; a Halt becomes one message on stderr, not a traceback. Secrets are masked.

    Nobody listening is no failure. With `answers` (the result stands on stdout) a full disk under stdout is one: 8.
    """
    streams.install()
    log_to_stderr()
    try:
        code = main() or 0
    except Halt as halt:
        print(f"error: {_printable(mask(halt.message))}", file=sys.stderr)
        code = int(halt.code)
    except Exception:
        print(mask(traceback.format_exc()), file=sys.stderr)
        code = int(ExitCode.UNEXPECTED)
    lost = streams.finish()
    if lost is not None and answers and code == 0:
        print(f"error: the answer could not be written to stdout: {lost.strerror}", file=sys.stderr)
        code = int(ExitCode.CANNOT_WRITE)
        streams.finish()
    _leave_note(code)
    sys.exit(code)


def _leave_note(code: int) -> None:
    """The code where scripts/recipe.py looks for it: a run that is refused its directory has no exit.json."""
    note = os.environ.get(EXIT_NOTE)
    if note:
        with contextlib.suppress(OSError):
            Path(f"{note}.{int(os.environ.get('RANK', '0'))}").write_text(str(code))


def noted_codes(note: Path) -> dict[int, int]:
    """Exit codes that processes left beside `note`, by rank; a launcher ends the others before they can leave theirs."""
    texts = {int(path.suffix[1:]): path.read_text() for path in note.parent.glob(f"{note.name}.*")}
    return {rank: int(text) for rank, text in sorted(texts.items()) if text.isdigit()}
