"""sd-scripts dataset config -> dataset YAML: a subset becomes a source; what is the stage's here is told as such.

A value is looked for in the subset, its dataset, [general] and at last in the training TOML, as the original does. What
we have one value for must agree over all subsets; where it does not, the keys are named and nothing is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.dataset_rules import MAX_NAME
from train.recipe.buckets import make_buckets
from train.tools.convert.keys import DATASET_PART, DIRECT, NOT_CARRIED
from train.tools.convert.kinds import number, switch, whole

SELECTION = "pretrain"  # the one selection, by the name that a dataset config has without asking; the stage's data.select
_STAGE: dict[str, Any] = {  # theirs: their default; one value for the whole stage here
    "shuffle_caption": False, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
    "flip_aug": False, "caption_tag_dropout_rate": 0.0, "token_warmup_min": 1, "token_warmup_step": 0, "batch_size": 1,
}  # fmt: skip
_ARGUMENT = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # their name in a training TOML
_CAPTION_EXT = ".caption"  # theirs where none is given


@dataclass
class Made:
    """The dataset config; every key that is not in it, with the reason; the stage's keys in their names."""

    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)  # keys of the training TOML that were used here

    def for_stage(self) -> Iterator[str]:
        """`key=value` of everything that a stage config must say about these pictures."""
        yield f"data.path=data/{self.config['name']}"
        yield f"data.select={SELECTION}"
        for theirs, value in self.stage.items():
            yield shlex.quote(f"{DIRECT[theirs]}={str(value).lower() if isinstance(value, bool) else value}")


@dataclass(frozen=True)
class Subset:
    """One subset of one dataset, and the tables that a value of it may stand in, nearest first."""

    place: str  # "datasets[0].subsets[1]"
    layers: tuple[tuple[str, Mapping[str, Any]], ...]  # (name of the table, table)
    arguments: Mapping[str, Any]
    read: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        """The value that holds for this subset."""
        for _, table in self.layers:
            if table.get(key) not in (None, ""):
                return switch(table[key])
        argument = _ARGUMENT.get(key, key)
        if self.arguments.get(argument) in (None, ""):
            return default
        self.read.add(argument)
        return switch(self.arguments[argument])

    def whole(self, key: str, least: int, default: int) -> int:
        """A whole number that holds for this subset. Raises Halt(USAGE) naming the key."""
        return whole({key: self.get(key)}, key, least, default, f"{self.place}.")


def convert(dataset: Mapping[str, Any], arguments: Mapping[str, Any], name: str) -> Made:
    """The dataset YAML's content. Raises Halt(USAGE) naming the key that cannot be one here."""
    made = Made()
    subsets = _subsets(dataset, arguments, made)
    separator = _agreed("keep_tokens_separator", [one for one in _said(subsets, "keep_tokens_separator") if one[1] is not None])
    for subset in subsets if separator else ():
        if not subset.get("keep_tokens_separator"):
            made.notes[f"{subset.place}.keep_tokens_separator"] = f"not given; a {separator} in its captions separates here all the same"
    made.config = {
        "name": name,
        **({"separator": str(separator)} if separator else {}),
        "buckets": _buckets(subsets, made),
        "sources": _sources(subsets, made),
    }
    made.stage = {_ARGUMENT.get(key, key): _agreed(key, _said(subsets, key, default)) for key, default in _STAGE.items()}
    if separator:
        made.stage["keep_tokens_separator"] = separator
    batch = whole(made.stage, "train_batch_size", 1, 1)
    made.config["select"] = {SELECTION: {"min_bucket": batch}}
    vae = arguments.get("vae") or arguments.get("pretrained_model_name_or_path")
    latents = {"vae": vae} if vae else {}
    if made.stage["flip_aug"]:
        latents["flip"] = "all"
    resize = _agreed("resize_interpolation", _said(subsets, "resize_interpolation"))
    if resize in ("lanczos", "area"):
        latents["resize"] = resize
    elif resize is not None:
        made.notes["resize_interpolation"] = f"{resize!r} is none of lanczos and area: see latents.resize"
    if latents:
        made.config["latents"] = latents
    made.read |= {"dataset_config", "train_data_dir", "in_json", "reg_data_dir"} & arguments.keys()
    made.notes["(ours) the stage"] = f"set there: {' '.join(made.for_stage())}"
    made.notes["(ours) score, tag, exclude"] = "not in such a file; configs/dataset.yaml documents every key"
    return made


