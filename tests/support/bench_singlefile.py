"""By hand: a full-size SDXL with random bf16 weights, single file -> folder -> single file; seconds and peak memory.

    python tests/support/bench_singlefile.py /path/with/21GB [tokenizers]     # prints one JSON object, cleans up

Each conversion runs in a process of its own, so that its peak is its own. With a tokenizers folder, stock diffusers
loads both afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from train.model import sdxl
from train.storage import tensor_files

PIECE_VALUES = 8 << 20


def random_blob(shape: tuple[int, ...], seed: int) -> tensor_files.Blob:
    """bf16 values of about +-1e-2, finite, different for every tensor."""

    def pieces() -> Iterator[memoryview]:
        generator = np.random.default_rng(seed)
        left = int(np.prod(shape))
        while left:
            bits = generator.integers(0, 2**16, size=min(left, PIECE_VALUES), dtype=np.uint16)
            yield memoryview(((bits & 0x80FF) | 0x3C00).tobytes())  # sign and mantissa random, exponent fixed
            left -= len(bits)

    return tensor_files.Blob("BF16", shape, pieces)


def measured(*command: str) -> dict[str, float]:
    """Wall seconds and peak resident memory of a Python process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return {"wall_s": round(time.perf_counter() - started, 1), "peak_MiB": round(usage.ru_maxrss / 1024)}


LOAD = """
import sys, torch
from diffusers import StableDiffusionXLPipeline as P
kind, path, config = sys.argv[1:4]
kwargs = {"torch_dtype": torch.bfloat16, "add_watermarker": False}
pipe = P.from_pretrained(path, **kwargs) if kind == "folder" else P.from_single_file(
    path, config=config, local_files_only=True, **kwargs)
networks = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
print(kind, sum(p.numel() for network in networks for p in network.parameters()), file=sys.stderr)
"""


def main() -> None:
    """Make, convert, compare, report."""
    with TemporaryDirectory(dir=sys.argv[1]) as place:
        one, folder, two = (os.path.join(place, name) for name in ("one.safetensors", "folder", "two.safetensors"))
        shapes = {link.single: link.shape for link in sdxl.links(sdxl.STANDARD)} | {sdxl.LOGIT_SCALE: ()}
        blobs = {name: random_blob(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
        digest = tensor_files.write(one, blobs, {"modelspec.license": "CC0"})
        convert = str(Path(__file__).resolve().parents[2] / "scripts/convert.py")
        options = ["--tokenizers", sys.argv[2]] if len(sys.argv) > 2 else []
        report: dict[str, object] = {"bytes": os.path.getsize(one), "tensors": len(shapes)}
        report["to_folder"] = measured(convert, one, folder, *options)
        report["to_single_file"] = measured(convert, folder, two)
        with open(two, "rb") as file:
            import hashlib

            report["bit_equal"] = hashlib.file_digest(file, "sha256").hexdigest() == digest
        if options:
            os.unlink(one)
            report["from_pretrained"] = measured("-c", LOAD, "folder", folder, folder)
            report["from_single_file"] = measured("-c", LOAD, "single", two, folder)
        report["self_peak_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(report))


if __name__ == "__main__":
    main()
