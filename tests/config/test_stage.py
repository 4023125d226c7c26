"""The stage config: strict, closed, helpful, frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from train.base.errors import ExitCode, Halt
from train.config.schema import flatten
from train.config.stage import config_hash, load_stage, to_yaml, unresolved_yaml

MINIMAL = """
stage: pretrain
seed: 31
output_dir: runs/pretrain
epochs: 10
model: {init_from: base, train_text_encoders: true}
data: {path: data/x}
batch: {micro: 16, effective: 96}
optimizer: {name: adamw, unet_lr: 1e-5, text_encoder_lr: 1e-5}
schedule: {name: cosine_restarts, min_lr: 1e-6, decay: 0.9}
"""


@pytest.fixture
def stage_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(Halt) as caught:
        load_stage([path], overrides)
    assert caught.value.code == ExitCode.USAGE
    return caught.value.message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("noise_offset=0.1", "did you mean noise.offset?"),
        ("batch.mico=3", "did you mean batch.micro?"),
        ("noise.timestps=[0,10]", "did you mean noise.timesteps?"),
        ("checkpoint.every=3", "checkpoint.every"),
        ("unet_lr=3", "did you mean optimizer.unet_lr?"),
        ("seed=abc", "seed is 'abc', must be a whole number"),
        ("seed=1.5", "seed is 1.5"),
        ("seed=true", "seed is True"),
        ("seed=-1", "seed is -1"),
        ("model.compile=3", "model.compile is 3, must be true or false"),
        ("precision=fp8", "fp16, bf16, fp32"),
        ("data.max_tokens=100", "75, 150, 225"),
        ("batch.split=7", "batch.split 7 does not divide batch.micro 16"),
        ("batch.effective=97", "batch.effective 97 is no multiple"),
        ("optimizer.betas=[0.9]", "must hold 2 values"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas"),
        ("optimizer.relative_step=true", "discards the learning rate"),
        ("model=3", "must hold keys and values"),
        ("model.init_from=null", "model.init_from"),
        ("model.train_text_encoders=false", "optimizer.text_encoder_lr is set"),
        ("optimizer.text_encoder_lr=null", "needs optimizer.text_encoder_lr"),
        ("noise.timesteps=[500,400]", "noise.timesteps"),
        ("noise.zero_terminal_snr=true", "loss.prediction: v"),
        ("checkpoint.keep=1", "checkpoint.keep is 1, must be at least 2"),
        ("data.caption_dropout=1.0", "data.caption_dropout"),
        ("validation.every_steps=10", "needs validation.share"),
        ("stage=a/b", "stage is 'a/b'"),
        (f"stage={101 * 'x'}", "at most 100, it names files"),
        ("batch.micro=0", "batch.micro is 0, must be at least 1"),
        ("model.vae=${oc.env:HF_TOKEN}", "refused"),
        ("model.vae=${oc.decode:x}", "refused"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_refusals_name_the_key(stage_yaml: Path, override: str, words: str) -> None:
    assert words in refusal(stage_yaml, override)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {vae: '${data.path}'}", "model.vae"),
        ("model: {vae: 'x/${seed}/y'}", "model.vae"),
        ("resume: {accept: [data, '${seed}']}", "resume.accept[1]"),
        ("optimizer: {eps: {a: [{b: '${oc.env:HF_TOKEN}'}]}}", "optimizer.eps.a[0].b"),
        ("data: {path: '${oc.env:ANIX_DATA,${oc.env:HF_TOKEN}}'}", "data.path"),
        ("data: {path: '${oc.env:ANIX_DATA}${oc.env:HF_TOKEN}'}", "data.path"),
        ("data: {path: '${oc.env:${export.title}}', select: HF_TOKEN}", "data.path"),
        ("data: {path: '${${export.title}:HF_TOKEN}'}", "data.path"),
        ('data: {path: "${oc.env:\\nHF_TOKEN}"}', "data.path"),
        ("data: {path: '${oc.env:ANIX_DATA,a,b}'}", "data.path"),
        ("data: {path: '\\${oc.env:ANIX_DATA}'}", "data.path"),
        ("data: '${model}'", "data"),
        ("seed: '${epochs}'", "seed"),
        ("tracking: {name: '${tracking.name}'}", "tracking.name"),
        ("data: {'${seed}': 3}", "data.${seed}"),
    ],
)
def test_references_are_refused_by_the_name_of_their_key(
    stage_yaml: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str
) -> None:
    monkeypatch.setenv("ANIX_DATA", "/home/somebody/data")
    monkeypatch.setenv("HF_TOKEN", "hf_CanaryCanaryCanary")
    overlay = stage_yaml.with_name("overlay.yaml")
    overlay.write_text(text)
    with pytest.raises(Halt) as caught:
        load_stage([stage_yaml, overlay])
    assert caught.value.code == ExitCode.USAGE
    assert caught.value.message.startswith(f"{key}: ")
    assert "only ${oc.env:NAME}" in caught.value.message
    assert "Canary" not in caught.value.message


def test_every_refused_reference_of_all_sources_stands_in_one_message(stage_yaml: Path) -> None:
    overlay = stage_yaml.with_name("overlay.yaml")
    overlay.write_text("model: {vae: '${seed}'}")
    with pytest.raises(Halt) as caught:
        load_stage([stage_yaml, overlay], ["data.path=${model.vae}", "model.vae=x"])
    assert "model.vae: " in caught.value.message
    assert "data.path: " in caught.value.message
    assert "override 'resume.accept=[${seed}]'" in refusal(stage_yaml, "resume.accept=[${seed}]")


def test_what_the_environment_holds_is_text_and_judged_as_such(
    stage_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANIX_DATA", "5")
    assert "seed is '5', must be a whole number" in refusal(stage_yaml, "seed=${oc.env:ANIX_DATA}")
    assert "data must hold keys and values" in refusal(stage_yaml, "data=${oc.env:ANIX_DATA}")
    monkeypatch.delenv("ANIX_DATA")
    assert "data.path: " in refusal(stage_yaml, "data.path=${oc.env:ANIX_DATA}")
    assert load_stage([stage_yaml], ["data.path=${oc.env:ANIX_DATA,data}/x"]).data.path == "data/x"


def test_strict_refuses_what_cannot_promise_its_bits(stage_yaml: Path) -> None:
    depends = ("batch.split=auto", "model.gradient_checkpointing=auto", "model.weights=bf16", "model.attention=cudnn")
    for override in depends:
        assert "strict" in refusal(stage_yaml, "batch.determinism=strict", override)


def test_what_ends_a_run_late_or_spoils_it_silently_is_refused_by_both_names(stage_yaml: Path) -> None:
    pairs = (("model.compile=true", "batch.remainder=keep"), ("model.channels_last=true", "optimizer.name=adamw8bit"))
    for pair in pairs:
        message = refusal(stage_yaml, *pair)
        assert all(override.partition("=")[0] in message for override in pair), message
        for one in pair:
            load_stage([stage_yaml], [one])


def test_every_problem_in_one_message(stage_yaml: Path) -> None:
    message = refusal(stage_yaml, "batch.mico=3", "seed=abc", "precision=fp8")
    assert all(word in message for word in ("batch.mico", "seed", "precision"))


def test_types_ranges_missing_keys_and_what_does_not_go_together_come_at_once(stage_yaml: Path) -> None:
    message = refusal(stage_yaml, "epochs='1'", "noise.offset=-1", "dtype=fp16", "batch.micro=7", "schedule=3")
    told = ("epochs is '1'", "noise.offset is -1, must be at least 0", "unknown key dtype", "batch.effective 96 is no multiple",
            "schedule must hold keys and values")  # fmt: skip
    assert [word for word in told if word not in message] == [], message
    stage_yaml.write_text(MINIMAL.replace("seed: 31\n", "").replace("name: adamw, ", ""))
    message = refusal(stage_yaml, "optimizer.text_encoder_lr=null", "batch.split=0")
    told = ("missing value for optimizer.name, seed", "batch.split is 0", "model.train_text_encoders needs")
    assert [word for word in told if word not in message] == [], message


def test_a_rule_tells_nothing_of_keys_that_are_unsound_by_themselves(stage_yaml: Path) -> None:
    message = refusal(stage_yaml, "batch.micro=x", "noise.timesteps=[5,true]", "schedule.processes=0")
    assert message.count(";") == 2, "batch.effective % 'x', and the order of 5 and true, are nobody's problem"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.unet_lr=.inf", "optimizer.unet_lr is inf, must be finite"),
        ("optimizer.betas=[.nan,0.9]", "optimizer.betas holds nan, each must be finite"),
        (f"checkpoint.keep=-{'9' * 400}", "must be at least 2"),
        ("ema.decay=1", "ema.decay is 1, must be in [0, 1)"),
        ("schedule.decay=0", "schedule.decay is 0, must be above 0"),
        ("batch.split=0", "batch.split is 0, must be at least 1"),
    ],
)
def test_ranges_are_told_in_one_form(stage_yaml: Path, override: str, told: str) -> None:
    assert told in refusal(stage_yaml, override)


def test_three_question_marks_are_no_value(stage_yaml: Path) -> None:
    assert "data.max_tokens: ???" in refusal(stage_yaml, "data.max_tokens=???")
    assert "seed: ???" in refusal(stage_yaml, "seed=???")


def test_missing_values_are_named(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(MINIMAL.replace("init_from: base, ", "").replace("seed: 31", ""))
    message = refusal(path)
    assert "model.init_from" in message
    assert "seed" in message


@pytest.mark.parametrize(
    "text",
    ["a: !!python/object/apply:os.system ['true']", "- 1\n- 2", "a: [", "a: &x [1]\nb: *y"],
)
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert "bad.yaml" in refusal(path)
    assert "does not exist" in refusal(tmp_path / "none.yaml")


def test_later_files_and_overrides_win(stage_yaml: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("batch: {micro: 8}\nseed: 7\n")
    config = load_stage([stage_yaml, overlay], ["seed=9"])
    assert (config.batch.micro, config.batch.effective, config.seed) == (8, 96, 9)


def test_frozen_complete_and_round_trip(stage_yaml: Path, tmp_path: Path) -> None:
    config = load_stage([stage_yaml])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch.micro = 3  # type: ignore[misc]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_stage([again]) == config
    assert config_hash(load_stage([again])) == config_hash(config)
    assert config_hash(load_stage([stage_yaml], ["seed=32"])) != config_hash(config)
    assert flatten(config)["batch.micro"] == 16
    assert config.images.order.tiles_per_update == 6


def test_saved_config_keeps_references_unresolved(stage_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANIX_DATA", "/home/somebody/data")
    override = "data.path=${oc.env:ANIX_DATA}/set"
    assert load_stage([stage_yaml], [override]).data.path == "/home/somebody/data/set"
    saved = unresolved_yaml([stage_yaml], [override])
    assert "somebody" not in saved
    assert "${oc.env:ANIX_DATA}/set" in saved
    assert "keep: 2" in saved  # defaults are written out


@pytest.mark.parametrize(
    ("name", "override"),
    [("pretrain", "optimizer.scale_parameter=true"), ("pretrain", "optimizer.clip_threshold=2"),
     ("pretrain", "optimizer.decay_rate=-0.5"), ("ft1", "optimizer.betas=[0.9,0.95]"), ("pretrain", "ema.device=cpu")],
)  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused_by_its_key(name: str, override: str) -> None:
    with pytest.raises(Halt, match=override.partition("=")[0]) as caught:
        load_stage([Path(__file__).parents[2] / "configs" / f"{name}.yaml"], [override])
    assert caught.value.code == ExitCode.USAGE
