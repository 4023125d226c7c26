"""Diffusers folder <-> single file; an adapter in kohya's names <-> its folder; merge, extract, add; sd-scripts TOML -> YAML, and its options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.base.errors import ExitCode, Halt


def main() -> int:
    """Parse, convert, say what was written."""
    if sys.argv[1:] == ["options"]:
        from train.tools.convert import options

        print(options.markdown(), end="")
        return ExitCode.DONE
    if sys.argv[1:2] and sys.argv[1] in OF_SEVERAL:
        return _of_several(sys.argv[1], sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="diffusers folder, .safetensors file, checkpoint of a run, .toml or .json")
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
    elif _is_checkpoint(source):
        from train.tools.convert import checkpoints

        refuse_options(arguments, "a checkpoint")
        for line in checkpoints.convert(source, out):
            print(line)
    elif _is_adapter(source):
        from train.tools.convert import adapters

        refuse_options(arguments, "an adapter", "config")
        for line in adapters.convert(source, out, arguments.config):
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


OF_SEVERAL = ("merge", "extract", "add")


def _is_checkpoint(source: Path) -> bool:
    from train.tools.convert import checkpoints  # loads torch

    return source.exists() and checkpoints.is_one(source)


def _is_adapter(source: Path) -> bool:
    from train.model.adapters.reading import is_adapter  # loads torch

    return is_adapter(source)


def _of_several(what: str, words: list[str]) -> int:
    """convert.py merge, extract, add: several models or adapters to one file."""
    parser = argparse.ArgumentParser(prog=f"convert.py {what}")
    if what == "merge":
        parser.description = "BASE with adapters added to its weights, each times its weight (1), summed in fp32"
        parser.add_argument("base", type=Path, metavar="BASE", help="run, checkpoint, diffusers folder or .safetensors file")
        parser.add_argument("loras", nargs="+", metavar="LORA[:weight]", help="file or folder of an adapter")
        parser.add_argument("out", type=Path, metavar="OUT", help="a .safetensors file, or a folder; nothing is written over")
    elif what == "extract":
        parser.description = "what a model is away from its base, as an adapter: by the rank, or by the share that each layer keeps"
        parser.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint, diffusers folder or .safetensors file")
        parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="default: <MODEL>-lora here; nothing is written over")
        parser.add_argument("--base", type=Path, required=True, help="what MODEL was trained from")
        parser.add_argument("--rank", type=int, help="of every layer")
        parser.add_argument("--energy", type=float, help="share of each layer's squared difference that is kept, for example 0.95")
        parser.add_argument("--format", default="kohya", choices=("kohya", "diffusers"), help="a .safetensors file, or a folder")
        parser.add_argument("--matrices-only", action="store_true", help="kohya: without norms and biases, so that stock diffusers reads it too")
        parser.add_argument("--dtype", default="fp16", choices=("fp16", "fp32"), help="of the adapter's weights")
    else:
        parser.description = "A + X (B - C), summed in fp32: what B learnt from C, added to A"
        for name in "abc":
            parser.add_argument(name, type=Path, metavar=name.upper(), help="run, checkpoint, diffusers folder or .safetensors file")
        parser.add_argument("out", type=Path, metavar="OUT", help="a .safetensors file, or a folder; nothing is written over")
        parser.add_argument("--times", type=float, default=1.0, metavar="X", help="default: 1")
    a = parser.parse_intermixed_args(words)
    from train.tools.convert import adapters

    if what == "merge":
        lines = adapters.merge(a.base, a.loras, a.out)
    elif what == "extract":
        options = {name: getattr(a, name) for name in ("rank", "energy", "dtype", "matrices_only")}
        lines = adapters.extract(a.model, a.base, a.out, form=a.format, **options)
    else:
        lines = adapters.add(a.a, a.b, a.c, a.times, a.out)
    for line in lines:
        print(line)
    return ExitCode.DONE


def refuse_options(arguments: argparse.Namespace, direction: str, *read: str) -> None:
    """Halt(USAGE) for an option that this direction would ignore in silence."""
    for name in ("tokenizers", "config", "vae", "processes"):
        if name not in read and getattr(arguments, name) is not None:
            raise Halt(ExitCode.USAGE, f"--{name} has no meaning for {direction}: {arguments.source}")
