"""Peak memory of one real full-size update on the host beside the planner's prediction.

`python tests/support/bench_memory.py [--exempt 3] [--size 1024x1024]`: stages 2/3 with bf16 weights and Adafactor, random weights,
one image, 13 GB to 18 GB of memory and some minutes. By hand: it needs the memory of a training machine. What the
prediction calls workspace (a CUDA context, cuDNN) is not there on a host, so it is left out on both sides. Set
MALLOC_MMAP_THRESHOLD_=1048576: else freed tensors stay in glibc's arenas and the peak is that of its fragmentation.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from train.config.stage import LossConfig, NoiseConfig
from train.diffusion import noise
from train.diffusion.objective import Diffusion, image_losses
from train.model import memory
from train.model.memory import GIB, Setup
from train.model.networks import parameter_groups
from train.optim import stepping
from train.testing.gpu.updates import batches, build, make_optimizer
from train.testing.gpu.variants import Variant


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def main() -> None:
    """Build, update once, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exempt", type=int, default=0, choices=range(6), help="checkpointing steps left out: 0 = full")
    parser.add_argument("--size", default="1024x1024")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    variant = Variant("memory", 2, 1, 1, arguments.exempt, precision="bf16", expected_mfu=0.0)
    before = resident("VmRSS")
    torch.set_default_dtype(torch.bfloat16)
    networks = build(variant, torch.device("cpu"), tiny=False)
    torch.set_default_dtype(torch.float32)
    optimizer = make_optimizer(variant, networks)
    diffusion = Diffusion(noise.alphas_cumprod(), NoiseConfig(), LossConfig(), "bf16")
    gc.collect()
    built = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making random weights
    started = time.perf_counter()
    (batch,) = batches(variant, torch.device("cpu"), 0, (width, height))
    image_losses(networks, batch, diffusion).sum().backward()
    after_backward = resident("VmHWM")
    parameters = {f"{g}.{n}": p for g, named in parameter_groups(networks).items() for n, p in named.items()}
    stepping.apply(optimizer, parameters, update=0, rounding_seed=1)
    peak = resident("VmHWM") - before
    predicted = memory.predict(Setup(False, "adafactor", "bf16", "bf16"), (width, height), 1, arguments.exempt)
    backward = predicted.total - predicted.workspace - predicted.optimizer  # whose state the first step makes
    rows = (
        ("networks", predicted.weights + predicted.frozen, built - before),
        ("to the end of backward", backward, after_backward - before),
        ("whole update", predicted.total - predicted.workspace, peak),
    )
    print(f"{arguments.size}, checkpointing steps left out {arguments.exempt}, {time.perf_counter() - started:.0f} s")
    for name, told, found in rows:
        print(f"{name:24} predicted {told / GIB:6.2f} GiB, measured {found / GIB:6.2f} GiB, {told / found - 1:+.1%}")


if __name__ == "__main__":
    main()
