"""An adapter's file or folder to its layers: nothing of the data is read yet, nothing of it is ever executed.

Names, shapes and types are proved here against the architecture of the base; what another program could mean and this
one would drop is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.model import prediction, sdxl
from train.model.adapters import layers, names
from train.model.adapters.layers import Layer
from train.model.other_kinds import some
from train.storage import state_files, tensor_files
from train.storage.tensor_files import Blob

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_KEY = "lora_adapter_metadata"  # where diffusers writes ranks and alphas
BASE_KEYS = ("anix.base_sha256", "anix.base_weights_sha256", "anix.base_model_sha256")
_MOST_METADATA = 1 << 20
_MOST_WEIGHT = 100
# Adapters that nobody here can add to a weight, by a part of their tensors' names.
_OTHER_KINDS = {
    ".oft_": "an OFT adapter (rotations)", ".on_input": "an IA3 adapter", ".ia3_": "an IA3 adapter", ".a1.weight": "a GLoRA",
    ".lora_embedding": "a LoRA of embeddings", "bundle_emb": "an embedding bundled with a LoRA (bundle_emb)",
    ".vera_": "a VeRA adapter", ".boft_": "a BOFT adapter", ".hada_w1.": "a LoHa of an unknown form",
    ".lora_B.bias": "a LoRA with biases", ".modules_to_save": "whole modules (modules_to_save)", ".reference": "a slider's reference",
}  # fmt: skip
# Adapters of other models: by what begins a flattened name.
_OTHER_MODELS = (
    (re.compile(r"^lora_te_|^lora_unet_down_blocks_0_attentions_|^unet_down_blocks_0_attentions_|^lora_unet_input_blocks_[12]_1_"), "of a Stable Diffusion 1 or 2 model"),
    (re.compile(r"double_blocks|single_blocks|^transformer_|^lora_transformer_|^diffusion_model_layers_|joint_blocks|_t5|lora_te3_"), "of a diffusion transformer (Flux, SD3 or the like)"),
    (re.compile(r"prior_|^lora_prior_"), "of a prior (Stable Cascade)"),
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds, by canonical module ("unet.conv_in"), and what its file says of itself."""

    path: Path
    layers: Mapping[str, Layer]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def bases(self) -> set[str]:
        """Hashes under which its base is known; empty where the file names none."""
        return {self.metadata[key] for key in BASE_KEYS if self.metadata.get(key)}


def given(text: str) -> tuple[Path, float]:
    """(path, weight) of FILE or FILE:weight as a command line names an adapter. Raises Halt(USAGE)."""
    path, colon, told = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(told)
    except ValueError:
        return Path(text), 1.0
    if not abs(weight) <= _MOST_WEIGHT:
        raise Halt(ExitCode.USAGE, f"{text}: the weight {told} is not between -{_MOST_WEIGHT} and {_MOST_WEIGHT}")
    return Path(path), weight


def is_adapter(path: Path) -> bool:
    """Whether a file or folder is one of an adapter rather than of a model, by its names alone."""
    if path.is_dir():
        whole = any((path / name).exists() for name in ("model_index.json", "model"))  # the latter of a stage that merged it
        return not whole and (any((path / name).is_file() for name in (DIFFUSERS_FILE, PEFT_FILE)) or any(path.glob("*-lora.safetensors")))
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    try:
        entries = tensor_files.header_of(path)[2]
    except (ValueError, OSError):
        return False
    return bool(entries) and any(_looks_adapted(name) for name in entries) and not any(
        name.startswith(("model.diffusion_model.input_blocks.0.0.weight", "conditioner.")) for name in entries
    )  # fmt: skip


def _looks_adapted(name: str) -> bool:
    found = names.split(name)
    return (found is not None and found[1] != "any") or any(mark in name for mark in _OTHER_KINDS)


def stored_configs(path: Path) -> sdxl.Configs:
    """The configs of the base that an adapter's file carries, else SDXL's own. Halt(MISMATCH) for damaged ones."""
    source = tensor_files.open_file(file_of(path))
    configs = prediction.configs_of(source.metadata, source.blobs, str(source.path))
    sdxl.folder_shapes(configs, str(source.path), names.NETWORKS)
    try:
        names.names_of(configs)
    except (LookupError, ValueError, TypeError) as error:  # configs of networks that can be built and are not of SDXL's family
        raise Halt(ExitCode.MISMATCH, f"{source.path}: the configs in its metadata ({sdxl.CONFIGS_KEY}) are none of SDXL's family") from error
    return configs


