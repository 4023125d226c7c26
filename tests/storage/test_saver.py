"""Background saves: same bytes as foreground ones, one at a time, failures counted and told."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from train.base.errors import ExitCode, Halt
from train.config.stage import CheckpointConfig
from train.recipe.optimizer_state import state_shapes
from train.storage import checkpoint, manifest, rundir, space
from train.storage import saver as saver_module
from train.storage.checkpoint import Progress
from train.storage.resume import Expectations
from train.storage.saver import Saver
from train.testing.counts import CLIP_BIGG, CLIP_L, SDXL_UNET


@pytest.fixture
def run(tmp_path):
    opened = rundir.open_run_dir(tmp_path / "run", "s")
    yield opened
    opened.close()


def tensors(value: float = 1.0):
    return {"model": {"w": torch.full((64, 64), value)}, "optimizer": {"w/exp_avg": torch.full((64, 64), -value)}}


def saver(run, *, permanent_every=1000, **settings) -> Saver:
    return Saver(run, CheckpointConfig(**settings), permanent_every=permanent_every)


def save_and_look(mine: Saver, step: int) -> None:
    mine.save(Progress(step, step), tensors(), {})
    mine._join()
    mine.raise_failures()


def shas(run, step: int) -> dict[str, str]:
    found = manifest.verify(run.checkpoints / f"step-{step:08d}")
    return {name: r.sha256 for name, r in found.files.items() if name.endswith(".safetensors")}


def test_background_and_foreground_write_the_same_bytes(run):
    state = tensors()
    background, foreground = saver(run), saver(run, background=False)
    background.save(Progress(1, 1), state, {})
    state["model"]["w"].add_(1)  # training goes on while the thread writes
    background.finish()
    assert shas(run, 1) != {}
    foreground.save(Progress(2, 2), tensors(), {})
    assert shas(run, 1) == shas(run, 2)
    assert [r.step for r in background.reports()] == [1]
    assert background.reports() == []


def test_state_is_taken_at_the_time_of_the_save(run, monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", "save.begin@1:sleep=0.2")
    mine = saver(run)
    state = {"history": [[0, 1]]}
    mine.save(Progress(1, 1), tensors(), state)
    state["history"].append([5, 2])
    mine.finish()
    assert checkpoint.load_newest(run, Expectations("s", {}, accept=["stage"])).state["history"] == [[0, 1]]


def test_buffers_are_reused_and_follow_the_tensors():
    copy = saver_module.HostCopy()
    first = copy.take(tensors(1.0))
    assert copy.missing_bytes(tensors()) == 0
    second = copy.take(tensors(2.0))
    assert second["model"]["w"].data_ptr() == first["model"]["w"].data_ptr()
    assert second["model"]["w"][0, 0] == 2
    grown = {"model": {"w": torch.zeros(65, 64)}}
    assert copy.take(grown)["model"]["w"].shape == (65, 64)
    assert torch.equal(copy.take(tensors(3.0))["optimizer"]["w/exp_avg"], torch.full((64, 64), -3.0))
    assert copy.bytes == 1 << 20


Sizes = dict[tuple[str, str], int]


def real_sizes(optimizer: str, weights: str, *, text: bool, average: bool = False) -> Sizes:
    """Bytes of every tensor of a full-size checkpoint."""
    with torch.device("meta"):
        modules = [UNet2DConditionModel(**SDXL_UNET)]
        modules += [CLIPTextModel(CLIPTextConfig(**CLIP_L)), CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG))] * text
    found: Sizes = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            shape, name = tuple(parameter.shape), f"{number}.{name}"
            found["model", name] = math.prod(shape) * (2 if weights == "bf16" else 4)
            for key, kept in state_shapes(optimizer, shape).items():
                found["optimizer", f"{name}/{key}"] = math.prod(kept) * (1 if optimizer == "adamw8bit" and kept == shape else 4)
            if average:
                found["ema", name] = math.prod(shape) * 4
    return found


@pytest.mark.parametrize(("optimizer", "weights", "text", "gigabytes"), [
    ("adamw", "fp32", True, 40.6), ("adafactor", "fp32", False, 11.2), ("adafactor", "bf16", False, 6.1), ("adamw8bit", "fp32", True, 20.4),
])  # fmt: skip
def test_few_arenas_hold_a_stage_in_hardly_more_than_its_bytes(optimizer, weights, text, gigabytes):
    """A power of two for each tensor would take 53.5 GB in stage 1, and 8.3 GB in a finetune with 16-bit weights."""
    sizes = real_sizes(optimizer, weights, text=text)
    whole, found = sum(sizes.values()), saver_module.arenas(sizes)
    assert whole / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert whole <= sum(size for size, _ in found) <= 1.02 * whole
    assert len(found) <= whole / 2**30 + 12
    assert all(size == 1 << (size.bit_length() - 1) for size, _ in found), "as pinned memory is handed out"


@settings(max_examples=30)
@given(st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(0, 99).map(str)), st.one_of(st.just(0), st.integers(0, 5 << 30))))
def test_every_tensor_has_a_place_of_its_own(sizes):
    found = saver_module.arenas(sizes)
    assert sorted(key for _, offsets in found for key in offsets) == sorted(sizes)
    for size, offsets in found:
        places = sorted((offset, offset + sizes[key]) for key, offset in offsets.items())
        assert all(start % 64 == 0 and end <= size for start, end in places)
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(places))


def test_copies_of_every_kind_of_tensor_are_exact_and_lie_in_one_arena():
    of_all = {
        "model": {"w": torch.randn(7, 5).bfloat16(), "turned": torch.randn(4, 3, 3, 2).to(memory_format=torch.channels_last)},
        "optimizer": {"w/step": torch.tensor(7), "w/RMS": torch.tensor(0.25), "w/state1": torch.arange(77, dtype=torch.uint8),
                      "none": torch.zeros(0, 3), "rows": torch.arange(12.0).reshape(3, 4)[1:]},
    }  # fmt: skip
    copy = saver_module.HostCopy()
    assert copy.missing_bytes(of_all) == 1 << 20
    found = copy.take(of_all)
    assert (copy.bytes, copy.missing_bytes(of_all)) == (1 << 20, 0)
    for group, named in of_all.items():
        for name, tensor in named.items():
            assert torch.equal(found[group][name], tensor) and found[group][name].dtype == tensor.dtype
    assert len({t.untyped_storage().data_ptr() for named in found.values() for t in named.values()}) == 1
    more = of_all | {"ema": {"w": torch.randn(7, 5)}}  # what another process kept (ZeRO-1) comes with the save alone
    assert copy.take(more)["model"]["w"].data_ptr() == found["model"]["w"].data_ptr()
    assert copy.bytes == 2 << 20


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), MemoryError()])
def test_memory_that_the_host_refuses_means_a_foreground_save_and_is_said_once(run, monkeypatch, caplog, error):
    mine, empty = saver(run, keep=5), torch.empty

    def refused(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            raise error
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refused)
    for step in (1, 2):
        assert mine.save(Progress(step, step), tensors(), {})
        assert mine._thread is None and shas(run, step)
    assert [record.message for record in caplog.records if "background" in record.message] == [
        f"no host memory for saving in the background ({type(error).__name__}: {error}): the training waits for each save"
    ]
    monkeypatch.undo()
    assert mine.save(Progress(3, 3), tensors(), {}) and mine._thread is not None
    mine.finish()
    assert shas(run, 3) == shas(run, 1)


def test_reserved_buffers_are_the_ones_saved_from(run):
    """Reserving allocates what `take` would, leaves the state alone, and is joined by whatever comes next."""
    mine, state = saver(run), tensors(3.0)
    assert not mine.reserved
    mine.reserve(state)
    assert mine.reserved
    mine._join()
    buffers = {key: buffer.data_ptr() for key, buffer in mine._copy._buffers.items()}
    assert mine._copy.missing_bytes(state) == 0
    assert (state["model"]["w"] == 3.0).all()
    mine.save(Progress(1, 1), state, {})
    mine.finish()
    assert {key: buffer.data_ptr() for key, buffer in mine._copy._buffers.items()} == buffers
    assert (checkpoint.load_newest(run, Expectations("s", {}, accept=["stage"])).tensors("model")["w"] == 3.0).all()


def test_reserving_leaves_a_save_in_flight_alone(run, monkeypatch):
    """A resume whose first update ends an interval saves before it reserves."""
    monkeypatch.setenv("ANIX_FAULT", "save.write@1:sleep=0.2")
    mine = saver(run)
    mine.save(Progress(1, 1), tensors(3.0), {})
    mine.reserve(tensors(3.0))
    mine.finish()
    assert (checkpoint.load_newest(run, Expectations("s", {}, accept=["stage"])).tensors("model")["w"] == 3.0).all()


def test_a_foreground_saver_reserves_nothing(run):
    mine = saver(run, background=False)
    mine.reserve(tensors())
    mine.finish()
    assert not mine._copy._buffers


@pytest.mark.parametrize(("when_busy", "steps"), [("skip", [1, 3]), ("wait", [1, 2, 3])])
def test_one_save_in_flight(run, monkeypatch, when_busy, steps):
    monkeypatch.setenv("ANIX_FAULT", "save.begin@1:sleep=0.3")
    mine = saver(run, when_busy=when_busy, keep=5)
    assert mine.save(Progress(1, 1), tensors(), {})
    assert mine.save(Progress(2, 2), tensors(), {}) is (when_busy == "wait")
    mine._join()
    mine.save(Progress(3, 3), tensors(), {})
    mine.finish()
    assert sorted(manifest.step_of(n) for n in os.listdir(run.checkpoints)) == steps
    assert mine.busy_skips == (when_busy == "skip")


def test_stop_waits_for_the_save_in_flight_and_then_saves(run, monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", "save.begin@1:sleep=0.2")
    mine = saver(run)
    mine.save(Progress(1, 1), tensors(), {})
    path = mine.save_now(Progress(2, 2), tensors(), {}, permanent=True)
    assert manifest.verify(path).permanent
    assert shas(run, 1)
    mine.save(Progress(3, 3), tensors(), {})
    assert mine.save_now(Progress(3, 3), tensors(), {}).name == "step-00000003"  # already there


@pytest.mark.parametrize("background", [True, False])
def test_two_failures_are_reported_the_third_ends_the_run(run, monkeypatch, background):
    mine = saver(run, background=background)
    mine.save(Progress(1, 1), tensors(), {})
    mine._join()
    monkeypatch.setenv("ANIX_FAULT", "save.write@*:enospc")
    for step in (2, 3):
        save_and_look(mine, step)
    assert [r.path is None for r in mine.reports()] == [False, True, True]
    with pytest.raises(Halt, match="3 checkpoints in a row") as caught:
        save_and_look(mine, 4)
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert os.listdir(run.checkpoints) == ["step-00000001"]


def test_a_success_clears_the_count(run, monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", "save.write@2:enospc;save.write@3:enospc;save.write@5:enospc")
    mine = saver(run, background=False)
    for step in range(1, 7):
        mine.save(Progress(step, step), tensors(), {})
    assert [r.step for r in mine.reports() if r.path is None] == [2, 3, 5]


def test_a_failing_stop_says_so(run, monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", "save.fsync@*:eio")
    with pytest.raises(Halt, match="Input/output error") as caught:
        saver(run).save_now(Progress(1, 1), tensors(), {})
    assert caught.value.code == ExitCode.CANNOT_WRITE


def test_an_error_of_ours_in_the_thread_is_not_a_full_disk(run, monkeypatch):
    monkeypatch.setenv("ANIX_FAULT", "save.manifest@*:raise=KeyError")
    mine = saver(run)
    mine.save(Progress(1, 1), tensors(), {})
    mine._join()
    with pytest.raises(KeyError):
        mine.raise_failures()


def test_too_little_host_memory_means_a_foreground_save(run, monkeypatch):
    monkeypatch.setattr(saver_module, "available_host_bytes", lambda: 1000)
    mine = saver(run)
    mine.save(Progress(1, 1), tensors(), {})
    assert mine._thread is None
    assert shas(run, 1)


def test_permanent_by_interval(run):
    mine = saver(run, permanent_every=2, background=False)
    for step in range(1, 8):
        mine.save(Progress(step, step), tensors(), {})
    assert sorted(manifest.step_of(n) for n in os.listdir(run.checkpoints)) == [2, 4, 6, 7]


def test_permanent_is_the_first_save_past_a_multiple_which_saves_seldom_meet(run):
    """Every 4 updates and at a stop after 13; multiples of 7 are 7, 14, 21, 28. One is saved once more on the way."""
    mine = saver(run, permanent_every=7, background=False)
    for step in (4, 8, 12, 13, 16, 12, 16, 20, 24, 28):
        mine.save_now(Progress(step, step), tensors(), {})
    left = {manifest.step_of(n): manifest.read(run.checkpoints / n).permanent for n in os.listdir(run.checkpoints)}
    assert left == {8: True, 16: True, 24: True, 28: True}
    count = space.permanent_count(CheckpointConfig(every_steps=4, permanent_every_steps=7), 28, 100)
    assert count == sum(left.values())


def test_a_folder_that_cannot_be_listed_is_a_failed_save_and_not_the_end(run, monkeypatch):
    def broken(folder):
        raise OSError(5, "Input/output error")

    mine = saver(run)
    monkeypatch.setattr(saver_module, "committed", broken)
    assert mine.save(Progress(1, 1), tensors(), {})
    mine.finish()
    mine.raise_failures()
    assert [(report.path, report.reason) for report in mine.reports()] == [(None, "Input/output error")]


def test_waiting_for_space_ends_when_a_stop_is_asked(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "_DISK_POLL_S", 0.01)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 0)
    asked: list[int] = []
    mine = Saver(run, CheckpointConfig(on_full_disk="wait"), permanent_every=9, stopping=lambda: bool(asked))
    mine.save(Progress(1, 1), tensors(), {})
    asked.append(1)
    with pytest.raises(Halt):
        mine.save_now(Progress(2, 2), tensors(), {})


def test_available_memory_is_a_sane_number():
    assert 1 << 20 < saver_module.available_host_bytes() < 1 << 62


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_copies_into_page_locked_arenas_on_one_stream():
    copy, streams = saver_module.HostCopy(), []
    for value in (1.0, 2.0):
        found = copy.take({group: {n: t.cuda() for n, t in named.items()} for group, named in tensors(value).items()})
        copy.wait()
        assert (found["model"]["w"] == value).all() and found["model"]["w"].is_pinned()
        streams.append(copy._stream)
    assert streams[0] is streams[1] is not None
    assert copy.bytes == 1 << 20
