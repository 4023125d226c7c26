"""Step `latents`: the VAE's view of every selected picture, in packed shards, and the index over them.

A shard is the unit of work; its owner is its number in the sorted list % WORLD_SIZE. Shards that exist are kept, so
an interrupted run loses one shard per process at most. Pictures are read by worker processes ahead of the VAE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, dataset_dir
from train.data.shards import read_meta, write_shard
from train.model import vae_file
from train.model.networks import fill
from train.model.vae_file import Vae
from train.prepare.choosing.facts import Facts, facts_of
from train.prepare.encoding import flips
from train.prepare.encoding.batching import Batches, own_device
from train.prepare.encoding.encoder import Encoder, find_vae
from train.prepare.encoding.index_tables import finish, weights_told
from train.prepare.encoding.masks import make_masks
from train.prepare.encoding.npz import Unusable, imported, tally
from train.prepare.encoding.shard_plan import Recipe, Slot, Wanted, by_shard, entry_of, make_plan, shard_mark
from train.prepare.images.decode import DECODE_VERSION, Refused
from train.prepare.images.looks import Cut, Look, cut_one
from train.prepare.images.vips import VIPS_VERSION
from train.prepare.select import selection_mark, selection_path, stored
from train.prepare.tables.pool import Lost, Pool
from train.prepare.tables.progress import say
from train.prepare.tables.quarantine import Complaint, judge
from train.prepare.tables.schemas import Quarantine
from train.prepare.tables.units import config_id, merge_quarantine, write_refused
from train.prepare.tables.workers import Peers
from train.recipe.buckets import place
from train.recipe.rng import uid_of

PLACE = ["key", "bucket_w", "bucket_h"]


@dataclass(frozen=True)
class Work:
    """All shards in use, and which of their pictures are wanted now."""

    settings: DatasetConfig
    recipe: Recipe
    shards: list[tuple[str, list[Slot]]]
    entries: set[int]
    facts: Facts

    @property
    def dataset(self) -> Path:
        """The dataset's folder."""
        return dataset_dir(self.settings)


def run(settings: DatasetConfig) -> None:
    """Encode what is missing, then write index.parquet, the index files and dataset.json.

    Raises Halt(MISMATCH) when a file that probe accepted cannot be read any more, naming it, after all the rest.
    """
    dataset = dataset_dir(settings)
    vae = find_vae(settings.latents.vae)
    recipe = make_recipe(settings, vae_file.identity(vae.weights))
    _check_npz_vae(settings, recipe.vae_id)
    _drop_other_index(dataset, recipe)
    wanted, facts, of_flips = _wanted(settings)
    shards, used = make_plan(dataset, wanted, recipe.identity)
    entries = {slot.entry for slot in used}
    work = Work(settings, recipe, list(by_shard(shards)), entries, facts)
    with Peers(dataset) as peers:
        _encode(work, vae, peers)
        masks = make_masks(settings, work.shards, entries, facts, peers)
    lost, unreadable = _outcome(work)
    finish(settings, recipe, used, facts, {*lost, *(key for key, _ in unreadable)}, masks.digests)
    merge_quarantine(dataset)
    if peers.rank == 0:
        for told in (*weights_told(settings, facts), *masks.said):
            print(f"latents: {told}")
        if of_flips:
            print(f"latents: {of_flips}")
    if any(source.npz_vae for source in settings.sources) and peers.rank == 0:
        counts = tally(dataset, [name for name, _ in work.shards])
        print(f"latents: {counts['images']} taken over from .npz of sd-scripts")
        for why, count in counts["unusable"].items():
            print(f"latents: {count} .npz not taken, encoded instead: {why} (as {counts['examples'][why]})")
    if unreadable:
        first = "; ".join(f"{key}: {why}" for key, why in unreadable[:5])
        raise Complaint(
            ExitCode.MISMATCH,
            f"latents: {len(unreadable)} files that probe accepted cannot be read any more: {first}. Run "
            "scripts/prepare.py probe again",
        )
    if masks.unreadable:
        first = "; ".join(f"{key}: {why}" for key, why in masks.unreadable[:5])
        raise Complaint(ExitCode.MISMATCH, f"latents: {len(masks.unreadable)} masks cannot be used: {first}. Mend them or take them away, then run "
                        "scripts/prepare.py latents again; until then their pictures count whole")  # fmt: skip
    judge(settings, "latents")


def make_recipe(settings: DatasetConfig, vae_id: str) -> Recipe:
    """What the config decides about latents."""
    config = settings.latents
    rules = {"animated": settings.probe.animated, "allow_truncated": settings.probe.allow_truncated}
    taken = {"npz": npz} if (npz := sorted(source.name for source in settings.sources if source.npz_vae)) else {}
    backend = f"pyvips {VIPS_VERSION}" if config.backend == "pyvips" else config.backend
    preproc = config_id(decode=DECODE_VERSION, resize=config.resize, backend=backend, rules=rules, **taken)
    return Recipe(vae_id, preproc, config.content, config.dtype, config.encode, settings.seed)


