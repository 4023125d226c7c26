"""What a resume may change, and where the logs are cut."""

from __future__ import annotations

import json

import pytest

from train.base.errors import ExitCode, Halt
from train.config.schema import flatten
from train.config.stage import load_stage
from train.storage import resume
from train.storage.resume import Expectations, compare, key_class

# fmt: off
FREE = set("""data.workers data.prefetch data.on_read_error data.worker_timeout_s output_dir tracking.wandb
tracking.trace sampling.every_steps sampling.prompts checkpoint.every_steps checkpoint.keep resume.accept export.dtype
export.license launch.grace_s launch.collective_timeout_s validation.every_steps validation.images
validation.select data.separator""".split())  # noqa: SIM905
WARN = set("""epochs max_updates batch.split batch.accumulation model.gradient_checkpointing model.compile
model.channels_last model.attention optimizer.sharding optimizer.shard_group optimizer.gather optimizer.offload
optimizer.paged ema.device""".split())  # noqa: SIM905
REFUSE = set("""stage seed precision validation.share batch.micro batch.effective batch.min_bucket batch.remainder
batch.determinism data.path data.select data.shuffle_tags data.tag_dropout data.caption_dropout data.mix data.protect data.trigger
data.max_tokens model.init_from model.vae model.tokenizers model.train_text_encoders model.pooled_projection
model.timestep_embedding model.context model.float8 model.weights optimizer.name optimizer.unet_lr optimizer.weight_decay
optimizer.betas schedule.name schedule.cycle_steps schedule.decay noise.offset noise.timesteps loss.prediction loss.average loss.convert
ema.decay ema.every_steps""".split())  # noqa: SIM905
# fmt: on


def now(**changes) -> Expectations:
    config = {key: "old" for key in (*FREE, *WARN, *REFUSE) if key != "stage"}
    return Expectations(**{"stage": "pretrain", "config": config, "facts": {"plan": "p", "dataset": "d"}, **changes})


@pytest.mark.parametrize(("keys", "expected"), [(FREE, "free"), (WARN, "warn"), (REFUSE, "refuse")])
def test_class_of_every_key(keys, expected):
    assert [key for key in keys if key_class(key) != expected] == []


def test_every_key_of_a_real_config_has_been_thought_about():
    config = flatten(load_stage(["configs/pretrain.yaml"]))
    known = {*FREE, *WARN, *REFUSE}
    free = {key for key in config if key_class(key) == "free"} - known
    warn = {key for key in config if key_class(key) == "warn"} - known
    assert {key.partition(".")[0] for key in free} <= {
        "tracking",
        "sampling",
        "checkpoint",
        "export",
        "launch",
        "resume",
        "validation",  # at_start
        "data",  # cache_dir, cache_gb
    }
    assert warn == set()


def test_equal_settings_have_no_difference():
    assert compare(now().to_state(), now()) == resume.Comparison()


@pytest.mark.parametrize("key", sorted({*FREE, *WARN, *REFUSE}))
def test_one_changed_key_lands_in_its_class(key):
    changed = now(stage="ft1") if key == "stage" else now(config={**now().config, key: "new"})
    found = compare(now().to_state(), changed)
    by_class = {"free": found.free, "warn": found.warned, "refuse": found.refused}
    assert [d.key for d in by_class.pop(key_class(key))] == [key]
    assert all(not differences for differences in by_class.values())


def test_tuples_and_missing_keys_compare_as_json():
    saved = now(config={"noise.timesteps": (0, 1000), "epochs": 3}).to_state()
    assert compare(json.loads(json.dumps(saved)), now(config={"noise.timesteps": [0, 1000], "epochs": 3})).refused == ()
    assert [d.key for d in compare(saved, now(config={"epochs": 3})).refused] == ["noise.timesteps"]


DEFAULTS = {"new.key": 1, "new.pair": (1, 2), "old.key": 5}


@pytest.mark.parametrize(
    ("config", "refused"),
    [({"new.key": 1}, []), ({"new.pair": (1, 2)}, []), ({"new.key": 2, "new.pair": (2, 1)}, ["new.key", "new.pair"])],
)
def test_a_key_that_a_checkpoint_does_not_know_counts_as_its_default(config, refused):
    saved = now(config={"seed": 1}).to_state()
    del saved["set"]  # as the first schema wrote it
    found = compare(saved, now(config={"seed": 1, **config}, defaults=DEFAULTS))
    assert [d.key for d in found.refused] == refused
    assert [d.saved for d in found.refused] == [json.loads(json.dumps(DEFAULTS[key])) for key in refused], "told by its value"


