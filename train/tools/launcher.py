"""The launcher that recipe.py starts: accelerate or torchrun, silent about a trainer that has said why it ended.

Both print a traceback of their own whenever a worker's code is not 0, under the one message that matters. Nothing from
outside can switch that off for several processes, so they are called from here. Their own failures are told in a line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

if not __package__:  # started as a file: train/tools/ is first on sys.path, and its modules would shadow others
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from train.base.console import EXIT_NOTE, run_cli
from train.base.errors import ExitCode, Halt


def main() -> int:
    """`launcher.py accelerate|torchrun [its arguments] script [arguments]`; 0, or 1 where a worker failed."""
    kind = sys.argv.pop(1)
    logging.disable(logging.ERROR)  # which worker failed, in what order, and how many threads it had
    try:
        if kind == "accelerate":
            from accelerate.commands.launch import main as launch

            launch()
        else:
            from torch.distributed.run import get_args_parser, run

            run(get_args_parser().parse_args(sys.argv[1:]))
    except KeyboardInterrupt:  # the trainer got it too, saves, and says so
        return ExitCode.STOPPED
    except Exception as error:
        died = codes_of(error)
        if died is None:
            raise Halt(ExitCode.USAGE, f"{kind} cannot start the trainer: {error}") from error
        # A worker that left by itself has said why; torchrun ends the others with SIGTERM.
        for number in sorted({-code for code in died if code < 0} - {signal.SIGTERM}):
            print(f"error: a process of the trainer died of {signal.Signals(number).name}", file=sys.stderr)
        return ExitCode.UNEXPECTED
    finally:
        os.environ.pop(EXIT_NOTE, None)  # the workers', who had it from here: what ends now is not the trainer
    return ExitCode.DONE


def codes_of(error: BaseException) -> list[int] | None:
    """Exit codes of the workers that a launcher's exception speaks of, below 0 for signals; None = of none."""
    kind = type(error).__name__
    if kind == "CalledProcessError":
        return [int(getattr(error, "returncode", 1))]
    if kind == "ChildFailedError":
        return [int(failure.exitcode) for failure in getattr(error, "failures", {}).values()]
    return [] if kind == "SignalException" else None  # torchrun was asked to stop, and its workers with it


if __name__ == "__main__":
    run_cli(main)