def open_adapter(path: Path, configs: sdxl.Configs) -> Adapter:
    """The adapter at `path`, a file or a diffusers or peft folder, for a base of these configs.

    Raises Halt: USAGE (no such path), MISMATCH (pickle, damaged, another kind or model, foreign or missing tensors, shapes
    or types that do not fit; names them).
    """
    file = file_of(path)
    source = tensor_files.open_file(file)
    peft = _peft_config(file)
    network = _network_beside(file) if file.name == PEFT_FILE else None
    known = names.names_of(configs)
    found = _sorted(file, source.blobs, known, network)
    if not found:
        raise Halt(ExitCode.MISMATCH, f"{file} holds no tensor of an adapter (first: {some(sorted(source.blobs)[:3]) or 'none'})")
    said = _said_alphas(file, source.metadata, peft, network)
    made = {module: _layer(file, known.modules[module], parts, said) for module, parts in sorted(found.items())}
    notes = []
    if unstated := sum(layer.alpha is None and layer.rank > 0 for layer in made.values()):
        notes.append(f"{unstated} layers state no alpha: it is taken for the rank")
    return Adapter(path, made, {k: v for k, v in source.metadata.items() if k not in ("format", DIFFUSERS_KEY)}, tuple(notes))


def file_of(path: Path) -> Path:
    """The file of an adapter, in its folder or itself. Raises Halt saying what is there instead."""
    if not path.exists():
        raise Halt(ExitCode.USAGE, f"{path} does not exist: name an adapter, a .safetensors file or its folder")
    if not path.is_dir():
        return path
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    own = sorted(file.name for file in path.glob("*.safetensors"))
    left = [name for name in own if name.endswith("-lora.safetensors") and not name.endswith("-ema-lora.safetensors")]  # by a stage
    if len(usual := left or own) == 1:
        return path / usual[0]
    pickles = sorted(p.name for p in path.glob("*") if p.suffix in tensor_files.PICKLE_SUFFIXES)
    hint = f"; {some(pickles, 1)} is a pickle and is not read, because reading one can run any code" if pickles else ""
    raise Halt(ExitCode.MISMATCH, f"{path} holds no {DIFFUSERS_FILE} and no {PEFT_FILE}{hint}{': name one of ' + some(own) if own else ''}")


def _network_beside(file: Path) -> str:
    """Whose a peft file is: it is the folder of one network, whose name says so, else the U-Net's."""
    return file.parent.name if file.parent.name in names.NETWORKS else "unet"


def _sorted(
    file: Path, blobs: Mapping[str, Blob], known: names.Names, network: str | None
) -> dict[str, dict[str, tuple[str, Blob]]]:
    """{module: {kind/part: (name there, tensor)}}. Raises Halt(MISMATCH) for anything foreign."""
    found: dict[str, dict[str, tuple[str, Blob]]] = {}
    foreign: list[str] = []
    for name, blob in sorted(blobs.items()):
        _refuse_other_kind(file, name)
        cut = names.split(name)
        module = known.module(cut[0], network) if cut is not None else None
        if cut is None or module is None:
            foreign.append(name)
            continue
        own, part = found.setdefault(module, {}), f"{cut[1]}/{cut[2]}"
        if part == "any/magnitude":  # peft's and ai-toolkit's
            part, blob = "any/dora", layers.as_vector(blob)
        if part in own:
            raise Halt(ExitCode.MISMATCH, f"{file} says {module} twice: {some([own[part][0], name])}")
        own[part] = name, blob
    if foreign:
        _refuse_foreign(file, foreign, len(found))
    _refuse_types(file, {name: blob for parts in found.values() for name, blob in parts.values()})
    return found


def _refuse_other_kind(file: Path, name: str) -> None:
    for mark, what in _OTHER_KINDS.items():
        if mark in name:
            raise Halt(
                ExitCode.MISMATCH,
                f"{file} holds {what}, as {some([name])}: LoRA, DoRA, LoHa, LoKr and whole differences of weights are read",
            )


def _refuse_foreign(file: Path, foreign: list[str], found: int) -> None:
    flat = [name.replace(".", "_") for name in foreign]
    for form, what in _OTHER_MODELS:
        if not found and any(form.search(name) for name in flat):
            raise Halt(ExitCode.MISMATCH, f"{file} is an adapter {what}, as {some(foreign, 1)}: it does not go with SDXL")
    raise Halt(
        ExitCode.MISMATCH,
        f"{file}: {len(foreign)} tensors belong to no module of this SDXL model, or to no kind of adapter that is read: "
        f"{some(foreign)}. It is of another model or a newer kind; nothing of it is dropped in silence",
    )


def _refuse_types(file: Path, blobs: Mapping[str, Blob]) -> None:
    other = {n: b for n, b in blobs.items() if b.dtype not in tensor_files.EXPONENTS and not (n.endswith(".alpha") and b.dtype.startswith("I"))}
    if other:
        name = min(other)
        raise Halt(ExitCode.MISMATCH, f"{file} holds quantised or integer weights ({len(other)}, as {some([name])} in {other[name].dtype}): save it in fp16 or fp32")


