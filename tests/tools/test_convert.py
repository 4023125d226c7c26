"""sd-scripts TOML -> stage YAML, and the command line of convert.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinysdxl
from safetensors.torch import load_file

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.tools.commands import convert as convert_command
from train.tools.convert.toml import convert, convert_file

ROOT = Path(__file__).resolve().parents[2]

# The released pretraining run, as its notebook wrote it (sections are flattened by the original).
NOTEBOOK = """
[model_arguments]
pretrained_model_name_or_path = "models/animagine-xl-3.0-base.safetensors"
vae = "models/sdxl-vae-fp16-fix"
[dataset_arguments]
resolution = "1024,1024"
min_bucket_reso = 512
max_bucket_reso = 2048
bucket_reso_steps = 64
bucket_no_upscale = false
flip_aug = false
shuffle_caption = true
keep_tokens_separator = "|||"
caption_dropout_rate = 0
caption_tag_dropout_rate = 0
token_warmup_min = 1
token_warmup_step = 0
max_token_length = 225
cache_latents = true
[optimizer_arguments]
optimizer_type = "AdamW"
learning_rate = 1e-5
train_text_encoder = true
max_grad_norm = 1.0
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 10
lr_warmup_steps = 0
lr_scheduler_type = "LoraEasyCustomOptimizer.CustomOptimizers.CosineAnnealingWarmupRestarts"
lr_scheduler_args = ["min_lr=1e-6", "gamma=0.9", "first_cycle_steps=9099"]
[training_arguments]
output_dir = "runs/mine"
output_name = "animagine xl"
save_precision = "fp16"
save_every_n_steps = 1000
save_last_n_steps = true
max_train_epochs = 10
train_batch_size = 16
gradient_accumulation_steps = 3
gradient_checkpointing = true
mixed_precision = "fp16"
xformers = true
max_data_loader_n_workers = 8
wandb_api_key = "not-to-be-copied"
sample_every_n_steps = 100
misspelt_key = 5
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "in.toml").write_text(text)
    return tmp_path / "in.toml"


def test_the_released_run_becomes_our_pretraining_stage(tmp_path: Path) -> None:
    lines = convert_file(write(tmp_path, NOTEBOOK), tmp_path / "mine.yaml", processes=2)
    mine, card = load_stage([tmp_path / "mine.yaml"]), load_stage([ROOT / "configs/pretrain.yaml"])
    assert mine.batch == card.batch
    assert mine.optimizer == card.optimizer
    assert (mine.schedule.name, mine.schedule.cycle_steps) == ("cosine_restarts", 9099)
    assert (mine.schedule.min_lr, mine.schedule.decay) == (card.schedule.min_lr, card.schedule.decay)
    assert (mine.noise, mine.loss, mine.precision, mine.epochs) == (card.noise, card.loss, card.precision, card.epochs)
    assert mine.model.train_text_encoders
    assert mine.model.gradient_checkpointing == "full"
    for key in ("shuffle_tags", "separator", "max_tokens", "caption_dropout", "tag_dropout"):
        assert getattr(mine.data, key) == getattr(card.data, key)
    text = (tmp_path / "mine.yaml").read_text()
    notes = "\n".join(lines)
    for key, reason in {
        "lr_scheduler": "ignored by the original",
        "lr_scheduler_num_cycles": "ignored by the original",
        "misspelt_key": "not known here",
        "resolution": "dataset.yaml",
        "save_last_n_steps": "no counterpart",
        "xformers": "no counterpart",
        "lr_scheduler_type": "process_step",
        "(ours) seed": "streams need one",
    }.items():
        assert f"note: {key}: " in notes, key
        assert reason in notes.split(f"note: {key}: ")[1].split("\n")[0], key
        assert f"#   {key}: " in text, key
    assert "not-to-be-copied" not in text + notes


