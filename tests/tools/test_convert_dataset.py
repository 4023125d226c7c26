"""Configs as other trainers' users have them: dataset TOMLs, front ends, what is no training config at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings
from train.config.stage import load_stage
from train.tools.convert.toml import convert_file

FOLDERS = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
resolution = 1024
batch_size = 4
enable_bucket = true
min_bucket_reso = 512
max_bucket_reso = 2048

  [[datasets.subsets]]
  image_dir = 'C:\\pictures\\first girl'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = "pictures/second"
  keep_tokens = 3
  caption_extension = "caption"
"""
METADATA = """
[general]
caption_dropout_rate = 0.1
caption_tag_dropout_rate = 0.05

[[datasets]]
resolution = [768, 1024]
batch_size = 2
enable_bucket = true
max_bucket_reso = 1536

  [[datasets.subsets]]
  image_dir = "pictures"
  metadata_file = "pictures/meta_lat.json"
  shuffle_caption = true
  keep_tokens_separator = "###"
"""
SQUARES = """
[[datasets]]
resolution = 512
enable_bucket = false
  [[datasets.subsets]]
  image_dir = "a/10_cat"
  caption_separator = ";"
  flip_aug = true
  color_aug = false
  random_crop = true
  class_tokens = "cat"
"""
FRONT_END = """
[[subsets]]
name = "style"
image_dir = "pictures/style"
num_repeats = 2
caption_extension = ".txt"
[[subsets]]
name = "style"
image_dir = "pictures/more"
num_repeats = 0
"""
WILDCARDS = """
[general]
enable_bucket = true
bucket_no_upscale = true
bucket_reso_steps = 32
secondary_separator = ";;;"
enable_wildcard = true
caption_prefix = "1girl, "
[[datasets]]
resolution = "1024,1024"
validation_split = 0.1
resize_interpolation = "lanczos"
token_warmup_min = 2
token_warmup_step = 100
misspelt = 1
[[datasets.subsets]]
image_dir = "b"
"""
TRAINING = """
pretrained_model_name_or_path = "models/a.safetensors"
optimizer_type = "AdamW8bit"
learning_rate = 1e-5
lr_scheduler = "constant"
max_train_epochs = 4
max_token_length = 225
"""
KOHYA = TRAINING + """
train_data_dir = "img"
caption_extension = ".txt"
resolution = "1024,1024"
enable_bucket = true
max_bucket_reso = 2048
min_bucket_reso = 512
shuffle_caption = true
keep_tokens = 2
keep_tokens_separator = "|||"
"""
FINETUNING = TRAINING + """
train_data_dir = "pictures"
in_json = "meta.json"
dataset_repeats = 3
resolution = "1024,1024"
train_batch_size = 8
"""
ONE_FILE = "[training]\n" + TRAINING + FOLDERS


def convert(folder: Path, text: str | bytes, name: str = "in.toml", **more: str) -> list[str]:
    for other, content in more.items():
        (folder / f"{other}.toml").write_text(content)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return convert_file(folder / name, folder / "out.yaml")


@pytest.mark.parametrize("text", [FOLDERS, METADATA, SQUARES, FRONT_END, WILDCARDS])
@pytest.mark.parametrize("form", ["plain", "bom", "windows"])
def test_a_dataset_toml_is_a_dataset_yaml_that_loads(text: str, form: str, tmp_path: Path) -> None:
    data = {"plain": text.encode(), "bom": b"\xef\xbb\xbf" + text.encode(), "windows": text.replace("\n", "\r\n").encode()}[form]
    lines = convert(tmp_path, data)
    assert load_settings([tmp_path / "out.yaml"]).name == "out"
    assert not [line for line in lines if line.startswith("to do")]
    assert "(ours) the stage: set there: data.path=data/out data.select=pretrain data.shuffle_tags=" in "\n".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.toml", "out.yaml"]


