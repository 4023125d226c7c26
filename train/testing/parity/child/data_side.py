"""The trainer's side of the data: buckets, resize and crop, captions, token ids, latents on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.testing.parity.child.options import Options, of_notebook
from train.testing.parity.loader import Peer

Answer = tuple[dict[str, torch.Tensor], dict[str, Any]]


def data(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Placements of sizes, texts of captions, ids of texts, pixels of pictures (`picture.N` in their `bucket.N`)."""
    train_util = peer.module("train_util")
    buckets = given["buckets"]
    area = buckets["side_px"], buckets["side_px"]
    manager = train_util.BucketManager(False, area, buckets["min_px"], buckets["max_px"], buckets["step_px"])
    manager.make_buckets()
    out: dict[str, torch.Tensor] = {}
    placed = [_placed(manager, train_util, size) for size in given["sizes"]]
    texts = [_caption(train_util, one) for one in given["captions"]]
    ids_1, ids_2 = _ids(peer, given["texts"], given["tokenizers"])
    out |= {"ids_1": ids_1, "ids_2": ids_2}
    for name, picture in tensors.items():
        number = name.rpartition(".")[2]
        size = picture.shape[1], picture.shape[0]
        reso, resized, _ = manager.select_bucket(*size)
        cut, _, crop = train_util.trim_and_resize_if_required(False, picture.numpy(), reso, resized)
        out[f"cut.{number}"] = torch.from_numpy(np.ascontiguousarray(cut))
        out[f"scaled.{number}"] = train_util.IMAGE_TRANSFORMS(np.ascontiguousarray(cut))
        out[f"crop.{number}"] = torch.tensor([float(value) for value in crop], dtype=torch.float64)
    sizes = sorted([int(w), int(h)] for w, h in manager.predefined_resos)
    return out, {"table": sizes, "placed": placed, "captions": texts}


def _placed(manager: Any, train_util: Any, size: list[int]) -> list[int]:
    """Bucket w h, resized w h, and top left as the dataset tells the network (whole numbers)."""
    reso, resized, _ = manager.select_bucket(*size)
    left, top, _, _ = train_util.BucketManager.get_crop_ltrb(reso, tuple(size))
    return [int(value) for value in (*reso, *resized, top, left)]


def _caption(train_util: Any, one: dict[str, Any]) -> str:
    """`process_caption` of a dataset that has nothing but what the method reads."""
    dataset = Options(current_epoch=1, current_step=one["step"], max_train_steps=1000, replacements={})
    subset = Options(
        caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0, caption_tag_dropout_rate=0.0, caption_separator=",",
        keep_tokens=0, keep_tokens_separator="|||", shuffle_caption=one["shuffle"],
        token_warmup_min=one["warmup_min"], token_warmup_step=one["warmup_steps"],
    )  # fmt: skip
    return str(train_util.BaseDataset.process_caption(dataset, subset, one["text"]))


def _ids(peer: Peer, texts: list[str], tokenizers: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of both encoders, int64 [texts, 3, 77]."""
    if (peer.path / "library/strategy_sdxl.py").is_file():
        strategy = peer.module("strategy_sdxl").SdxlTokenizeStrategy(225, tokenizers)
        ids_1, ids_2 = strategy.tokenize(texts)
        return ids_1, ids_2
    pair = peer.module("sdxl_train_util").load_tokenizers(of_notebook(tokenizer_cache_dir=tokenizers))
    dataset = Options(tokenizers=pair, tokenizer_max_length=225 + 2)
    read = peer.module("train_util").BaseDataset.get_input_ids
    rows = [torch.stack([read(dataset, text, one) for text in texts]) for one in pair]
    return rows[0], rows[1]


def npz(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Writes `latents` where its trainer would beside `picture`, and reads `foreign`, an npz that we wrote."""
    size, bucket, crop = given["size"], tuple(given["bucket"]), given["crop"]
    picture, foreign = Path(given["picture"]), given["foreign"]
    if (peer.path / "library/strategy_sd.py").is_file():
        strategy = peer.module("strategy_sd").SdSdxlLatentsCachingStrategy(False, True, 1, False)
        target = strategy.get_latents_npz_path(str(picture), tuple(size))
        strategy.save_latents_to_disk(target, tensors["latents"], size, crop)
        wanted = strategy.is_disk_cached_latents_expected(bucket, foreign, False, False)
        found = strategy.load_latents_from_disk(foreign, bucket)
    else:
        util = peer.module("train_util")
        target = str(picture.with_suffix(".npz"))
        util.save_latents_to_disk(target, tensors["latents"], size, crop)
        wanted = util.is_disk_cached_latents_is_expected(bucket, foreign, False)
        found = util.load_latents_from_disk(foreign)
    facts = {"written": target, "expected": bool(wanted), "size": list(found[1]), "crop": list(found[2])}
    return {"latents": torch.from_numpy(found[0])}, facts
