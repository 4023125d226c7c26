"""InvokeAI: probes a file or folder as its model manager does, and opens a single file as its loader does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, ".")
import ask_diffusers
import asking
import torch

ASKED, OUT = asking.request(), sys.argv[2]
sys.argv = ["invokeai-web"]

from invokeai.backend.model_manager.configs.factory import ModelConfigFactory


def main() -> None:
    """Probe; then what its loader calls, StableDiffusionXLPipeline.from_single_file(path) or from_pretrained."""
    path = ASKED.get("folder", ASKED.get("file"))
    config = ModelConfigFactory.from_model_on_disk(path, {"hash": "not asked"}).config
    pipe, said = ask_diffusers.opened(ASKED, torch.float32 if "folder" in ASKED else torch.float16)
    facts = {"architecture": f"{config.base.value} {config.type.value} {config.format.value}", "record": config.prediction_type.value}
    ask_diffusers.drawn(ASKED, pipe, said, OUT, **facts)


main()