def _check_npz_vae(settings: DatasetConfig, vae_id: str) -> None:
    for source in settings.sources:
        if source.npz_vae is None:
            continue
        if vae_file.identity(find_vae(source.npz_vae, f"npz_vae of {source.name}").weights) != vae_id:
            raise Halt(
                ExitCode.MISMATCH,
                f"sources: npz_vae of {source.name}, {source.npz_vae}, is not the VAE of latents.vae, {settings.latents.vae}"
                ": latents of two VAEs do not mix. Name that VAE in latents.vae too, or set npz_vae to null to encode anew",
            )


def _drop_other_index(dataset: Path, recipe: Recipe) -> None:
    """Before shards of another recipe are replaced, nothing may point into them."""
    path = dataset / "latents" / "plan.parquet"
    if not path.exists() or (pq.read_metadata(path).metadata or {}).get(b"identity") == recipe.identity.encode():
        return
    for old in (dataset / "index.parquet", *dataset.glob("index*.arrow")):
        old.unlink(missing_ok=True)


def _wanted(settings: DatasetConfig) -> tuple[list[Wanted], Facts, str]:
    """(every picture in every bucket that some stage wants it in, its flip where it has one; facts about each key; what is said of the flips)."""
    dataset = dataset_dir(settings)
    tables = []
    for stage in settings.select:
        path = selection_path(dataset, stage)
        if stored(dataset, stage).get("mark") != selection_mark(settings, stage):
            raise Halt(ExitCode.MISMATCH, f"{path} is missing or stale: run scripts/prepare.py select")
        tables.append(pq.read_table(path, columns=PLACE))
    pairs = pa.concat_tables(tables).group_by(PLACE).aggregate([]).sort_by([(name, "ascending") for name in PLACE])
    keys = pc.unique(pairs.column("key"))
    facts = facts_of(settings, keys)
    pairs = pairs.append_column("sha256", facts.column("sha256", pairs.column("key").combine_chunks()))
    wanted: list[Wanted] = []
    flipping = settings.latents.flip == "all"
    unlike, tags = flips.without_flip(settings, keys) if flipping else (set[str](), [])
    for batch in pairs.to_batches(max_chunksize=50_000):
        places = [column.to_pylist() for column in batch.columns]
        wanted += map(Wanted, *places[:3], map(entry_of, *places))
        if flipping:
            alike = (place for place in zip(*places, strict=True) if place[0] not in unlike)
            wanted += [Wanted(key, w, h, entry_of(key, w, h, sha256, flip=True), flip=True) for key, w, h, sha256 in alike]
    return wanted, facts, flips.told(len(keys) - len(unlike), len(unlike), tags) if flipping else ""


def _encode(work: Work, vae: Vae, peers: Peers) -> None:
    """Make every shard that is missing."""
    missing = [number for number in range(len(work.shards)) if not _is_made(work, number)]
    if not missing:
        return
    settings, recipe = work.settings, work.recipe
    device = own_device(settings.latents.device, peers.rank)
    batches = Batches(settings.latents.batch, "latents.batch", device.type)
    if peers.rank == 0 and vae.notes:
        print(f"latents: {vae.file}: {'; '.join(vae.notes)}")
    encoder = Encoder(fill("vae", vae.config, vae.weights, vae.file), recipe.encode, recipe.content, recipe.dtype, recipe.seed, device)
    ours = sum(len(work.shards[number][1]) for number in missing if peers.owns(number))
    tried = set()
    with Pool.of_pictures(cut_one, settings) as pool, peers.progress(ours, "latents", "images") as bar:

        def make(number: int) -> None:
            # A shard with a file that cannot be read stays unmade, and is not tried twice in one run.
            if number not in tried and not _is_made(work, number):
                _make_shard(work, number, encoder, batches, pool, bar)
            tried.add(number)

        for number in missing:
            if peers.owns(number):
                make(number)
        peers.wait_for([(number, work.dataset / work.shards[number][0]) for number in missing], make)
    if batches.seen:
        say(batches.told("latents"))


def _is_made(work: Work, number: int) -> bool:
    """Whether the shard is there, whole, and holds (or gave up on) each of its pictures that is wanted."""
    name, slots = work.shards[number]
    path = work.dataset / name
    if not path.exists():
        return False
    try:
        meta = read_meta(path)
    except Halt:
        path.unlink()  # cut off, or not ours: it can be made again
        return False
    if meta.get("fingerprint") != shard_mark(slots, work.recipe.identity):
        return False
    tried = {*json.loads(meta["slots"]), *json.loads(meta["nan"])}
    return all(slot.slot in tried for slot in slots if slot.entry in work.entries)