def _layer(file: Path, of: names.Module, parts: Mapping[str, tuple[str, Blob]], said: Mapping[str, Any]) -> Layer:
    module, shape = of.name, of.shape
    if "any/bias" in parts or "full/bias" in parts:
        if not of.bias:
            raise Halt(ExitCode.MISMATCH, f"{file}: {module} has no bias that {some([n for n, _ in parts.values()], 4)} could change")
        parts = {"full/bias" if key == "any/bias" and len(parts) == 1 else key: value for key, value in parts.items()}
    kinds = {key.partition("/")[0] for key in parts} - {"any"}
    if len(kinds) != 1:
        mixed = f"two kinds of adapter at once ({', '.join(sorted(kinds))})" if kinds else "no weights beside its alpha or scale"
        raise Halt(ExitCode.MISMATCH, f"{file}: {module} has {mixed}: {some([name for name, _ in parts.values()], 2)}")
    blobs = {key.partition("/")[2]: blob for key, (_, blob) in parts.items()}
    stored = blobs.pop("alpha", None)
    layer = Layer(kinds.pop(), blobs, None, shape)
    wrong = None if not any(len(blob.shape) == 0 for blob in blobs.values()) else "a tensor without sides"
    alpha = _stored_alpha(file, module, stored) if stored is not None else None
    if wrong is None:
        try:
            alpha = _said_alpha(said, module, layer.rank) if alpha is None and layer.kind != "full" else alpha
            wrong = layers.problem(Layer(layer.kind, blobs, alpha, shape))
        except (IndexError, ZeroDivisionError):
            wrong = "tensors without the sides that its kind has"
    if wrong:
        raise Halt(ExitCode.MISMATCH, f"{file}: {module} is {wrong} (as {some([name for name, _ in parts.values()], 2)})")
    return Layer(layer.kind, blobs, None if alpha == 0 else alpha, shape)  # 0 is "the rank" to sd-scripts


def _stored_alpha(file: Path, module: str, blob: Blob) -> float:
    if blob.size_bytes == 0 or len(blob.read()) != blob.size_bytes or sum(side != 1 for side in blob.shape):
        raise Halt(ExitCode.MISMATCH, f"{file}: alpha of {module} is {list(blob.shape)}, not one number")
    alpha = float(state_files.to_tensor(blob).reshape(()))
    if alpha != alpha or abs(alpha) == float("inf"):
        raise Halt(ExitCode.MISMATCH, f"{file}: alpha of {module} is not finite (NaN or infinity)")
    return alpha


def _peft_config(file: Path) -> Mapping[str, Any] | None:
    """adapter_config.json beside a peft file; what would change the numbers and is not done here is refused."""
    path = file.parent / PEFT_CONFIG
    if file.name != PEFT_FILE:
        return None
    if not path.is_file() or path.stat().st_size > _MOST_METADATA or not isinstance(config := read_json(path), dict):
        raise Halt(ExitCode.MISMATCH, f"{path} is missing or damaged: it says the rank and alpha of {file.name}")
    kind = config.get("peft_type", "LORA")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise Halt(ExitCode.MISMATCH, f"{path} is a peft adapter of the kind {some([str(kind)])}: LORA, LOHA and LOKR are read")
    for key in ("modules_to_save", "layer_replication", "corda_config", "eva_config", "trainable_token_indices"):
        if config.get(key):
            raise Halt(ExitCode.MISMATCH, f"{path}: {key} is set: that is no difference of weights that is read here")
    if config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise Halt(ExitCode.MISMATCH, f"{path}: bias and fan_in_fan_out are not read: leave them none and false")
    return config


def _said_alphas(file: Path, metadata: Mapping[str, str], peft: Mapping[str, Any] | None, network: str | None) -> dict[str, Any]:
    """{network: what its LoraConfig says} from diffusers' metadata or a peft folder; empty where nothing is said."""
    if peft is not None:
        return {network or "unet": peft}
    text = metadata.get(DIFFUSERS_KEY)
    if text is None:
        return {}
    try:
        told = json.loads(text) if len(text) <= _MOST_METADATA else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise Halt(ExitCode.MISMATCH, f"{file}: its metadata entry {DIFFUSERS_KEY} is damaged: it says ranks and alphas")
    return {of: {k.removeprefix(f"{of}."): v for k, v in told.items() if str(k).startswith(f"{of}.")} for of in names.NETWORKS}


def _said_alpha(said: Mapping[str, Any], module: str, rank: int) -> float | None:
    """alpha of a module by peft's config: its pattern's, else the common one; the names in a pattern are taken as they stand."""
    network, _, key = module.partition(".")
    config = said.get(network) or {}
    pattern = config.get("alpha_pattern")
    own = [value for name, value in pattern.items() if key == name or key.endswith(f".{name}")] if isinstance(pattern, dict) else []
    alpha = own[0] if own else config.get("lora_alpha", config.get("alpha"))
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise Halt(ExitCode.MISMATCH, f"alpha of {module} is {some([str(alpha)])}, no number")
    stated = config.get("r")
    if rank == 0 and isinstance(stated, int) and alpha != stated:  # peft scales it all the same, and a file has no place for that
        raise Halt(ExitCode.MISMATCH, f"{module} is not factored and scaled with {alpha} / {stated}: save it with alpha equal to r")
    return float(alpha) * (float(rank) ** 0.5 if config.get("use_rslora") else 1.0)
