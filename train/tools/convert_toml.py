"""sd-scripts training TOML -> stage YAML: what has a counterpart is mapped, every other key is named with the reason.

The original flattens the sections of its file and passes keys it does not know in silence. Nothing is silent here.
"""

from __future__ import annotations

import ast
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from train.exits import ExitCode, Halt
from train.modelfolder import refuse_existing
from train.rundir import replace_file

DIRECT = {  # theirs: ours, same meaning and same values
    "pretrained_model_name_or_path": "model.init_from",
    "vae": "model.vae",
    "train_batch_size": "batch.micro",
    "max_train_epochs": "epochs",
    "max_train_steps": "max_updates",
    "learning_rate": "optimizer.unet_lr",
    "train_text_encoder": "model.train_text_encoders",
    "max_grad_norm": "optimizer.max_grad_norm",
    "seed": "seed",
    "output_dir": "output_dir",
    "output_name": "stage",
    "shuffle_caption": "data.shuffle_tags",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_dropout_every_n_epochs": "data.caption_dropout_every_epochs",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "token_warmup_min": "data.token_warmup_min",
    "token_warmup_step": "data.token_warmup_steps",
    "max_token_length": "data.max_tokens",
    "keep_tokens_separator": "data.separator",
    "max_data_loader_n_workers": "data.workers",
    "noise_offset": "noise.offset",
    "adaptive_noise_scale": "noise.offset_adaptive",
    "multires_noise_iterations": "noise.multires_iterations",
    "multires_noise_discount": "noise.multires_discount",
    "ip_noise_gamma": "noise.input_perturbation",
    "zero_terminal_snr": "noise.zero_terminal_snr",
    "min_snr_gamma": "loss.min_snr_gamma",
    "debiased_estimation_loss": "loss.debiased",
    "huber_c": "loss.huber_c",
    "huber_schedule": "loss.huber_schedule",
    "save_every_n_steps": "checkpoint.every_steps",
    "sample_every_n_steps": "sampling.every_steps",
    "metadata_title": "export.title",
    "metadata_author": "export.author",
    "metadata_description": "export.description",
    "metadata_license": "export.license",
    "metadata_tags": "export.tags",
    "wandb_run_name": "tracking.name",
    "log_tracker_name": "tracking.project",
}
CHOICES: dict[str, tuple[str, dict[Any, Any]]] = {  # theirs: (ours, their value: ours)
    "mixed_precision": ("precision", {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}),
    "save_precision": ("export.dtype", {"fp16": "fp16", "float": "fp32"}),
    "gradient_checkpointing": ("model.gradient_checkpointing", {True: "full", False: "none"}),
    "v_parameterization": ("loss.prediction", {True: "v", False: "epsilon"}),
    "loss_type": ("loss.type", {"l2": "l2", "huber": "huber"}),
    "torch_compile": ("model.compile", {True: True, False: False}),
}
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adafactor": "adafactor"}
ARGUMENTS = ("weight_decay", "betas", "eps", "scale_parameter", "relative_step", "warmup_init", "clip_threshold",
             "decay_rate")  # fmt: skip
