"""Another trainer's own network and loss in this process, from a checkout, on weights that are ours.

Nothing of it is copied or changed: its modules are imported from the folder that an environment variable names, with empty
stand-ins for what they import for other purposes (train/testing/child.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.testing import child, timing

_SD_SCRIPTS = "SDSCRIPTS_DIR"


@dataclass(frozen=True)
class SdScripts:
    """Its U-Net, recomputing in backward as its SDXL guide advises, and its functions for loss and sizes."""

    unet: Any  # (noisy_BCHW, timesteps_B, context_BLD, vector_BV) -> prediction_BCHW
    loss: Callable[..., torch.Tensor]  # (prediction, target, "l2", "mean")
    sizes: Callable[..., torch.Tensor]

    def size_embeddings(self, size_B6: torch.Tensor) -> torch.Tensor:
        """[B, 6 x 256] of original size, crop and target size."""
        return self.sizes(size_B6[:, 0:2], size_B6[:, 2:4], size_B6[:, 4:6], size_B6.device)


def sd_scripts(parameters: Mapping[str, nn.Parameter]) -> tuple[SdScripts | None, str]:
    """(kohya-ss/sd-scripts' own U-Net, holding these very parameters, or None, why it cannot be had).

    parameters: of SDXL's U-Net under the original layout's names, without prefix. Raises RuntimeError (torch's) where the
    names or shapes are not that U-Net's.
    """
    checkout = timing.find_checkout(_SD_SCRIPTS)
    if checkout is None:
        return None, timing.why_skipped(_SD_SCRIPTS).removeprefix("skipped: ")
    for needed in ("einops", "accelerate"):  # before the stand-ins, which would take their place
        try:
            importlib.import_module(needed)
        except ImportError:
            return None, f"its U-Net needs {needed}: pip install {needed}"
    train_util = child.load_reference(str(checkout.path))
    library = {name: importlib.import_module(f"library.{name}") for name in ("sdxl_original_unet", "sdxl_train_util")}
    with torch.device("meta"):
        unet = library["sdxl_original_unet"].SdxlUNet2DConditionModel()
    unet.load_state_dict(dict(parameters), assign=True)  # the very same parameters: one set of weights and gradients
    unet.enable_gradient_checkpointing()
    unet.set_use_sdpa(True)
    return SdScripts(unet.train(), train_util.conditional_loss, library["sdxl_train_util"].get_size_embeddings), ""