def test_subsets_are_sources(tmp_path: Path) -> None:
    lines = convert(tmp_path, FOLDERS)
    made = load_settings([tmp_path / "out.yaml"])
    assert [(s.name, s.adapter, s.path, s.repeats, s.keep_tokens, s.caption_ext) for s in made.sources] == [
        ("first-girl", "sidecar", r"C:\pictures\first girl", 10, 1, ".txt"),
        ("second", "sidecar", "pictures/second", 1, 3, ".caption"),
    ]
    assert (made.buckets.area_px, made.buckets.min_px, made.buckets.max_px) == (1024**2, 512, 2048)
    assert made.select["pretrain"].min_bucket == 4
    assert "data.shuffle_tags=true" in lines[-2] and "batch.micro=4" in lines[-2]


def test_metadata_files_and_the_separator(tmp_path: Path) -> None:
    lines = convert(tmp_path, METADATA)
    made = load_settings([tmp_path / "out.yaml"])
    assert [(s.adapter, s.path, s.images) for s in made.sources] == [("sd_scripts", "pictures/meta_lat.json", "pictures")]
    assert made.separator == "###"
    assert (made.buckets.area_px, made.buckets.min_px, made.buckets.max_px) == (768 * 1024, 256, 1536)
    for told in ("data.caption_dropout=0.1", "data.tag_dropout=0.05", "'data.separator=###'"):
        assert told in lines[-2]


def test_without_buckets_everything_is_a_square(tmp_path: Path) -> None:
    lines = "\n".join(convert(tmp_path, SQUARES))
    made = load_settings([tmp_path / "out.yaml"])
    assert (made.buckets.area_px, made.buckets.min_px, made.buckets.max_px) == (512 * 512, 512, 512)
    assert (made.sources[0].tag_separator, made.sources[0].caption_ext) == (";", ".caption")
    for key in ("random_crop: not carried",):
        assert f"datasets[0].subsets[0].{key}" in lines
    assert "color_aug" not in lines, "off there, and here"


def test_what_is_not_carried_is_named(tmp_path: Path) -> None:
    lines = "\n".join(convert(tmp_path, WILDCARDS))
    for key in ("general.bucket_no_upscale", "general.secondary_separator", "general.enable_wildcard", "general.caption_prefix",
                "datasets[0].validation_split"):  # fmt: skip
        assert f"note: {key}: not carried: " in lines, key
    assert "datasets[0].misspelt: not known here" in lines
    assert "data.token_warmup_min=2 data.token_warmup_steps=100" in lines
    made = load_settings([tmp_path / "out.yaml"])
    assert (made.buckets.step_px, made.latents.resize) == (32, "lanczos")


def test_a_front_ends_subsets_and_one_that_is_passed_over(tmp_path: Path) -> None:
    lines = "\n".join(convert(tmp_path, FRONT_END))
    assert [(s.name, s.repeats) for s in load_settings([tmp_path / "out.yaml"]).sources] == [("style", 2)]
    assert "datasets[0].subsets[1].num_repeats: 0: the original passes such a subset over" in lines
    assert "enable_bucket: not given" in lines and "resolution is not given" in lines


@pytest.mark.parametrize(("text", "name"), [(TRAINING + 'dataset_config = "ds.toml"', "ds"), (ONE_FILE, "")])
def test_a_training_toml_with_a_dataset_makes_both(text: str, name: str, tmp_path: Path) -> None:
    lines = convert(tmp_path, text, **({name: FOLDERS} if name else {}))
    stage, pictures = load_stage([tmp_path / "out.yaml"]), load_settings([tmp_path / "out_dataset.yaml"])
    assert (stage.data.path, stage.data.select) == (f"data/{pictures.name}", "pretrain") and list(pictures.select) == ["pretrain"]
    assert (stage.batch.micro, stage.batch.effective, stage.data.shuffle_tags) == (4, 4, True)
    assert len(pictures.sources) == 2 and pictures.latents.vae == "models/a.safetensors"
    assert not [line for line in lines if "dataset_config" in line or "(ours) data.path" in line]


