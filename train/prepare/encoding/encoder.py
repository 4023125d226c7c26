"""The VAE of the dataset: loading it, its identity, and pictures to latents.

Shape legend: B pictures of a batch, C latent channels, H W pixel rows and columns, h w those of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.model import source
from train.model.vae_file import Vae, open_vae
from train.recipe.rng import Stream, normals
from train.storage import hub
from train.storage.state_files import PRECISIONS


def find_vae(vae: str | None, key: str = "latents.vae") -> Vae:
    """The VAE that `key` names: its folder, a model folder with `vae/`, a file in any layout, or one of the hub at a commit.

    Raises Halt(USAGE) when it is not given or not there, Halt(MISMATCH) for what is no VAE of SDXL's kind.
    """
    if vae is None:
        raise Halt(ExitCode.USAGE, f"{key} is not set: name a VAE folder, a model folder or a .safetensors file")
    return open_vae(source.find(vae, key) if hub.named(vae) is not None else Path(vae), key)


class Encoder:
    """Pictures to what is stored of them. Owns the VAE, and a second one in fp32 once a picture needed it."""

    def __init__(self, vae: Any, encode: str, content: str, store: str, seed: int, device: torch.device) -> None:
        self.dtype, self.content, self.seed, self.device = PRECISIONS[encode], content, seed, device
        self.store = PRECISIONS[store]
        self._full = vae.to(device)  # fp32
        self._fast = self._full if encode == "fp32" else _copy(self._full, self.dtype)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[npt.NDArray[np.uint8]], uids: Sequence[int]) -> list[torch.Tensor | None]:
        """One [C,h,w] per picture (8 channels for moments), unscaled, in the stored dtype; None where not finite.

        A picture that is not finite is tried again alone in fp32. Which pictures share a batch must be fixed by the
        caller: on some processors sums differ with the batch.
        """
        faults.at("encode_vae", len(pixels))
        moments = self._moments(self._fast, self.dtype, pixels)
        return [self._finish(one, picture, uid) for one, picture, uid in zip(moments, pixels, uids, strict=True)]

    def _finish(self, moments: torch.Tensor, picture: npt.NDArray[np.uint8], uid: int) -> torch.Tensor | None:
        result = self._stored(moments, uid)
        if not bool(torch.isfinite(result).all()) and self._fast is not self._full:
            result = self._stored(self._moments(self._full, torch.float32, [picture])[0], uid)
        return result if bool(torch.isfinite(result).all()) else None

    def _moments(self, vae: Any, dtype: torch.dtype, pixels: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """fp32 [B,2C,h,w] on the CPU: mean and log-variance."""
        pixels_BHWC = torch.from_numpy(np.stack(pixels)).to(self.device)
        scaled_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(dtype).contiguous()
        moments: torch.Tensor = vae.encode(scaled_BCHW).latent_dist.parameters.float().cpu()
        return moments

    def _stored(self, moments: torch.Tensor, uid: int) -> torch.Tensor:
        """What is kept of one picture's moments [2C,h,w]."""
        if self.content == "moments":
            return moments.to(self.store)
        mean, logvar = moments.chunk(2, dim=0)
        if self.content == "sample":
            noise = normals(self.seed, Stream.VAE_SAMPLE, uid, 0, tuple(mean.shape))
            mean = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.from_numpy(noise)
        return mean.to(self.store)


def _copy(vae: Any, dtype: torch.dtype) -> Any:
    import copy

    return copy.deepcopy(vae).to(dtype)
