"""`PYTHON -m train.testing.parity.child.main CHECKOUT TASK FOLDER`: answers in.safetensors and in.json of the folder."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import warnings
from pathlib import Path

from train.testing.parity import loader

TASKS = {"data": "data_side", "npz": "data_side", "numbers": "numbers_side", "optimizers": "numbers_side",
         "schedule": "numbers_side", "networks": "network_side", "resave": "network_side", "vae": "network_side"}  # fmt: skip


def main(checkout: str, task: str, folder: str) -> None:
    """Load the checkout, run the task, write out.safetensors and out.json."""
    warnings.simplefilter("ignore")
    place = Path(folder)
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints as it goes
        peer = loader.load(checkout)
        from safetensors.torch import load_file, save_file

        room = importlib.import_module(f"train.testing.parity.child.{TASKS[task]}")
        given = json.loads((place / "in.json").read_text())
        tensors, facts = getattr(room, task)(peer, load_file(str(place / "in.safetensors")), given)
    packages = {name: importlib.import_module(name).__version__ for name in loader.FIRST}
    facts |= {"stand_ins": list(peer.stand_ins), "python": sys.version.split()[0], "packages": packages}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, str(place / "out.safetensors"))
    (place / "out.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
