"""Rows about the data: buckets and crops, captions, token ids, pixels, latents on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from train.config.dataset import SourceConfig
from train.model import text
from train.prepare.encoding import npz
from train.prepare.images.decode import resize_crop
from train.recipe import buckets, captions
from train.testing.parity import inputs, verdicts
from train.testing.parity.checkout import Checkout, ask
from train.testing.parity.inputs import Switches
from train.testing.parity.verdicts import Known, Row

RESIZE = "area"  # as configs/as_run/dataset.yaml says


@dataclass(frozen=True)
class Data:
    """Our side of what the trainer's `data` answers."""

    table: list[list[int]]
    placed: list[list[int]]  # bucket w h, resized w h, crop top left
    captions: list[tuple[list[str], list[str]]]  # (fixed, flex), drawn
    ids_1: torch.Tensor
    ids_2: torch.Tensor


def ours(config: Switches, texts: list[str]) -> Data:
    """Everything by our own rooms, under the config's switches."""
    table = buckets.make_buckets(inputs.BUCKETS["side_px"] ** 2, *(inputs.BUCKETS[f"{key}_px"] for key in ("min", "max", "step")))
    tokenizer = text.load_tag_tokenizer(None)
    most = config.data.max_tokens
    contents = [tokenizer.fit([], captions.split(one)[1], most, config.data.overflow)[0] for one in texts]
    ids_1, ids_2 = tokenizer.chunk_ids_many(contents, most)
    return Data(
        table=sorted([w, h] for w, h in table),
        placed=[_placed(size, table, config) for size in inputs.sizes()],
        captions=[drawn(one) for one in inputs.captions()],
        ids_1=torch.from_numpy(ids_1), ids_2=torch.from_numpy(ids_2),
    )  # fmt: skip


def _placed(size: tuple[int, int], table: tuple[buckets.Size, ...], config: Switches) -> list[int]:
    place = buckets.place(*size, buckets.assign(*size, table))
    said = buckets.crop_condition(
        config.data.crop_conditioning, *size, place.bucket_w, place.bucket_h, place.crop_top, place.crop_left
    )
    return [place.bucket_w, place.bucket_h, place.resized_w, place.resized_h, *said]