def test_folders_named_on_the_command_line(tmp_path: Path) -> None:
    convert(tmp_path, KOHYA)
    stage, pictures = load_stage([tmp_path / "out.yaml"]), load_settings([tmp_path / "out_dataset.yaml"])
    source = pictures.sources[0]
    assert (source.path, source.repeats, source.keep_tokens, source.caption_ext) == ("img", "kohya", 2, ".txt")
    assert (pictures.separator, stage.data.separator, stage.data.shuffle_tags) == ("|||", "|||", True)
    assert (pictures.buckets.min_px, pictures.buckets.max_px) == (512, 2048)


def test_metadata_named_on_the_command_line(tmp_path: Path) -> None:
    convert(tmp_path, FINETUNING)
    stage, pictures = load_stage([tmp_path / "out.yaml"]), load_settings([tmp_path / "out_dataset.yaml"])
    source = pictures.sources[0]
    assert (source.adapter, source.path, source.images, source.repeats) == ("sd_scripts", "meta.json", "pictures", 3)
    assert (stage.batch.micro, stage.data.shuffle_tags, pictures.select["pretrain"].min_bucket) == (8, False, 8)


def test_a_run_that_was_given_steps_gets_its_steps(tmp_path: Path) -> None:
    convert(tmp_path, KOHYA.replace("max_train_epochs = 4", "max_train_steps = 500"))
    stage = load_stage([tmp_path / "out.yaml"])
    assert (stage.max_updates, stage.epochs) == (500, 500), "one epoch of a small set would end it after a few"


def test_a_folder_inside_another_subsets_folder_is_told(tmp_path: Path) -> None:
    text = FOLDERS.replace("pictures/second", "C:/pictures/first girl/closer/second")
    lines = "\n".join(convert(tmp_path, text))
    assert "note: datasets[0].subsets[1].image_dir: lies inside that of datasets[0].subsets[0]" in lines
    assert "subsets[0].image_dir: lies" not in lines and "lies inside" not in "\n".join(convert_again(tmp_path, FOLDERS))
    assert lines.count("(ours) sources: a folder is read with all below it, a caption file with all its lines") == 1


def convert_again(folder: Path, text: str) -> list[str]:
    (folder / "out.yaml").unlink()
    return convert(folder, text)