def _subsets(dataset: Mapping[str, Any], arguments: Mapping[str, Any], made: Made) -> list[Subset]:
    """Every subset that is trained on; what its tables hold beside that is named."""
    general = dict(dataset.get("general") or {})
    _name_uncarried(general, "general", made)
    found = []
    for number_, entry in enumerate(_tables(dataset.get("datasets"), "datasets")):
        place = f"datasets[{number_}]"
        own = {key: value for key, value in entry.items() if key != "subsets"}
        _name_uncarried(own, place, made)
        for inner, table in enumerate(_tables(entry.get("subsets"), f"{place}.subsets")):
            here = f"{place}.subsets[{inner}]"
            _name_uncarried(table, here, made)
            subset = Subset(here, ((here, table), (place, own), ("general", general)), arguments, made.read)
            if subset.get("num_repeats") != "kohya" and not subset.whole("num_repeats", 0, 1):
                made.notes[f"{here}.num_repeats"] = "0: the original passes such a subset over, and so does this"
                continue
            found.append(subset)
    if not found:
        raise Halt(ExitCode.USAGE, "datasets: no subset names pictures to train on")
    return found


def _tables(value: Any, place: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        raise Halt(ExitCode.USAGE, f"{place} must be a list of tables ([[{place.split('.')[-1]}]]) with at least one")
    return value


def _name_uncarried(table: Mapping[str, Any], place: str, made: Made) -> None:
    for key, value in table.items():
        if key in NOT_CARRIED:
            if switch(value) not in (None, "", False, 0, 0.0, []):
                made.notes[f"{place}.{key}"] = f"not carried: {NOT_CARRIED[key]}"
        elif key not in DATASET_PART:
            made.notes[f"{place}.{key}"] = "not known here, nor to the original, which refuses it"


def _said(subsets: list[Subset], key: str, default: Any = None) -> list[tuple[str, Any]]:
    return [(subset.place, subset.get(key, default)) for subset in subsets]


def _agreed(key: str, said: list[tuple[str, Any]]) -> Any:
    """The one value that all say, None where nobody does. Raises Halt(USAGE) naming two places that differ."""
    for place, other in said:
        first, value = said[0]
        if other != value:
            raise Halt(
                ExitCode.USAGE,
                f"{key} is {value!r} in {first} and {other!r} in {place}: a set here has one; convert them apart, one file each",
            )
    return said[0][1] if said else None


def _buckets(subsets: list[Subset], made: Made) -> dict[str, int]:
    """The table of sizes. Without bucketing everything is cut to one square."""
    size = _agreed("resolution", [(subset.place, _resolution(subset)) for subset in subsets])
    bucketing = _agreed("enable_bucket", _said(subsets, "enable_bucket"))
    asked = {
        ours: _agreed(theirs, [(subset.place, subset.whole(theirs, 8, default)) for subset in subsets])
        for ours, theirs, default in (("min_px", "min_bucket_reso", 256), ("max_px", "max_bucket_reso", 1024),
                                      ("step_px", "bucket_reso_steps", 64))
    }  # fmt: skip
    buckets = {"area_px": size[0] * size[1] if size else 1024 * 1024, **asked}
    if size is None:
        made.notes["(ours) buckets.area_px"] = "resolution is not given in this file; 1024x1024 was taken"
    if bucketing is None:
        made.notes["enable_bucket"] = (
            "not given: the original then cuts every picture to its resolution; here it goes to the bucket of its shape "
            "(buckets.min_px = max_px cuts to squares)"
        )
    elif not bucketing and size and size[0] == size[1]:
        buckets |= {"min_px": size[0], "max_px": size[0]}
    elif not bucketing and size:
        made.notes["enable_bucket"] = f"off: every picture was cut to {size[0]}x{size[1]}; here it goes to buckets of that area"
    try:
        make_buckets(**buckets)
    except Halt as halt:
        made.notes["(ours) buckets"] = f"to be set before the step latents: {halt.message}"
    return buckets


def _resolution(subset: Subset) -> tuple[int, int] | None:
    value = subset.get("resolution")
    if value is None:
        return None
    sides = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    found = [number(side) for side in sides]
    if len(found) not in (1, 2) or any(side is None or side != int(side) or side < 64 for side in found):
        raise Halt(ExitCode.USAGE, f"{subset.place}.resolution is {value!r}, must be one side or two, such as [1024, 1024]")
    return int(found[0] or 0), int(found[-1] or 0)


def _sources(subsets: list[Subset], made: Made) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = []
    for subset in subsets:
        images, metadata = subset.get("image_dir"), subset.get("metadata_file")
        if not (metadata or images):
            raise Halt(ExitCode.USAGE, f"{subset.place}: neither image_dir nor metadata_file is given")
        taken = {str(source["name"]) for source in sources}
        source: dict[str, Any] = {"name": _source_name(subset.get("name") or images or metadata, taken)}
        if metadata:
            source |= {"adapter": "sd_scripts", "path": str(metadata), **({"images": str(images)} if images else {})}
        else:
            ext = str(subset.get("caption_extension") or subset.get("caption_extention") or _CAPTION_EXT)
            source |= {"adapter": "sidecar", "path": str(images), "caption_ext": ext if ext.startswith(".") else f".{ext}"}
            if subset.get("class_tokens"):
                source |= {"class_tokens": str(subset.get("class_tokens")), "on_missing_caption": "take"}
        separator = subset.get("caption_separator", ",")
        if str(separator).strip() != ",":
            source["tag_separator"] = str(separator)
        if keep := subset.whole("keep_tokens", 0, 0):
            source["keep_tokens"] = keep
        repeats = subset.get("num_repeats", 1)
        if repeats != 1:
            source["repeats"] = repeats if repeats == "kohya" else subset.whole("num_repeats", 1, 1)
            made.notes[f"{subset.place}.num_repeats"] = f"became repeats: {source['repeats']} of the source {source['name']}"
        if masks := "alpha" if subset.get("alpha_mask") else subset.get("conditioning_data_dir"):
            source["mask"] = str(masks)
        if subset.get("is_reg"):
            source["weight"] = _weight(subset)
            made.notes[f"{subset.place}.is_reg"] = (
                f"became weight: {source['weight']} (prior_loss_weight); there its pictures are repeated until they are as many as "
                "the others, here repeats says how often"
            )
        sources.append(source)
    _tell_of_folders(subsets, made)
    return sources


def _weight(subset: Subset) -> float:
    """prior_loss_weight, which the original multiplies a regularisation picture's loss by. Raises Halt(USAGE)."""
    value = subset.get("prior_loss_weight", 1.0)
    found = number(value)
    if found is None or found < 0:
        raise Halt(ExitCode.USAGE, f"prior_loss_weight is {value!r}, must be a number of at least 0")
    return float(found)


def _tell_of_folders(subsets: list[Subset], made: Made) -> None:
    """Note how folders and caption files are read there and here, and which folders would be read twice."""
    folders = [(s.place, PureWindowsPath(str(s.get("image_dir")))) for s in subsets if not s.get("metadata_file")]
    if folders:
        made.notes["(ours) sources"] = (
            "a folder is read with all below it, a caption file with all its lines (caption_lines: first reads one); the "
            "original reads line 1, and no subfolder but <repeats>_<name>"
        )
    for place, folder in folders:
        for outer, other in folders:
            if other in folder.parents:
                made.notes[f"{place}.image_dir"] = (
                    f"lies inside that of {outer}, which is read with all below it: its pictures would belong to both "
                    "sources, so move it out"
                )


def _source_name(path: Any, taken: set[str]) -> str:
    """The last part of a path as a name, numbered where another source has it."""
    last = PureWindowsPath(str(path)).stem  # reads both kinds of slashes
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in last[: MAX_NAME - 5]).strip("-_") or "pictures"
    return next(n for n in (name, *(f"{name}-{number}" for number in range(2, 10_000))) if n not in taken)
