"""How other programs write SDXL's tensors: other names and layouts, and leftovers that are no weights.

One reading for every place: a single file, one network's file in a folder, a VAE alone. What is wanted is taken when
it is there by name and shape, in whichever spelling; what is on the closed list of leftovers is passed over; anything
else may belong to another architecture and is refused. What was passed over or adapted is told in one line.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.model import other_kinds, sdxl
from train.storage import tensor_files
from train.storage.tensor_files import Blob

# Every prefix under which a network's tensors stand in a file of several; SDXL's own comes first.
_PREFIXES = (
    *((network, prefix) for network, prefix in sdxl.PREFIXES.items()),
    ("text_encoder_2", "conditioner.embedders.1.transformer."),
    *((network, f"{network}.") for network in sdxl.NETWORKS),
)
_WRAPPER = "model."  # around the whole file, as a module that held the model saved it

_SCHEDULE = (
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
)  # fmt: skip
# Left by trainers and other programs; none is read when a picture is made, and none is a weight of SDXL.
# Held against a name with and without its network's prefix: only of names that nothing wanted has.
LEFTOVERS = {
    "model_ema.*": r"model_ema\..*",
    "sigmas": r"(denoiser\.|model_sampling\.)?(log_)?sigmas",
    "noise schedule": "|".join(_SCHEDULE),
    "loss.*": r"loss\..*",
    "embedding_manager": r"embedding_manager(\..*)?",
    "position_ids": r"(.*\.)?position_ids",
    "logit_scale": r"(.*\.)?logit_(scale|bias)",
    "attn_mask": r"(.*\.)?attn_mask",
    "image encoder of CLIP": r"(visual|visual_projection|vision_model)(\..*)?",
    "counters": r"global_step|epoch",
}
_PROJECTION_1 = "text_projection of encoder 1"  # SDXL's encoder 1 has none; that of CLIP's whole model is left behind


@dataclass(frozen=True)
class Reading:
    """A file's wanted tensors by canonical name, and what was passed over or adapted."""

    weights: dict[str, Blob]
    scale: Blob | None  # logit_scale, which only a single file has a place for
    notes: tuple[str, ...] = ()


@dataclass
class _Sorted:
    """Tensors of a file by what they are: found under a name of SDXL's, passed over, or unknown."""

    found: dict[str, tuple[str, Blob]] = field(default_factory=dict)  # target: (name there, blob)
    passed: Counter[str] = field(default_factory=Counter)
    adapted: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """What a user is told of it, a clause each."""
        told = []
        if self.passed:
            groups = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in sorted(self.passed.items()))
            told.append(f"passed over {self.passed.total()} tensors that are no weights of SDXL: {groups}")
        return (*told, *(f"{what} ({count})" for what, count in sorted(self.adapted.items())))


def read(
    path: Path,
    blobs: Mapping[str, Blob],
    configs: sdxl.Configs,
    networks: Sequence[str] = sdxl.NETWORKS,
    *,
    alone: bool = False,
) -> Reading:
    """The weights of `networks` in a file's tensors, names and shapes proved complete.

    `alone`: the file is that of one network, its names without prefix. Tensors of other networks are not looked at.
    Raises Halt(MISMATCH) saying what the file is nearly, what is missing or unknown, and what to do.
    """
    links = sdxl.links(configs, networks)
    shapes = sdxl.folder_shapes(configs, networks=networks)
    mine = _sort(blobs, {link.single for link in links}, shapes, networks, alone)
    scale = mine.found.pop(sdxl.LOGIT_SCALE, None)
    in_folder_names = 2 * sum(target in shapes for target in mine.found) > len(mine.found)
    weights: dict[str, Blob] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for link in links:
        whole = link.single in mine.found
        if whole:  # what stands there a second time, in the folder's words, is one tensor too many
            mine.unknown += [mine.found[part][0] for part in link.folder if part in mine.found]
        targets = {link.single: link.shape} if whole else {part: shapes[part] for part in link.folder}
        have = {target: _fitted(target, shape, mine) for target, shape in targets.items() if target in mine.found}
        wrong += [
            f"{mine.found[target][0]} is {list(blob.shape)}, not {list(targets[target])}"
            for target, blob in have.items() if blob.shape != tuple(targets[target])
        ]  # fmt: skip
        if len(have) < len(targets):
            lacking = [target for target in targets if target not in have]
            missing += lacking if in_folder_names or have else [link.single]
        elif not wrong:
            weights.update(from_single(link, have[link.single]) if whole else have)
    used = dict(mine.found.values())
    other_kinds.refuse_types(path, used)
    other_kinds.refuse_unlike(path, missing, mine.unknown, wrong, links)
    return Reading(weights, None if scale is None else _checked_scale(path, *scale), mine.notes())


