"""One self-contained HTML page about one or several runs: curves, held-out loss, samples, configs, lineage."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.base.errors import ExitCode, Halt


def main() -> None:
    """Parse, write, print the path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, in the order of the recipe")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="")
    parser.add_argument(
        "--samples", action="append", default=[], metavar="NAME=DIR",
        help="pictures by scripts/sample.py that join the comparison, e.g. base=samples/base (repeatable)",
    )  # fmt: skip
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:weight]", help="adapter to tell of beside those of the runs (repeatable)")
    parser.add_argument("--quality", type=Path, metavar="JSON", help="what scripts/quality.py measured")
    parser.add_argument("--loss", type=Path, metavar="JSON", help="what scripts/quality.py loss measured: a base, it with an adapter, a full finetune side by side")
    arguments = parser.parse_args()
    extra: dict[str, Path] = {}
    for given in arguments.samples:
        name, equals, folder = given.partition("=")
        if not equals or not Path(folder).is_dir():
            raise Halt(ExitCode.USAGE, f"--samples {given}: needs NAME=DIR with an existing folder")
        if name in extra:
            raise Halt(ExitCode.USAGE, f"--samples {given}: the name {name} is given twice, first for {extra[name]}")
        extra[name] = Path(folder)

    from train.tools.report.page import write_page

    runs, out, quality = arguments.runs, arguments.out, arguments.quality
    print(write_page(runs, out, title=arguments.title, extra_samples=extra, quality=quality, losses=arguments.loss, loras=arguments.lora))