FINETUNE: dict[str, Any] = {
    "pretrained_model_name_or_path": "a.safetensors", "optimizer_type": "AdaFactor", "learning_rate": 2e-6,
    "optimizer_args": ["scale_parameter=False", "relative_step=False", "warmup_init=False"],
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100, "train_batch_size": 48, "noise_offset": 0.0357,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({}, "optimizer.name", "adafactor"),
        ({}, "schedule.warmup_steps", 100),
        ({}, "noise.offset", 0.0357),
        ({}, "optimizer.scale_parameter", False),
        ({"lr_scheduler": "constant"}, "schedule.name", "constant"),
        ({"optimizer_type": "AdamW8bit"}, "optimizer.name", "adamw8bit"),
        ({"use_8bit_adam": True}, "optimizer.name", "adamw8bit"),
        ({"min_timestep": 100}, "noise.timesteps", [100, 1000]),
        ({"v_parameterization": True}, "loss.prediction", "v"),
        ({"min_snr_gamma": 5}, "loss.min_snr_gamma", 5),
        ({"mixed_precision": "no"}, "precision", "fp32"),
        ({"train_text_encoder": True, "learning_rate_te1": 3e-6}, "optimizer.text_encoder_lr", 3e-6),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 4, "max_train_steps": 1000},
         "schedule.cycle_steps", 250),
        ({"lr_scheduler": "cosine", "max_train_epochs": 3}, "schedule.name", "cosine"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 0.1, "max_train_steps": 1000}, "schedule.warmup_steps", 100),
        ({"max_token_length": None}, "data.max_tokens", 75),
        ({"train_text_encoder": True, "learning_rate_te1": 1e-6}, "optimizer.text_encoder_2_lr", 2e-6),
        ({"train_text_encoder": True, "learning_rate_te2": 1e-6}, "optimizer.text_encoder_lr", 2e-6),
        ({"train_text_encoder": True, "learning_rate_te2": 1e-6}, "optimizer.text_encoder_2_lr", 1e-6),
        ({"use_lion_optimizer": True, "optimizer_args": []}, "optimizer.name", "lion"),
        ({"optimizer_type": "Prodigy", "optimizer_args": ["decouple=True", "d_coef=0.5"]}, "optimizer.args",
         {"weight_decouple": True, "d_coef": 0.5}),
        ({"optimizer_type": "pytorch_optimizer.CAME", "optimizer_args": []}, "optimizer.args", {"beta3": 0.9999}),
        ({"optimizer_type": "pytorch_optimizer.CAME", "optimizer_args": []}, "optimizer.betas", [0.9, 0.999]),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "max_train_steps": 9}, "schedule.name", "cosine"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.25, "max_train_steps": 9}, "schedule.min_lr", 5e-7),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 40, "max_train_steps": 99}, "schedule.cooldown_steps", 40),
        ({"optimizer_type": "PagedAdamW8bit", "optimizer_args": []}, "optimizer.paged", True),
        ({"optimizer_type": "AdamWScheduleFree", "optimizer_args": []}, "optimizer.name", "schedulefree"),
        ({"save_every_n_epochs": 2}, "export.every_epochs", 2),
        ({"block_lr": ",".join(["2e-6"] * 22 + ["0"])}, "optimizer.groups",
         [{"match": "unet.conv_norm_out.*", "lr": 0}, {"match": "unet.conv_out.*", "lr": 0}]),
    ],
)  # fmt: skip
def test_counterparts(changes: dict[str, Any], key: str, value: Any) -> None:
    assert convert({"section": {**FINETUNE, **changes}}).config[key] == value


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"optimizer_type": "DAdaptation"}, "optimizer_type", "choose optimizer.name"),
        ({"optimizer_type": "Lion", "optimizer_args": ["use_triton=True"]}, "optimizer_args use_triton", "no counterpart"),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler", "choose schedule.name"),
        ({"lr_scheduler": "constant"}, "lr_warmup_steps", "ignored by the original"),
        ({"save_precision": "bf16"}, "save_precision", "no counterpart"),
        ({"learning_rate_te1": 1e-6}, "learning_rate_te1", "ignored by the original"),
        ({"max_train_epochs": 2, "max_train_steps": 10}, "max_train_steps", "ignored by the original"),
        ({"noise_ofset": 1}, "noise_ofset", "not known"),
    ],
)  # fmt: skip
def test_named_with_the_reason(changes: dict[str, Any], key: str, words: str) -> None:
    result = convert({**FINETUNE, **changes})
    assert words in result.notes[key]