GUI = {"LoRA_type": "", "pretrained_model_name_or_path": "a", "max_resolution": "1024,1024", "train_data_dir": "b"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", TRAINING + 'network_module = "networks.lora"\nnetwork_dim = 32', "trains a LoRA (network_module = 'networks.lora')"),
        ("a.toml", "[network_arguments]\nnetwork_dim = 8\n" + "[x]\n" + TRAINING, "trains a LoRA (network_dim = 8)"),
        ("a.toml", METADATA + '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "x"', "resolution is (768, 1024) in"),
        ("a.toml", METADATA + '[[datasets.subsets]]\nimage_dir = "x"\nshuffle_caption = true\nkeep_tokens_separator = "|||"',
         "keep_tokens_separator is '###' in datasets[0].subsets[0] and '|||' in datasets[0].subsets[1]"),
        ("a.toml", METADATA + '[[datasets.subsets]]\nimage_dir = "x"', "shuffle_caption is True in datasets[0].subsets[0] and False"),
        ("a.toml", "[general]\nenable_bucket = true", "without [[datasets]]"),
        ("a.toml", "[[datasets]]\nresolution = 512", "datasets[0].subsets must be a list of tables"),
        ("a.toml", "datasets = 3", "datasets must be a list of tables"),
        ("a.toml", FOLDERS.replace("= 1024", '= "big"'), "resolution is 'big'"),
        ("a.toml", FOLDERS.replace("num_repeats = 10", 'num_repeats = "many"'), "num_repeats"),
        ("a.toml", FOLDERS.replace("batch_size = 4", "batch_size = 0"), "batch_size is 0"),
        ("a.toml", FOLDERS.replace("image_dir", "picture_dir"), "neither image_dir nor metadata_file"),
        ("a.toml", TRAINING + 'dataset_config = "absent.toml"', "dataset_config absent.toml is not there"),
        ("a.toml", TRAINING + 'dataset_config = "a.toml"', "has no [[datasets]]"),
        ("a.toml", '[project]\nname = "x"', "holds no key of a training config (name)"),
        ("a.toml", "", "holds no key of a training config"),
        ("a.toml", "\ufefftrain_batch_size = = 3", "is no TOML"),
        ("a.toml", TRAINING.replace("models/a", "${/a"), "would take for a reference"),
        ("a.json", json.dumps(GUI), "the settings that a training GUI (kohya_ss) saved for a model"),
        ("a.json", "\ufeff" + json.dumps({**GUI, "LoRA_type": "Standard"}), "saved for a LoRA"),
        ("a.json", json.dumps({"p/1": {"tags": "1girl"}}), "adapter: sd_scripts"),
        ("a.json", json.dumps({"training_method": "FINE_TUNE"}), "OneTrainer"),
        ("a.json", "[1, 2]", "no training config"),
        ("a.json", "{", "is no JSON"),
    ],
)
def test_refused_by_name(name: str, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(Halt) as caught:
        convert(tmp_path, text, name)
    assert caught.value.code == ExitCode.USAGE
    assert words in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "nothing is written"


def test_utf_16_is_named(tmp_path: Path) -> None:
    with pytest.raises(Halt, match="is UTF-16 text: save it as UTF-8"):
        convert(tmp_path, TRAINING.encode("utf-16"))


def test_the_same_as_json(tmp_path: Path) -> None:
    table: dict[str, Any] = {"general": {"enable_bucket": True}, "datasets": [{"resolution": 1024, "subsets": [{"image_dir": "a"}]}]}
    convert(tmp_path, json.dumps(table), "ds.json")
    assert load_settings([tmp_path / "out.yaml"]).sources[0].path == "a"


def test_sizes_that_make_no_table_are_told(tmp_path: Path) -> None:
    lines = "\n".join(convert(tmp_path, FOLDERS.replace("min_bucket_reso = 512", "min_bucket_reso = 500")))
    assert "(ours) buckets: to be set before the step latents: buckets.min_px is 500, must be a multiple of step_px 64" in lines


def test_regularisation_pictures_are_a_source_with_their_weight(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'pretrained_model_name_or_path = "m"\ntrain_data_dir = "mine"\nreg_data_dir = "plain"\nprior_loss_weight = 0.4\n'
    )
    told = convert_file(tmp_path / "a.toml", tmp_path / "out.yaml")
    mine, plain = load_settings([tmp_path / "out_dataset.yaml"]).sources
    assert (mine.path, mine.weight, plain.path, plain.weight, plain.repeats) == ("mine", 1.0, "plain", 0.4, "kohya")
    assert any("is_reg: became weight: 0.4" in line for line in told)
    (tmp_path / "b.toml").write_text(FOLDERS.replace("num_repeats = 10", "is_reg = true"))
    convert_file(tmp_path / "b.toml", tmp_path / "b.yaml")
    assert [source.weight for source in load_settings([tmp_path / "b.yaml"]).sources] == [1.0, 1.0], "theirs is 1 where it is not given"
    (tmp_path / "c.toml").write_text((tmp_path / "a.toml").read_text().replace("0.4", '"much"'))
    with pytest.raises(Halt, match="prior_loss_weight is 'much', must be a number"):
        convert_file(tmp_path / "c.toml", tmp_path / "c.yaml")


def test_masks_are_a_key_of_their_source(tmp_path: Path) -> None:
    lines = FOLDERS.replace("num_repeats = 10", "alpha_mask = true").replace("keep_tokens = 3", 'conditioning_data_dir = "pictures/masks"')
    (tmp_path / "a.toml").write_text(lines)
    convert_file(tmp_path / "a.toml", tmp_path / "out.yaml")
    assert [source.mask for source in load_settings([tmp_path / "out.yaml"]).sources] == ["alpha", "pictures/masks"]


def test_flips_are_second_latents_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('pretrained_model_name_or_path = "m"\ntrain_data_dir = "mine"\nflip_aug = true\n')
    convert_file(tmp_path / "a.toml", tmp_path / "out.yaml")
    assert load_settings([tmp_path / "out_dataset.yaml"]).latents.flip == "all" and load_stage([tmp_path / "out.yaml"]).data.flip is True