def test_a_key_that_is_gone_is_agreed_if_it_held_its_default(monkeypatch):
    for value, refused in ((5, []), (6, ["old.key"])):
        saved = json.loads(json.dumps(now(config={"old.key": value}, defaults=DEFAULTS).to_state()))
        assert [d.key for d in compare(saved, now(config={}, defaults={"new.key": 1})).refused] == refused
        del saved["set"]  # the first schema's checkpoints do not say so: its keys that are gone stand in a table
        assert [d.key for d in compare(saved, now(config={})).refused] == ["old.key"]
        monkeypatch.setitem(resume._GONE, "old.key", 5)
        assert [d.key for d in compare(saved, now(config={})).refused] == refused
        monkeypatch.delitem(resume._GONE, "old.key")


def test_the_separator_is_held_against_the_set_and_not_against_the_checkpoint():
    old = now(config={"data.separator": "|||"}).to_state()
    assert compare(old, now(config={"data.separator": None}, defaults={"data.separator": None})).refused == ()


def test_paths_compare_by_what_they_hold():
    saved = now(config={"data.path": "data/a"}, held={"data.path": "h1"}).to_state()
    moved = now(config={"data.path": "elsewhere/a"}, held={"data.path": "h1"})
    assert compare(saved, moved).refused == ()
    other = now(config={"data.path": "data/a"}, held={"data.path": "h2"})
    assert [d.key for d in compare(saved, other).refused] == ["data.path (content)"]


def test_accept_by_name_section_or_meaning():
    changed = {**now().config, "batch.micro": "new", "seed": "new", "noise.offset": "new"}
    facts = {"plan": "other", "dataset": "other"}
    found = compare(now().to_state(), now(config=changed, facts=facts, accept=["batch.micro", "noise", "data"]))
    assert [d.key for d in found.refused] == ["seed"]
    assert [d.key for d in found.accepted] == ["batch.micro", "noise.offset", "dataset"]


def test_a_changed_plan_that_nothing_explains_is_refused_on_its_own():
    found = compare(now().to_state(), now(facts={"plan": "other", "dataset": "d"}))
    assert [d.key for d in found.refused] == ["plan"]
    assert compare(now().to_state(), now(facts={"plan": "other", "dataset": "d"}, accept=["plan"])).refused == ()


def test_notes_only_warn():
    saved = now(notes={"canary": "a", "threads": 1}).to_state()
    found = compare(saved, now(notes={"canary": "b", "threads": 1, "new": 2}))
    assert ([d.key for d in found.warned], found.refused) == (["canary"], ())


def test_unknown_name_in_accept():
    with pytest.raises(Halt, match=r"resume.accept: 'batch.mikro'.*did you mean 'batch.micro'") as caught:
        resume.check_accept(["attempts", "batch", "seed", "batch.mikro"], now().config)
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule.name": "constant", "schedule.warmup_steps": 100, "data.token_warmup_steps": 5}, ""),
        ({"schedule.name": "cosine_restarts"}, ""),
        ({"schedule.name": "wsd"}, "schedule.name"),
        ({"schedule.name": "cosine", "schedule.warmup_steps": 0.1}, "schedule.name, schedule.warmup_steps"),
        ({"schedule.name": "constant", "data.token_warmup_steps": 0.5}, "data.token_warmup_steps"),
    ],
)
def test_a_longer_run_whose_past_would_have_been_another_is_refused(settings, told):
    saved = now(config={**settings, "epochs": 3}).to_state()
    found = compare(saved, now(config={**settings, "epochs": 4}))
    assert [str(d) for d in found.refused] == (
        [f"epochs: checkpoint 3, now 4 ({told} would have been another up to here)"] if told else [])
    assert [d.key for d in found.warned] == ([] if told else ["epochs"])
    by_name = compare(saved, now(config={**settings, "epochs": 4}, accept=("epochs",)))
    assert by_name.refused == () and [d.key for d in by_name.accepted] == (["epochs"] if told else [])