DATASET = {  # keys of the original's dataset part; ours are in dataset.yaml
    "resolution": "buckets.area_px", "min_bucket_reso": "buckets.min_px", "max_bucket_reso": "buckets.max_px",
    "bucket_reso_steps": "buckets.step_px", "train_data_dir": "sources", "in_json": "sources",
    "caption_extension": "sources", "cache_latents": "latents (always)", "cache_latents_to_disk": "latents (always)",
    "vae_batch_size": "latents", "no_half_vae": "latents.dtype", "dataset_repeats": "select",
    "enable_bucket": "buckets",
}  # fmt: skip
NO_COUNTERPART = {
    "bucket_no_upscale": "small images are enlarged, or excluded at probe",
    "flip_aug": "no flips: the recipe has none", "color_aug": "latents are prepared once",
    "random_crop": "the crop is the centre's and told to the network", "keep_tokens": "use the separator in captions",
    "caption_separator": "captions are split at commas",
    "cache_text_encoder_outputs": "would freeze the shuffled captions",
    "cache_text_encoder_outputs_to_disk": "would freeze the shuffled captions",
    "save_every_n_epochs": "checkpoint.permanent_every_steps keeps one per epoch by default",
    "save_last_n_steps": "counts steps; see checkpoint.keep", "save_last_n_epochs": "see checkpoint.keep",
    "save_state": "always", "save_model_as": "always .safetensors", "resume": "resumes by itself from output_dir",
    "sample_prompts": "make a configs/prompts.yaml", "sample_sampler": "sampler in configs/prompts.yaml",
    "xformers": "model.attention chooses", "sdpa": "model.attention chooses", "mem_eff_attn": "model.attention chooses",
    "full_fp16": "masters stay fp32", "full_bf16": "see model.weights: bf16", "lowram": "not needed",
    "persistent_data_loader_workers": "always", "logging_dir": "metrics.jsonl in output_dir",
    "log_prefix": "not needed",
    "ddp_timeout": "see launch.collective_timeout_s", "ddp_gradient_as_bucket_view": "always",
    "ddp_static_graph": "not needed", "wandb_api_key": "a secret; the value is not copied: use wandb login",
    "clip_skip": "the SDXL encoders are read before their last layer", "lr_scheduler_power": "no polynomial schedule",
    "metadata": "the training record is always written", "training_comment": "see export.description",
    "prior_loss_weight": "no regularisation images", "weighted_captions": "captions are tags",
    "scale_v_pred_loss_like_noise_pred": "no such weighting", "v_pred_like_loss": "no such weighting",
    "block_lr": "one learning rate per network", "fused_backward_pass": "not needed",
}  # fmt: skip


@dataclass
class Result:
    """The stage config, and every key that is not in it, with the reason."""

    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def convert_file(source: Path, out: Path, processes: int = 1) -> list[str]:
    """Write `out`, a stage YAML with the notes at its top; the lines to show. Raises Halt(USAGE)."""
    refuse_existing(out)
    try:
        table = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Halt(ExitCode.USAGE, f"{source} is no TOML: {error}") from None
    result = convert(table, processes)
    notes = [f"{key}: {reason}" for key, reason in result.notes.items()]
    head = [
        f"# From {source.name} by scripts/convert.py. Keys without a counterpart, and what to know:",
        *(f"#   {n}" for n in notes),
    ]
    replace_file(out, "\n".join(head) + "\n" + OmegaConf.to_yaml(OmegaConf.create(_nested(result.config))))
    return [f"{out}: {len(result.config)} keys", *(f"note: {note}" for note in notes)]


def convert(table: Mapping[str, Any], processes: int = 1) -> Result:
    """Our keys ("batch.micro") and the notes, from a parsed TOML, its sections flattened as the original does."""
    theirs = _flat(table)
    result = Result()
    special: list[Callable[[dict[str, Any], Result, int], set[str]]] = [_batch, _optimizer, _schedule, _rest]
    used: set[str] = set()
    for rule in special:
        used |= rule(theirs, result, processes)
    for key, value in theirs.items():
        if key in used or value is None or value == "":
            continue
        if key in DIRECT:
            result.config[DIRECT[key]] = value
        elif key in CHOICES and _hashable(value) in CHOICES[key][1]:
            result.config[CHOICES[key][0]] = CHOICES[key][1][value]
        elif key in CHOICES:
            result.notes[key] = f"{value!r} has no counterpart in {CHOICES[key][0]}"
        elif key in DATASET:
            result.notes[key] = f"belongs to dataset.yaml: {DATASET[key]}"
        elif key in NO_COUNTERPART:
            result.notes[key] = f"no counterpart: {NO_COUNTERPART[key]}"
        else:
            result.notes[key] = "not known here (the original ignores keys it does not know, in silence)"
    _complete(result)
    return result


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value) if isinstance(value, dict) else {key: value}
    return flat


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | bool) else repr(value)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    top = {key: value for key, value in nested.items() if not isinstance(value, dict)}
    return top | {key: value for key, value in nested.items() if isinstance(value, dict)}


