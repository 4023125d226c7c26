"""InvokeAI: probes a file or folder as its model manager does, and opens a single file as its loader does.

A folder is opened there as any diffusers folder is, by `from_pretrained` of each part: `ask_diffusers.py` asks that.
"""

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
    """Probe; of a single file then what its loader calls, StableDiffusionXLPipeline.from_single_file(path)."""
    config = ModelConfigFactory.from_model_on_disk(ASKED.get("folder", ASKED.get("file")), {"hash": "not asked"}).config
    facts = {"architecture": f"{config.base.value} {config.type.value} {config.format.value}", "record": config.prediction_type.value}
    if "folder" in ASKED:
        asking.answer(facts, {}, OUT)
    else:
        ask_diffusers.drawn(ASKED, *ask_diffusers.opened(ASKED, torch.float16), OUT, **facts)


main()
