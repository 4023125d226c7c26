"""Diffusers folder <-> single file, bit for bit; sd-scripts TOML -> stage YAML, dataset YAML. IN decides which."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.base.errors import ExitCode, Halt


def main() -> int:
    """Parse, convert, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="diffusers folder, .safetensors file, .toml or .json")
    parser.add_argument("out", metavar="OUT", type=Path, help="what to write; nothing is written over")
    parser.add_argument(
        "--tokenizers",
        type=Path,
        help="file to folder: folder with tokenizer/ and tokenizer_2/ (default: CLIP's, which are shipped)",
    )
    parser.add_argument("--config", type=Path, help="file to folder: diffusers folder with the networks' configs")
    parser.add_argument("--vae", type=Path, help="VAE, a folder or a file, that replaces the model's own")
    parser.add_argument("--processes", type=int, help="TOML: how many processes (GPUs) the run used (default: 1)")
    arguments = parser.parse_args()
    source, out = arguments.source, arguments.out

    if source.suffix.lower() in (".toml", ".json"):
        from train.tools.convert.toml import convert_file

        refuse_options(arguments, "a config", "processes")
        for line in convert_file(source, out, 1 if arguments.processes is None else arguments.processes):
            print(line)
    elif source.is_dir():
        from train.model import single_file

        refuse_options(arguments, "folder to file", "vae")
        model = source / "model" if (source / "DONE").exists() else source
        print(f"{out}: sha256 {single_file.to_single_file(model, out, vae=arguments.vae)}")
    elif source.exists():
        from train.model import single_file

        refuse_options(arguments, "file to folder", "tokenizers", "config", "vae")
        given = {"tokenizers": arguments.tokenizers, "config": arguments.config, "vae": arguments.vae}
        single_file.to_folder(source, out, **given)
        print(f"{out}: diffusers folder")
    else:
        raise Halt(ExitCode.USAGE, f"{source} does not exist")
    return ExitCode.DONE


def refuse_options(arguments: argparse.Namespace, direction: str, *read: str) -> None:
    """Halt(USAGE) for an option that this direction would ignore in silence."""
    for name in ("tokenizers", "config", "vae", "processes"):
        if name not in read and getattr(arguments, name) is not None:
            raise Halt(ExitCode.USAGE, f"--{name} has no meaning for {direction}: {arguments.source}")