def test_a_plain_file_loads(tmp_path: Path) -> None:
    text = "\n".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else value!r}" for key, value in FINETUNE.items()
    )
    convert_file(write(tmp_path, text), tmp_path / "out.yaml")
    config = load_stage([tmp_path / "out.yaml"])
    assert (config.optimizer.unet_lr, config.batch.effective, config.data.max_tokens) == (2e-6, 48, 75)


def test_bad_toml_and_existing_out(tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"in\.toml is no TOML") as caught:
        convert_file(write(tmp_path, "a = = 1"), tmp_path / "out.yaml")
    assert caught.value.code == ExitCode.USAGE
    with pytest.raises(Halt, match="exists"):
        convert_file(write(tmp_path, "a = 1"), tmp_path / "in.toml")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, ROOT / "scripts/convert.py", *arguments]
    return subprocess.run([str(part) for part in line], capture_output=True, text=True, check=False)


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command without another start of the libraries."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *(str(part) for part in arguments)])
    return convert_command.main()


def test_command_line_converts_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tinysdxl.write(tmp_path / "folder")
    assert in_process(monkeypatch, folder, tmp_path / "one.safetensors") == 0
    assert in_process(monkeypatch, tmp_path / "one.safetensors", tmp_path / "back", "--tokenizers", folder) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert load_file(folder / name).keys() == load_file(tmp_path / "back" / name).keys()
    assert (tmp_path / "back/tokenizer_2/vocab.json").is_file()
    (tmp_path / "a.toml").write_text("")
    for source, option in ((tmp_path / "one.safetensors", "processes"), (folder, "tokenizers"), (tmp_path / "a.toml", "config")):
        with pytest.raises(Halt, match=f"--{option} has no meaning") as caught:
            in_process(monkeypatch, source, tmp_path / "never", f"--{option}", 2 if option == "processes" else folder)
        assert caught.value.code == ExitCode.USAGE
    assert not (tmp_path / "never").exists()


