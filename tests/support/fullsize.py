"""An SDXL of the released size with random weights as a single file, and what our own encoders say of a text.

Clients know SDXL by its sizes, so a small one is none to them. 6.9 GB on disk; no more than one tensor in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from train.base.files import write_json
from train.config.stage import ExportConfig
from train.engine import export
from train.model import folder as model_folder
from train.model import networks, sdxl, single_file, text
from train.model.adapters import writing
from train.model.adapters.layers import Layer, problem
from train.model.adapters.names import names_of
from train.model.prediction import told_scheduler
from train.observe import anymodel
from train.storage import tensor_files

POOL = 1 << 20
RECORD = {"stage": "full", "date": "2026-11-30T00:00:00Z", "license": "CC0-1.0"}


@lru_cache(maxsize=1)
def _pool() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(POOL).astype(np.float32)


def _pieces(name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
    """Norms around 1, small biases, matrices that keep the size of what goes through them."""
    if len(shape) == 1:
        scale, shift = (0.1, 1.0) if "norm" in name and name.endswith("weight") else (0.05, 0.0)
    else:
        scale, shift = (0.05 if "embedding.weight" in name else 1 / np.sqrt(prod(shape[1:]))), 0.0
    at, left = zlib.crc32(name.encode()) % POOL, prod(shape)
    values = (np.concatenate([_pool()[at:], _pool()[:at]]) * scale + shift).astype(np.float16)
    while left > 0:
        yield memoryview(values[: min(left, POOL)].view(np.uint8))
        left -= POOL


def write(out: Path, prediction: str, zero_terminal_snr: bool) -> Path:
    """The export of a stage that trained this objective, in SDXL's own sizes."""
    scheduler = told_scheduler(sdxl.STANDARD["scheduler"], v=prediction == "v", zero_terminal_snr=zero_terminal_snr)
    configs = {**sdxl.STANDARD, "scheduler": scheduler}
    weights = {
        name: tensor_files.Blob("F16", shape, partial(_pieces, name, shape))
        for name, shape in sdxl.folder_shapes(configs).items()
    }
    metadata = export.metadata_of(RECORD, ExportConfig(), prediction, (0, 1000))
    single_file.write_single_file(out, weights, configs, metadata)
    return out


@dataclass(frozen=True)
class Text:
    """A caption of one chunk: its ids and what our encoders make of it, in fp32."""

    caption: str
    ids: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # of both encoders, [1,77]
    context: npt.NDArray[np.float32]  # [1,77,2048]
    pooled: npt.NDArray[np.float32]  # [1,1280]
    pooled_untransposed: npt.NDArray[np.float32]


@torch.no_grad()
def encoded(model: Path, caption: str) -> Text:
    """What our code says of `caption` under the weights of a model file or folder."""
    local = anymodel.open_any(model, hashed=False)
    encoders = [networks.fill(name, local.configs[name], local.weights, model) for name in networks.GROUPS[1:]]
    tokens = text.load_tag_tokenizer(local.tokenizers)
    ids = tokens.chunk_ids(tokens.fit([caption], [], 75)[0], 75)
    given = [torch.from_numpy(one)[None] for one in ids]
    found = [text.encode(*encoders, *given, context="chunks", pooled_projection=how) for how in ("correct", "sd_scripts")]
    return Text(caption, ids, found[0][0].numpy(), found[0][1].numpy(), found[1][1].numpy())


def without_weights(folder: Path, prediction: str = "epsilon", zero_terminal_snr: bool = False) -> Path:
    """The folder of a stage that trained this objective, in SDXL's own sizes: configs and tokenizers alone."""
    folder.mkdir(parents=True)
    model_folder.write_tokenizers(None, folder)
    for network in sdxl.NETWORKS:
        (folder / network).mkdir()
        write_json(folder / network / "config.json", model_folder.loadable(network, sdxl.STANDARD[network]))
    v = prediction == "v"
    model_folder.write_pipeline(folder, told_scheduler(sdxl.STANDARD["scheduler"], v=v, zero_terminal_snr=zero_terminal_snr))
    return folder


def hub(folder: Path) -> Path:
    """A library's cache (HF_HOME) that holds what the hub says of SDXL, without weights.

    Stock loaders ask it for the parts that a single file has no place for, the scheduler among them.
    """
    repository = folder / "hub/models--stabilityai--stable-diffusion-xl-base-1.0"
    without_weights(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    return folder


def adapters(folder: Path) -> tuple[dict[str, Path], int]:
    """Adapters of rank 1 over all of SDXL's own modules that other programs know, by kind, and how many layers each has."""
    modules = [module for module in names_of(sdxl.STANDARD).modules.values() if module.usual]
    made: dict[str, dict[str, Layer]] = {kind: {} for kind in ("lora", "dora", "loha", "lokr")}
    for module in modules:
        outputs, inputs, columns = module.shape[0], module.shape[1], prod(module.shape[1:])
        pair = {"down": _ones((1, columns)), "up": _ones((outputs, 1))}
        made["lora"][module.name] = Layer("lora", pair, 1.0, module.shape)
        made["dora"][module.name] = Layer("lora", {**pair, "dora": _ones((outputs,))}, 1.0, module.shape)
        hada = {"w1_a": _ones((outputs, 1)), "w1_b": _ones((1, columns)), "w2_a": _ones((outputs, 1)), "w2_b": _ones((1, columns))}
        made["loha"][module.name] = Layer("loha", hada, 1.0, module.shape)
        kron = {"w1": _ones((2, 2)), "w2_a": _ones((outputs // 2, 1)), "w2_b": _ones((1, columns // 2))}
        made["lokr"][module.name] = Layer("lokr", kron, 1.0, module.shape) if inputs % 2 == 0 else made["lora"][module.name]
    files = {}
    for kind, layers in made.items():
        assert all(problem(layer) is None for layer in layers.values())
        files[kind] = folder / f"{kind}.safetensors"
        writing.write_kohya(files[kind], layers, sdxl.STANDARD, {})
    return files, len(modules)


def _ones(shape: tuple[int, ...]) -> tensor_files.Blob:
    data = memoryview(np.full(shape, 0.01, dtype=np.float16).tobytes())
    return tensor_files.Blob("F16", shape, lambda: iter([data]))
