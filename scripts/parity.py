#!/usr/bin/env python
"""Our arithmetic against the original trainer's own code: a verdict per row, for a checkout of sd-scripts or of its released fork.

The checkout's modules run in the Python of --python, which needs that trainer's requirements (torch, transformers,
diffusers, accelerate, opencv-python-headless, imagesize, toml, voluptuous, einops, ftfy; today's also rich). Nothing of it is copied.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import tempfile

from train.base.console import run_cli
from train.base.errors import ExitCode, Halt


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-scripts", metavar="DIR", help="the checkout (default: $SDSCRIPTS_DIR)")
    parser.add_argument("--python", metavar="PY", help="Python that runs it (default: this one)")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="of the networks; full takes 18 GiB of memory (default: tiny)")
    parser.add_argument("--config", default="configs/as_run/pretrain.yaml", help="whose switches are ours (default: the released run's)")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the config, as model.timestep_embedding=correct")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="the table as an HTML page")
    parser.add_argument("--record", type=Path, metavar="JSON", help="compare nothing: write the checkout's values as a golden file")
    parser.add_argument("--origin", help="with --record: owner/name of the checkout's repository, which the file names")
    return parser.parse_args()


def claim(option: str, file: Path) -> None:
    """Halt(CANNOT_WRITE) before minutes are spent that could not be kept."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{option} {file} cannot be written: {error.strerror}") from error


def main() -> int:
    """Exit code 1 when a row differs and nobody can say why."""
    arguments = parse()
    from train.testing.parity import golden, inputs, table
    from train.testing.parity.checkout import open_checkout

    if arguments.record and not arguments.origin:
        raise Halt(ExitCode.USAGE, "--record needs --origin owner/name: whose values they are")
    checkout = open_checkout(arguments.sd_scripts, arguments.python)
    config = inputs.switches(arguments.config, arguments.changes)
    for option, file in (("--out", arguments.out), ("--record", arguments.record)):
        if file is not None:
            claim(option, file)
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        if arguments.record:
            golden.write(arguments.record, golden.record(config, checkout, Path(work), arguments.origin))
            print(arguments.record)
            return ExitCode.DONE
        report = table.compare(
            config, checkout, Path(work), size=arguments.size, settings=" ".join([arguments.config, *arguments.changes]),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    print(table.describe(report), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(table.page(report), encoding="utf-8")
    return ExitCode.UNEXPECTED if report.different else ExitCode.DONE


if __name__ == "__main__":
    run_cli(main)