def _arguments(theirs: Mapping[str, Any], key: str) -> dict[str, Any]:
    """["weight_decay=0.1", "betas=0.9,0.99"] as values."""
    found = {}
    for item in theirs.get(key) or []:
        name, _, text = str(item).partition("=")
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            value = text.strip()
        found[name.strip()] = list(value) if isinstance(value, tuple) else value
    return found


def _batch(theirs: dict[str, Any], result: Result, processes: int) -> set[str]:
    micro = int(theirs.get("train_batch_size") or 1)
    accumulation = int(theirs.get("gradient_accumulation_steps") or 1)
    result.config["batch.micro"] = micro
    result.config["batch.effective"] = micro * accumulation * processes
    result.notes["gradient_accumulation_steps"] = (
        f"batch.effective = {micro} x {accumulation} x {processes} process(es); --processes says how many ran"
    )
    return {"train_batch_size", "gradient_accumulation_steps"}


def _optimizer(theirs: dict[str, Any], result: Result, processes: int) -> set[str]:
    kind = "AdamW8bit" if theirs.get("use_8bit_adam") else str(theirs.get("optimizer_type") or "AdamW")
    if kind.lower() in OPTIMIZERS:
        result.config["optimizer.name"] = OPTIMIZERS[kind.lower()]
    else:
        result.notes["optimizer_type"] = f"{kind} has no counterpart: choose optimizer.name"
    for name, value in _arguments(theirs, "optimizer_args").items():
        if name in ARGUMENTS:
            result.config[f"optimizer.{name}"] = value
        else:
            result.notes[f"optimizer_args {name}"] = "no counterpart"
    rates = [theirs.get(key) for key in ("learning_rate_te1", "learning_rate_te2")]
    if theirs.get("train_text_encoder"):
        found = [rate for rate in rates if rate is not None] or [theirs.get("learning_rate")]
        result.config["optimizer.text_encoder_lr"] = found[0]
        if len(set(found)) > 1:
            result.notes["learning_rate_te2"] = f"{found[1]}: one rate for both encoders here, te1's was taken"
    elif any(rates):
        result.notes["learning_rate_te1"] = "ignored by the original: the text encoders are not trained"
    return {"optimizer_type", "use_8bit_adam", "optimizer_args", "learning_rate_te1", "learning_rate_te2"}


SCHEDULE_KEYS = {"lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_scheduler_num_cycles", "lr_warmup_steps"}


def _schedule(theirs: dict[str, Any], result: Result, processes: int) -> set[str]:
    config, notes = result.config, result.notes
    custom = str(theirs.get("lr_scheduler_type") or "")
    if custom:
        _custom_schedule(custom, _arguments(theirs, "lr_scheduler_args"), result, processes)
        for key in ("lr_scheduler", "lr_scheduler_num_cycles", "lr_warmup_steps"):
            if theirs.get(key):
                notes[key] = "ignored by the original: lr_scheduler_type takes its place"
        return SCHEDULE_KEYS
    name = str(theirs.get("lr_scheduler") or "constant")
    warmup, steps = int(theirs.get("lr_warmup_steps") or 0), int(theirs.get("max_train_steps") or 0)
    if name in ("constant", "constant_with_warmup"):
        config["schedule.name"] = name
        if name == "constant_with_warmup":
            config["schedule.warmup_steps"] = warmup
        elif warmup:
            notes["lr_warmup_steps"] = "ignored by the original: lr_scheduler is constant"
    elif name in ("cosine", "cosine_with_restarts"):
        cycles = int(theirs.get("lr_scheduler_num_cycles") or 1) if name != "cosine" else 1
        config |= {"schedule.name": "cosine_restarts", "schedule.cycles": cycles, "schedule.first_step_at_min": False}
        if steps:
            config["schedule.cycle_steps"] = math.ceil(steps / cycles)
        else:
            notes["lr_scheduler"] = "its cycles divide max_train_steps, which is not given: set schedule.cycle_steps"
        if warmup:
            notes["lr_warmup_steps"] = "no counterpart: cosine restarts have no warmup here"
    else:
        notes["lr_scheduler"] = f"{name} has no counterpart: choose schedule.name"
    return SCHEDULE_KEYS