def test_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04K\x05.")
    done = command(tmp_path / "model.ckpt", tmp_path / "never")
    assert (done.returncode, "pickle" in done.stderr) == (ExitCode.MISMATCH, True)
    done = command(tmp_path / "absent", tmp_path / "never")
    assert (done.returncode, "does not exist" in done.stderr) == (ExitCode.USAGE, True)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"optimizer_type": "AdamW", "optimizer_args": []}, "optimizer.betas", [0.9, 0.999]),
        ({"optimizer_type": "AdamW", "optimizer_args": []}, "optimizer.weight_decay", 0.01),
        ({"optimizer_type": "AdamW", "optimizer_args": ["betas=0.8,0.9"]}, "optimizer.betas", [0.8, 0.9]),
        ({"optimizer_args": ["relative_step=False"]}, "optimizer.scale_parameter", True),
        ({"learning_rate": None}, "optimizer.unet_lr", 2e-6),
        ({"learning_rate": None, "train_text_encoder": True}, "optimizer.text_encoder_lr", 2e-6),
        ({"max_train_epochs": None, "max_train_steps": None}, "max_updates", 1600),
        ({}, "export.dtype", "fp32"),
        ({"max_token_length": "225"}, "data.max_tokens", 225),
        ({"learning_rate": "3e-6"}, "optimizer.unet_lr", 3e-6),
        ({"train_text_encoder": "true"}, "model.train_text_encoders", True),
        ({"lr_warmup_steps": 0.05, "max_train_steps": 2000}, "schedule.warmup_steps", 100),
        ({"lr_warmup_steps": "5%", "max_train_steps": 2000}, "schedule.warmup_steps", 100),
        ({"lr_scheduler_type": "CosineAnnealingWarmupRestarts", "lr_scheduler_args": ["first_cycle_steps=500.0"]},
         "schedule.cycle_steps", 500),
        ({"output_name": "!!!"}, "stage", "converted"),
        ({"output_name": "2024"}, "stage", "2024"),
        ({"wandb_run_name": "7"}, "tracking.name", "7"),
    ],
)  # fmt: skip
def test_the_originals_defaults_and_values_written_as_text(changes: dict[str, Any], key: str, value: Any) -> None:
    given = {name: item for name, item in {**FINETUNE, **changes}.items() if item is not None}
    assert convert(given).config[key] == value


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"optimizer_args": []}, "optimizer_args relative_step", "discards the learning rate"),
        ({"optimizer_args": ["relative_step=True"]}, "optimizer_args relative_step", "discards the learning rate"),
        ({"max_token_length": 300}, "data.max_tokens", "does not fit"),
        ({"learning-rate": 1}, "learning-rate", "it knows learning_rate"),
        ({"datasets": [{"batch_size": 2, "subsets": [{"num_repeats": 3}]}]}, "datasets[0].batch_size", "batch.micro"),
        ({"datasets": [{"subsets": [{"shuffle_caption": True}]}]},
         "datasets[0].subsets[0].shuffle_caption", "set data.shuffle_tags"),
        ({"datasets": [{"batch_size": 2, "subsets": [{"num_repeats": 3}]}]},
         "datasets[0].subsets[0].num_repeats", "dataset.yaml"),
        ({"pretrained_model_name_or_path": "owner/name"}, "(ours) model.init_from", "owner/name@<commit>"),
        ({"huber_c": 0}, "huber_c", "not read"),
        ({"huggingface_token": ""}, "huggingface_token", "empty"),
        ({"huggingface_path_in_repo": "a"}, "huggingface_path_in_repo", "no counterpart"),
        ({"debug_dataset": False}, "debug_dataset", "show.py step"),
        ({"lr_scheduler": "cosine_with_restarts", "max_train_epochs": 3, "max_train_steps": 9}, "lr_scheduler", "set schedule.cycle_steps"),
        ({"lr_scheduler_type": "x.CosineAnnealingWarmupRestarts", "lr_scheduler_args": ["cycle_mult=2.0"]},
         "lr_scheduler_args cycle_mult", "no counterpart"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_here_is_named(changes: dict[str, Any], key: str, words: str) -> None:
    assert words in convert({**FINETUNE, **changes}).notes[key]


def test_a_warmup_counted_per_process_is_named() -> None:
    assert "process_step" in convert(FINETUNE, processes=2).notes["lr_warmup_steps"]
    assert "lr_warmup_steps" not in convert(FINETUNE).notes


def test_what_keeps_the_yaml_from_loading_is_told(tmp_path: Path) -> None:
    lines = convert_file(write(tmp_path, "train_batch_size = 2\n'a\\nb' = 1\n"), tmp_path / "out.yaml")
    assert "to do before it loads: missing value for model.init_from" in lines[-1]
    lines = convert_file(write(tmp_path, 'pretrained_model_name_or_path = "x"\n"a\\nseed: 9" = 1'), tmp_path / "o2.yaml")
    assert load_stage([tmp_path / "o2.yaml"]).seed == 0  # a key cannot leave its comment
    out = tmp_path / "o4.yaml"
    lines = convert_file(write(tmp_path, 'pretrained_model_name_or_path = "x"\nnoise_offset = nan\nmax_grad_norm = inf'), out)
    assert "noise.offset is nan, must be finite" in lines[-1]
    cosine = 'pretrained_model_name_or_path = "x"\nlr_scheduler = "cosine_with_restarts"\nmax_train_epochs = 3'
    lines = convert_file(write(tmp_path, cosine), tmp_path / "o5.yaml")  # else three cycles where the original had one
    assert "schedule.cycle_steps is 0, must be at least 1" in lines[-1]
    for text in ('train_batch_size = "many"', 'optimizer_args = 5', 'optimizer_args = "eps=1"', "gradient_accumulation_steps = 0", 'lr_warmup_steps = "soon"'):
        with pytest.raises(Halt, match=text.split()[0]) as caught:
            convert_file(write(tmp_path, text), tmp_path / "o3.yaml")
        assert caught.value.code == ExitCode.USAGE
    assert not (tmp_path / "o3.yaml").exists()
