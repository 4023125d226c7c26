"""Runs a reference trainer's own dataset code in a process of its own and times it.

Started as `python -m train.testing.child CHECKOUT`; reads one JSON request a line, answers one JSON line. The
reference is imported unmodified; what it imports for other purposes (pipelines, image libraries) is replaced by empty
stand-ins, so that it starts without its own environment.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import io
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

# Never needed by the dataset classes, slow or impossible to import here.
_STUBBED = ("diffusers", "torchvision", "toml", "cv2", "imagesize", "accelerate", "voluptuous", "ftfy", "einops",
            "library.original_unet", "library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion",
            "library.custom_train_functions", "library.huggingface_util",
            "library.sai_model_spec", "library.sd3_utils", "library.deepspeed_utils",
            "library.device_utils")  # fmt: skip
_MISSING_OK = ("CLIPFeatureExtractor", "SchedulerType", "TYPE_TO_SCHEDULER_FUNCTION")


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)


def _stand_in(name: str) -> Any:
    return _Anything(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, *a, **k: None})


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Supplies an empty module for everything in `_STUBBED`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == stub or name.startswith(stub + ".") for stub in _STUBBED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


def load_reference(checkout: str) -> Any:
    """The reference's `library.train_util`."""
    import transformers

    for name in _MISSING_OK:  # names that newer libraries dropped and the dataset classes do not use
        for module in (transformers, transformers.optimization):
            if not hasattr(module, name):
                setattr(module, name, _stand_in(name))
    sys.meta_path.insert(0, _StubFinder())
    sys.path.insert(0, checkout)
    from library import train_util  # type: ignore[import-not-found]

    return train_util


def index(train_util: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from nothing but a metadata file to the names in the first batch."""
    cpu, wall = time.process_time(), time.perf_counter()
    names = _first_batch(train_util, request)
    spent = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": spent[0], "wall_s": spent[1], "rss_kb": _rss_kb(), "first": names}


def _first_batch(train_util: Any, request: dict[str, Any]) -> list[str]:
    subset = train_util.FineTuningSubset(**_subset(train_util, request))
    common: dict[str, Any] = {
        "subsets": [subset], "batch_size": 16, "resolution": (1024, 1024), "network_multiplier": 1.0,
        "enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 2048, "bucket_reso_steps": 64,
        "bucket_no_upscale": False, "debug_dataset": False,
    }  # fmt: skip
    if _is_old(train_util):
        common |= {"tokenizer": [_Tokenizer()], "max_token_length": 225}
    else:
        from library import strategy_base, strategy_sd

        if strategy_base.LatentsCachingStrategy.get_strategy() is None:
            strategy = strategy_sd.SdSdxlLatentsCachingStrategy(False, True, 1, True)
            strategy_base.LatentsCachingStrategy.set_strategy(strategy)
        common |= {"validation_seed": None, "validation_split": 0.0, "resize_interpolation": None}
    dataset = train_util.FineTuningDataset(**common)
    dataset.make_buckets()
    dataset.shuffle_buckets()
    first = dataset.buckets_indices[0]
    bucket = dataset.bucket_manager.buckets[first.bucket_index]
    start = first.batch_index * first.bucket_batch_size
    return list(bucket[start : start + first.bucket_batch_size])


class _Tokenizer:
    model_max_length = 77


def _is_old(train_util: Any) -> bool:
    return "tokenizer" in train_util.FineTuningDataset.__init__.__code__.co_varnames


def _subset(train_util: Any, request: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "image_dir": request.get("image_dir"), "metadata_file": request.get("metadata", "none"), "num_repeats": 1,
        "shuffle_caption": True, "caption_separator": ",", "keep_tokens": 0, "keep_tokens_separator": "|||",
        "color_aug": False, "flip_aug": False, "face_crop_aug_range": None, "random_crop": False,
        "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0,
        "caption_prefix": None, "caption_suffix": None, "token_warmup_min": 1, "token_warmup_step": 0,
    }  # fmt: skip
    if not _is_old(train_util):
        options |= {"alpha_mask": False, "secondary_separator": None, "enable_wildcard": False}
    return options


def captions(train_util: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Shuffle and token ids of both encoders for every caption; the drawn texts and ids of the first few come back."""
    import transformers

    folder = Path(request["tokenizers"])
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    subset = train_util.FineTuningSubset(**_subset(train_util, request))
    dataset = train_util.MinimalDataset(tokenizers, 225, (1024, 1024), 1.0)
    texts = json.loads(Path(request["captions"]).read_text())
    random.seed(request["seed"])
    dataset.process_caption(subset, texts[0])
    cpu, wall = time.process_time(), time.perf_counter()
    drawn = [dataset.process_caption(subset, text) for text in texts]
    ids = [[dataset.get_input_ids(text, tokenizer) for tokenizer in tokenizers] for text in drawn]
    spent = time.process_time() - cpu, time.perf_counter() - wall
    some = request["returned"]
    return {
        "cpu_s": spent[0],
        "wall_s": spent[1],
        "drawn": drawn[:some],
        "ids": [[part.tolist() for part in pair] for pair in ids[:some]],
    }


def latents(train_util: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Batches of cached latents as one stacked tensor each, the way `__getitem__` reads and stacks them."""
    import torch

    cpu, wall = time.process_time(), time.perf_counter()
    for batch in request["batches"]:
        read: list[torch.Tensor] = [torch.FloatTensor(train_util.load_latents_from_disk(name)[0]) for name in batch]
        torch.stack(read).to(torch.float32)
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def _rss_kb() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def main(arguments: Sequence[str]) -> None:
    """Answer requests until stdin ends; everything the reference prints is dropped."""
    answer_to = sys.stdout
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        train_util = load_reference(arguments[0])
        print("ready", file=answer_to, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer = {"index": index, "captions": captions, "latents": latents}[request["do"]](train_util, request)
            print(json.dumps(answer), file=answer_to, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