def placed(name: str) -> tuple[str | None, str]:
    """(network, name within it) of a tensor in a file of several networks; (None, name) where no prefix says so."""
    for candidate in (name, name.removeprefix(_WRAPPER)):
        for network, prefix in _PREFIXES:
            if candidate.startswith(prefix):
                return network, candidate.removeprefix(prefix)
    return None, name


def _sort(
    blobs: Mapping[str, Blob],
    singles: set[str],
    shapes: Mapping[str, tuple[int, ...]],
    networks: Sequence[str],
    alone: bool,
) -> _Sorted:
    mine = _Sorted()
    for name in sorted(blobs, key=lambda name: (name not in singles, name)):  # SDXL's own spelling goes first
        if name in (sdxl.V_MARK, sdxl.ZERO_SNR_MARK):
            continue
        network, rest = (networks[0], name) if alone else placed(name)
        if network not in networks and (network is not None or "unet" not in networks):
            continue  # another network's, that nobody asked for
        target = None if network is None else _target(network, rest, singles, shapes, alone)
        if target is not None and target not in mine.found:
            mine.found[target] = name, blobs[name]
            if (what := _adaptation(network, name, target, singles, alone)) is not None:
                mine.adapted[what] += 1
        elif target is None and (label := leftover(network, name, rest)) is not None:
            mine.passed[label] += 1
        else:
            mine.unknown.append(name)
    return mine


def _target(network: str, rest: str, singles: set[str], shapes: Mapping[str, tuple[int, ...]], alone: bool) -> str | None:
    """The tensor of SDXL that is meant, by its name in the single file or, canonical, in the folder."""
    single, folder = sdxl.PREFIXES[network] + rest, sdxl.canonical(network, rest)
    if single == sdxl.LOGIT_SCALE and not alone:
        return single
    known = [single] * (single in singles) + [folder] * (folder in shapes)
    return None if not known else known[-1 if alone else 0]


def _adaptation(network: str | None, name: str, target: str, singles: set[str], alone: bool) -> str | None:
    """What is unusual about finding `target` under `name`; None for what every reader knows."""
    usual = target not in singles if alone else target == name
    if usual or target == sdxl.LOGIT_SCALE or (alone and network == "vae"):  # a VAE alone is usual in both layouts
        return None
    if "text_projection" in name:
        return "text_projection in its other layout"
    return "tensors under other names" if alone else f"{network}: tensors under other names"


def leftover(network: str | None, name: str, rest: str) -> str | None:
    """What a tensor is that means nothing here, by the closed list; None for anything else."""
    if network == "text_encoder" and rest in ("text_projection", "text_projection.weight"):
        return _PROJECTION_1
    candidates = {name, rest, name.removeprefix(_WRAPPER)}
    return next((what for what, form in LEFTOVERS.items() if any(re.fullmatch(form, c) for c in candidates)), None)


def _fitted(target: str, shape: tuple[int, ...], mine: _Sorted) -> Blob:
    """The found tensor, as a matrix where it is a 1x1 convolution there, or the reverse."""
    blob = mine.found[target][1]
    flat = [side for side in blob.shape if side != 1] == [side for side in shape if side != 1]
    if blob.shape != tuple(shape) and flat:
        mine.adapted["matrices that are 1x1 convolutions there, or the reverse"] += 1
        return tensor_files.reshaped(blob, tuple(shape))
    return blob


def _checked_scale(path: Path, name: str, blob: Blob) -> Blob:
    """logit_scale, read now: it is in no network, so that nobody else would look before an export is written."""
    if math.prod(blob.shape) != 1:
        raise Halt(ExitCode.MISMATCH, f"{path}: {name} is {list(blob.shape)}, not one number")
    other_kinds.refuse_types(path, {name: blob})
    if not tensor_files.finite(blob.read(), blob.dtype):
        raise Halt(ExitCode.MISMATCH, f"{path}: {name} is not finite (NaN or infinity)")
    return tensor_files.reshaped(blob, ())


def from_single(link: sdxl.Link, blob: Blob) -> Iterator[tuple[str, Blob]]:
    """The folder's tensors that one tensor of the single file holds."""
    if link.operation == "join":
        yield from ((name, tensor_files.rows(blob, i, 3)) for i, name in enumerate(link.folder))
    elif link.operation == "transpose":
        yield link.folder[0], tensor_files.transposed(blob)
    elif link.operation == "to_conv":
        yield link.folder[0], tensor_files.reshaped(blob, blob.shape[:2])
    else:
        yield link.folder[0], blob