def _make_shard(work: Work, number: int, encoder: Encoder, batches: Batches, pool: Pool[Cut, Any], bar: Any) -> None:
    name, slots = work.shards[number]
    slots = [slot for slot in slots if slot.entry in work.entries]
    stored, unusable = _taken_over(work, slots)
    bar.update(len(stored))
    imported = sorted(stored)
    rest = [slot for slot in slots if slot.slot not in stored]
    lost: list[int] = []
    unreadable: list[tuple[str, str]] = []
    pictures = pool.map(_jobs(work.settings, rest, work.facts))

    def encode(part: Sequence[tuple[Slot, np.ndarray]]) -> list[torch.Tensor | None]:
        return encoder.encode([pixels for _, pixels in part], [uid_of(f"{slot.key}\0flip" if slot.flip else slot.key) for slot, _ in part])

    for batch in _batches(rest, pictures, batches, unreadable):
        latents = batches.through(encode, batch)
        for (slot, _), latent in zip(batch, latents, strict=True):
            if latent is None:
                lost.append(slot.slot)
            else:
                stored[slot.slot] = latent
        bar.update(len(batch))
    channels = 8 if work.recipe.content == "moments" else 4
    empty = torch.zeros((0, channels, slots[0].bucket_h // 8, slots[0].bucket_w // 8)).to(encoder.store)
    path = work.dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    order = sorted(stored)
    write_shard(path, torch.stack([stored[slot] for slot in order]) if order else empty, {
        **{key: str(value) for key, value in asdict(work.recipe).items()},
        "fingerprint": shard_mark(work.shards[number][1], work.recipe.identity),
        "slots": json.dumps(order), "nan": json.dumps(lost), "unreadable": json.dumps(sorted(unreadable)),
        "npz": json.dumps(imported), "npz_unusable": json.dumps(unusable),
    })  # fmt: skip


def _taken_over(work: Work, slots: list[Slot]) -> tuple[dict[int, torch.Tensor], list[tuple[str, str]]]:
    """(slot -> latents that sd-scripts left, (file, reason) of those that are of no use)."""
    sources = {source.name: source for source in work.settings.sources}
    store = {"fp16": torch.float16, "bf16": torch.bfloat16}[work.recipe.dtype]
    taken: dict[int, torch.Tensor] = {}
    unusable: list[tuple[str, str]] = []
    for slot in slots:
        if slot.flip:
            continue
        fact = work.facts[slot.key]
        found = imported(sources[fact["source"]], fact, (slot.bucket_w, slot.bucket_h), work.recipe.dtype)
        if isinstance(found, Unusable):
            unusable.append((found.name, found.why))
        elif found is not None:
            taken[slot.slot] = torch.from_numpy(found).to(store)
    return taken, unusable


def _jobs(settings: DatasetConfig, slots: list[Slot], facts: Facts) -> Iterator[Cut]:
    sources = {source.name: source for source in settings.sources}
    for slot in slots:
        fact = facts[slot.key]
        size = (fact["width"], fact["height"])
        look = Look(sources[fact["source"]], settings.probe, fact["uri"], fact["member"])
        placement = place(*size, (slot.bucket_w, slot.bucket_h))
        yield Cut(look, placement, settings.latents.resize, settings.latents.backend, size, fact["sha256"])


def _batches(
    slots: list[Slot], pictures: Iterator[Any], batches: Batches, unreadable: list[tuple[str, str]]
) -> Iterator[list[tuple[Slot, np.ndarray]]]:
    """Runs of readable pictures in slot order, as many as go at once: with a number in latents.batch, the same whoever makes the shard."""
    batch: list[tuple[Slot, np.ndarray]] = []
    for slot, picture in zip(slots, pictures, strict=True):
        if isinstance(picture, Refused | Lost):
            unreadable.append((slot.key, picture.message))
            continue
        batch.append((slot, picture[:, ::-1] if slot.flip else picture))
        if len(batch) >= batches.size:
            yield batch
            batch = []
    if batch:
        yield batch


def _outcome(work: Work) -> tuple[list[str], list[tuple[str, str]]]:
    """(keys whose latents are not finite even in fp32, (key, reason) of files that could not be read).

    Writes the former as the step's quarantine.
    """
    entries: list[Quarantine] = []
    unreadable: list[tuple[str, str]] = []
    for name, slots in work.shards:
        meta = read_meta(work.dataset / name)
        bad = set(json.loads(meta["nan"]))
        wanted = {slot.key for slot in slots if slot.entry in work.entries}
        unreadable += [(str(key), str(why)) for key, why in json.loads(meta["unreadable"]) if key in wanted]
        entries += [
            Quarantine(slot.key, "latents", "nan_latent", f"{slot.bucket_w}x{slot.bucket_h}: not finite in fp32 either")
            for slot in slots
            if slot.slot in bad and slot.entry in work.entries
        ]
    mark = config_id(identity=work.recipe.identity, rows=[entry.row() for entry in entries])
    write_refused(work.dataset, "unencodable", entries, mark)
    return [entry.key for entry in entries], sorted(set(unreadable))