def _custom_schedule(custom: str, given: dict[str, Any], result: Result, processes: int) -> None:
    if not custom.endswith("CosineAnnealingWarmupRestarts"):
        result.notes["lr_scheduler_type"] = f"{custom} has no counterpart: choose schedule.name"
        return
    result.config["schedule.name"] = "cosine_restarts"
    theirs_to_ours = {"min_lr": "min_lr", "gamma": "decay", "first_cycle_steps": "cycle_steps"}
    for name, value in given.items():
        if name in theirs_to_ours:
            result.config[f"schedule.{theirs_to_ours[name]}"] = value
        elif (name, value) not in (("cycle_mult", 1), ("cycle_mult", 1.0), ("warmup_steps", 0)):
            result.notes[f"lr_scheduler_args {name}"] = "no counterpart (max_lr is optimizer.unet_lr)"
    if processes > 1:
        result.notes["lr_scheduler_type"] = (
            f"the original advanced it once per process; schedule.unit: process_step, schedule.processes: {processes} "
            "is what ran"
        )


def _rest(theirs: dict[str, Any], result: Result, processes: int) -> set[str]:
    low, high = theirs.get("min_timestep"), theirs.get("max_timestep")
    if low is not None or high is not None:
        result.config["noise.timesteps"] = [int(low or 0), int(high or 1000)]
    used = {"min_timestep", "max_timestep", "log_with"}
    if theirs.get("max_train_epochs") and theirs.get("max_train_steps"):
        result.notes["max_train_steps"] = "ignored by the original: max_train_epochs takes its place"
        used.add("max_train_steps")
    if theirs.get("v_parameterization"):
        result.notes["v_parameterization"] = "the recipe's fork went on training epsilon; loss.prediction: v means v"
    used |= {key for key in ("min_snr_gamma", "ip_noise_gamma") if not theirs.get(key)}  # 0 is off there
    trackers = str(theirs.get("log_with") or "")
    if trackers in ("wandb", "all"):
        result.config["tracking.wandb"] = "offline"
        result.notes["log_with"] = "tracking.wandb is offline; set online after wandb login"
    if trackers in ("tensorboard", "all"):
        result.config["tracking.tensorboard"] = True
    return used


def _complete(result: Result) -> None:
    """The original's defaults where ours differ, and what a TOML cannot say."""
    config = result.config
    config.setdefault("data.max_tokens", 75)
    config.setdefault("data.shuffle_tags", False)
    config.setdefault("precision", "fp32")
    config.setdefault("model.gradient_checkpointing", "none")
    config.setdefault("stage", "converted")
    config["stage"] = "".join(c if c.isalnum() or c in "-_" else "-" for c in str(config["stage"]))
    missing = {
        "seed": "the run had none; our streams need one", "epochs": "max_train_epochs was not given",
        "data.path": "a prepared dataset: scripts/prepare.py", "output_dir": "not given",
    }  # fmt: skip
    fill = {"seed": 0, "epochs": 1, "data.path": "data/prepared", "output_dir": f"runs/{config['stage']}"}
    for key, reason in missing.items():
        if key not in config:
            config[key] = fill[key]
            result.notes[f"(ours) {key}"] = f"{reason}; check {fill[key]!r}"
    if str(config.get("model.init_from", "")).endswith(".safetensors"):
        config["model.tokenizers"] = "models/sdxl-tokenizers"
        result.notes["(ours) model.tokenizers"] = "a single file has none; point it to a folder with both tokenizers"