def drawn(one: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(fixed, flex) of one of `inputs.captions` by our rules."""
    options = captions.DrawOptions(shuffle=one["shuffle"], warmup_min=one["warmup_min"], warmup_updates=one["warmup_steps"])
    return captions.draw(*captions.split(one["text"]), options, seed=inputs.SEED, uid=inputs.UID, epoch=0, update=one["step"])


def same_caption(one: Mapping[str, Any], mine: tuple[list[str], list[str]], theirs: str) -> bool:
    """Whether the trainer's text is ours; where tags are shuffled by chance, its fixed part and what was shuffled."""
    fixed, flex = mine
    if not one["shuffle"]:
        return captions.join([*fixed, *flex]) == theirs
    tags = theirs.split(", ")
    return tags[: len(fixed)] == fixed and Counter(tags[len(fixed) :]) == Counter(flex)


def rows(config: Switches, checkout: Checkout, work: Path) -> list[Row]:
    """The table's rows about data."""
    tokenizer = text.load_tag_tokenizer(None)
    texts = inputs.texts(tokenizer)
    pictures = inputs.pictures()
    cache = inputs.write_tokenizers(work / "tokenizers")
    cases = [*inputs.captions(), *inputs.ODD_CAPTIONS]
    answer = ask(
        checkout, "data", work / "data",
        tensors={f"picture.{name}": torch.from_numpy(picture) for name, picture in pictures.items()},
        facts={"buckets": inputs.BUCKETS, "sizes": inputs.sizes(), "captions": cases, "texts": texts, "tokenizers": str(cache)},
    )  # fmt: skip
    mine, theirs = ours(config, texts), answer.facts
    pairs = list(zip(inputs.sizes(), mine.placed, theirs["placed"], strict=True))
    integers = "whole numbers"
    found = [
        verdicts.counted("buckets", [b for b in theirs["table"] if b not in mine.table], len(theirs["table"]), integers),
        verdicts.counted("placement: bucket and resize", [size for size, a, b in pairs if a[:4] != b[:4]], len(pairs), integers),
        verdicts.counted("crop numbers told to the network", [size for size, a, b in pairs if a[4:] != b[4:]], len(pairs), integers),
        _captions(mine, theirs["captions"]),
        _odd_captions(theirs["captions"][len(inputs.captions()) :]),
        _ids("token ids, encoder 1", mine.ids_1, answer.tensors["ids_1"]),
        _ids("token ids, encoder 2", mine.ids_2, answer.tensors["ids_2"]),
    ]
    return [*found, *_pixels(pictures, answer.tensors, mine), *_npz(checkout, work)]


def _captions(mine: Data, texts: list[str]) -> Row:
    cases = list(zip(inputs.captions(), mine.captions, texts, strict=False))
    wrong = [one["text"] for one, own, other in cases if not same_caption(one, own, other)]
    return verdicts.counted("captions with separator and warmup", wrong, len(cases), "the order of a shuffle is chance: fixed part, and tags that were shuffled")


def _odd_captions(texts: list[str]) -> Row:
    cases = list(zip(inputs.ODD_CAPTIONS, texts, strict=True))
    wrong = [one["text"] for one, other in cases if not same_caption(one, drawn(one), other)]
    documented = "docs/as_run.md: empty tags are dropped, and the separator never stays in the text"
    return verdicts.counted("captions: empty tags, separator with shuffle off", wrong, len(cases), "text", known=documented)


def _ids(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> Row:
    wrong = [length for length, a, b in zip(inputs.LENGTHS, mine, theirs, strict=True) if not torch.equal(a, b)]
    return verdicts.counted(name, wrong, len(inputs.LENGTHS), "whole numbers; lengths in tokens around the edges of the chunks")


def _pixels(pictures: Mapping[str, np.ndarray], theirs: Mapping[str, torch.Tensor], mine: Data) -> list[Row]:
    """Mean difference in levels of 255."""
    table = tuple((w, h) for w, h in mine.table)
    found = []
    for name, picture in pictures.items():
        size = picture.shape[1], picture.shape[0]
        place = buckets.place(*size, buckets.assign(*size, table))
        wanted = theirs[f"cut.{name}"].float()
        cuts = {kind: torch.from_numpy(np.array(resize_crop(Image.fromarray(picture), place, kind))) for kind in (RESIZE, "lanczos")}
        levels = {kind: float((cut.float() - wanted).abs().mean()) for kind, cut in cuts.items()}
        note = f"mean, levels of 255; with lanczos {levels['lanczos']:.3g}"
        if name == "as it is":
            found.append(verdicts.row(f"pixels, picture {name}", levels[RESIZE], 0.0, "nothing is resized", note=note))
            scaled = cuts[RESIZE].permute(2, 0, 1).float() / 127.5 - 1.0
            apart = verdicts.farthest(scaled, theirs[f"scaled.{name}"])
            found.append(verdicts.row("pixels as the VAE reads them", apart, 1.2e-7, "one fp32 rounding of values up to 1"))
        else:
            known = Known(8.0, "docs/as_run.md: later versions enlarge with LANCZOS") if name == "enlarged" else None
            reason = "two programs' rounding of one average (docs/as_run.md: not bit-equal)"
            found.append(verdicts.row(f"pixels, picture {name}", levels[RESIZE], 0.1, reason, known=known, note=note))
    return found


def _npz(checkout: Checkout, work: Path) -> list[Row]:
    """Latents that the trainer wrote, read by us, and an npz as we describe it, read by the trainer."""
    size, bucket, crop = [900, 1150], (896, 1152), [0.0, 2.0, 896.0, 1150.0]
    latents = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 144, 112)).astype(np.float32))
    place = work / "npz"
    place.mkdir()
    Image.new("RGB", (900, 1150)).save(place / "picture.png")
    foreign = place / "foreign.npz"
    np.savez(foreign, latents=latents.numpy(), original_size=np.array(size), crop_ltrb=np.array(crop))
    facts = {"size": size, "bucket": bucket, "crop": crop, "picture": str(place / "picture.png"), "foreign": str(foreign)}
    answer = ask(checkout, "npz", place / "asked", tensors={"latents": latents}, facts=facts)
    source = SourceConfig(name="theirs", adapter="sidecar", path=str(place), npz_vae="theirs")
    fact = {"uri": "picture.png", "member": None, "width": 900, "height": 1150, "has_alpha": False, "exif_orientation": 1}
    read = npz.imported(source, fact, bucket, "fp16")
    there = isinstance(read, np.ndarray)
    back = verdicts.farthest(torch.from_numpy(read), latents) if isinstance(read, np.ndarray) else float("inf")
    told = answer.facts
    accepted = told["expected"] and told["size"] == size and told["crop"] == crop
    return [
        verdicts.row("npz of the trainer, read here", back, 0.0, "a file is taken bit for bit", note="" if there else str(read)),
        verdicts.row("npz in that layout, read there", verdicts.farthest(answer.tensors["latents"], latents) if accepted else float("inf"), 0.0, "a file is taken bit for bit"),
    ]
