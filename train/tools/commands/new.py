"""Your pictures to a recipe: looks at folder, base and card, decides, and writes a folder whose every line has its reason."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

GOALS = ("character", "style", "concept", "continue")


def main() -> None:
    """Parse, look, decide, write, say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="folder of pictures, or the file that lists them")
    parser.add_argument("--base", metavar="FILE|FOLDER|NAME", help="model to start from: .safetensors file, diffusers folder, finished run, owner/name[@REVISION] of the hub; default: runs/ft2, else Animagine XL 3.1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: runs/<name of PICTURES>)")
    parser.add_argument("--gpu", metavar="NAME", help="card to decide for, as RTX-4090, A100-80GB; default: the one here")
    parser.add_argument("--memory-gib", type=float, metavar="N", help="its free memory, in place of the known figure")
    parser.add_argument("--goal", choices=GOALS, help="what the pictures teach; default: by what they share")
    parser.add_argument("--prior", type=Path, metavar="FOLDER", help="pictures of the class with captions, so that the rest of it stays as it is")
    parser.add_argument("--trigger", metavar="WORD", help="word that opens every caption; default: the name that all captions share")
    parser.add_argument("--vocabulary", metavar="NAME", help="whose words the base knows: animagine31, noobai, ... or a YAML file")
    parser.add_argument("--tagger", metavar="DIR", help="WD tagger (model.onnx; extra: tag) for pictures without captions")
    parser.add_argument("--license", metavar="TEXT", help="of the result, where the base's files state none")
    arguments = vars(parser.parse_args())

    from train.tools.new.make import Wish, make

    command = "anix " if Path(sys.argv[0]).name.startswith("anix") else "python scripts/"
    print("\n".join(make(Wish(**arguments), command)))
