"""Saving, retention, loading: bits come back, damage is found and named, the order of writes is the protocol's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import KEEP2, expect, save_steps, some_tensors
from safetensors.torch import load_file

from train.base.errors import ExitCode, Halt
from train.config.stage import CheckpointConfig
from train.storage import checkpoint, manifest, rundir, space, state_files
from train.storage.checkpoint import Progress, SaveFailed


@pytest.fixture
def run(tmp_path):
    opened = rundir.open_run_dir(tmp_path / "run", "pretrain")
    yield opened
    opened.close()


def steps_of(run) -> list[int]:
    return sorted(manifest.step_of(name) for name in os.listdir(run.checkpoints))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# --- bits --------------------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    raw = torch.arange(48, dtype=torch.uint8).mul(5)
    tensors = {str(dtype): raw.clone().view(dtype) for dtype in state_files.DTYPE_NAMES if dtype != torch.bool}
    tensors["bool"] = torch.tensor([[True], [False]])
    tensors["scalar"] = torch.tensor(7.25)  # 0-dim, as AdamW's step
    tensors["empty"] = torch.zeros(0, 3)
    tensors["nan payload"] = torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32)
    tensors["transposed"] = torch.randn(3, 5).t()
    tensors["channels_last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    path = tmp_path / "x.safetensors"
    record = state_files.write(path, tensors)
    assert (record.bytes, record.tensors) == (path.stat().st_size, len(tensors))
    assert record.bytes == state_files.file_bytes(tensors)
    back = dict(state_files.read(path))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert back[name].dtype == tensor.dtype
        assert bits(back[name]) == bits(tensor), name
    assert state_files.read_specs(path) == state_files.specs(tensors)
    assert load_file(path).keys() == tensors.keys()  # the library reads our file


def test_save_and_load_give_back_everything(run):
    tensors = some_tensors()
    tensors["ema"] = {"w": torch.ones(2, dtype=torch.bfloat16)}
    state = {**expect().to_state(), "scaler": {"scale": 65536.0}}
    path = checkpoint.save(run, Progress(12, 11, 1, 48), tensors, state, KEEP2)
    loaded = checkpoint.load_newest(run, expect())
    assert loaded.path == path == run.checkpoints / "step-00000012"
    assert loaded.progress == Progress(12, 11, 1, 48)
    assert loaded.state["scaler"] == {"scale": 65536.0}
    assert loaded.groups == ("ema", "model", "optimizer")
    for group, named in tensors.items():
        back = loaded.tensors(group)
        assert {n: bits(t) for n, t in back.items()} == {n: bits(t) for n, t in named.items()}
    assert sorted(p.name for p in path.iterdir()) == [
        "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip


def test_files_follow_the_umask(run):
    old = os.umask(0o027)
    try:
        save_steps(run, 1)
    finally:
        os.umask(old)
    folder = run.checkpoints / "step-00000001"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o640}


# --- retention ---------------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_the_permanent_ones(run):
    save_steps(run, 10, 20, 30, 40, 50, permanent=(20,))
    assert steps_of(run) == [20, 40, 50]


def test_retention_leaves_other_runs_and_later_steps_alone(run):
    save_steps(run, 10, 20)
    foreign = run.checkpoints / "step-00000005"
    shutil.copytree(run.checkpoints / "step-00000010", foreign)
    body = manifest.read(run.checkpoints / "step-00000010")
    (foreign / manifest.NAME).write_bytes(manifest.encode(manifest.Manifest("another0run00000", 5, False, body.files)))
    save_steps(run, 90, 15, 16)  # 15 and 16 after a fall-back past 90
    assert steps_of(run) == [5, 15, 16, 20, 90]


def test_a_step_that_is_there_and_sound_is_not_written_again(run):
    save_steps(run, 10)
    before = {p.name: p.stat().st_mtime_ns for p in (run.checkpoints / "step-00000010").iterdir()}
    save_steps(run, 10)
    assert {p.name: p.stat().st_mtime_ns for p in (run.checkpoints / "step-00000010").iterdir()} == before
    save_steps(run, 10, permanent=(10,))  # a stage's end on an interval: only the mark changes
    assert manifest.verify(run.checkpoints / "step-00000010").permanent


def test_a_damaged_one_of_the_same_step_is_replaced(run):
    save_steps(run, 10, 20)
    (run.checkpoints / "step-00000020" / "model.safetensors").write_bytes(b"broken")
    save_steps(run, 20)
    assert checkpoint.load_newest(run, expect()).progress.step == 20
    assert steps_of(run) == [10, 20]


# --- loading -----------------------------------------------------------------------------------------


def test_nothing_saved_yet_is_no_checkpoint(run):
    assert checkpoint.load_newest(run, expect()) is None


def test_order_is_by_number_not_by_text_or_time(run):
    save_steps(run, 99_999_999, 123_456_789)
    os.utime(run.checkpoints / "step-99999999")
    assert checkpoint.load_newest(run, expect()).progress.step == 123_456_789


def test_all_damaged_is_exit_3_with_every_reason(run):
    save_steps(run, 10, 20)
    (run.checkpoints / "step-00000010" / "state.json").unlink()
    (run.checkpoints / "step-00000020" / "more.txt").write_text("x")
    with pytest.raises(Halt) as caught:
        checkpoint.load_newest(run, expect())
    assert caught.value.code == ExitCode.NO_CHECKPOINT
    assert "step-00000010: state.json: missing" in caught.value.message
    assert "step-00000020: more.txt: not in the manifest" in caught.value.message


def test_a_foreign_thing_alone_in_checkpoints_is_never_a_fresh_start(run):
    (run.checkpoints / "old-00000010").mkdir()
    with pytest.raises(Halt, match="not a checkpoint") as caught:
        checkpoint.load_newest(run, expect())
    assert caught.value.code == ExitCode.NO_CHECKPOINT


def test_a_sound_checkpoint_of_another_run_stops_and_does_not_fall_back(run):
    save_steps(run, 10, 20)
    changed = expect(config={"seed": 32, "batch.micro": 8, "data.workers": 0, "epochs": 9})
    with pytest.raises(Halt) as caught:
        checkpoint.load_newest(run, changed)
    assert caught.value.code == ExitCode.MISMATCH
    text = caught.value.message
    assert "step-00000020" in text
    assert "refuse    seed: checkpoint 31, now 32" in text
    assert "refuse    batch.micro: checkpoint 4, now 8" in text
    assert "warn      epochs: checkpoint 3, now 9" in text
    assert steps_of(run) == [10, 20]


def test_tensors_are_held_against_the_model(run):
    save_steps(run, 10)
    wanted = {g: state_files.specs(named) for g, named in some_tensors().items()}
    assert checkpoint.load_newest(run, expect(tensors=wanted)).progress.step == 10
    wanted["model"]["w"] = state_files.Spec((4, 4), torch.float32)
    wanted["model"]["new"] = state_files.Spec((1,), torch.float16)
    wanted["ema"] = None
    del wanted["model"]["b"]
    with pytest.raises(Halt) as caught:
        checkpoint.load_newest(run, expect(tensors=wanted))
    for part in (
        "ema: not in the checkpoint",
        "missing in the checkpoint (1): new",
        "not in this model (1): b",
        "w float32 [4, 3], model float32 [4, 4]",
    ):
        assert part in caught.value.message


def mutations(folder: Path, count: int):
    """(name, what to do): bit flips spread over every file, truncations, missing, extra and swapped files."""
    names = sorted(p.name for p in folder.iterdir())
    sizes = {n: (folder / n).stat().st_size for n in names}
    for i in range(count):
        name = names[i % len(names)]
        bit = (i * 2654435761) % (sizes[name] * 8)
        yield f"{name} bit {bit}", name, lambda data, bit=bit: flipped(data, bit)
    for name in names:
        for k in range(64):
            cut = sizes[name] * k // 64
            yield f"{name} cut at {cut}", name, lambda data, cut=cut: data[:cut]
        yield f"{name} longer", name, lambda data: data + b"\0"
        yield f"{name} missing", name, lambda data: None


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_every_mutation_is_found_named_and_fallen_back_from(run):
    save_steps(run, 10, 20)
    newest = run.checkpoints / "step-00000020"
    tried = 0
    for title, name, change in mutations(newest, 520):
        original = (newest / name).read_bytes()
        data = change(original)
        if data is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(data)
        loaded = checkpoint.load_newest(run, expect())
        assert loaded.progress.step == 10, title
        assert len(loaded.problems) == 1
        assert loaded.problems[0].startswith(f"step-00000020: {name}"), (title, loaded.problems)
        (newest / name).write_bytes(original)
        tried += 1
    assert checkpoint.load_newest(run, expect()).progress.step == 20
    assert tried >= 500


@pytest.mark.parametrize("kind", ["extra", "directory", "symlink", "twin", "swapped", "renamed"])
def test_other_shapes_of_damage(run, kind):
    save_steps(run, 10, 20)
    old, new = run.checkpoints / "step-00000010", run.checkpoints / "step-00000020"
    if kind == "extra":
        (new / "zz.bin").write_bytes(b"")
    elif kind == "directory":
        (new / "state.json").unlink()
        (new / "state.json").mkdir()
    elif kind == "symlink":  # same bytes, but outside the directory: nothing vouches for it tomorrow
        (new / "model.safetensors").rename(run.path / "elsewhere")
        (new / "model.safetensors").symlink_to(run.path / "elsewhere")
    elif kind == "twin":
        shutil.rmtree(new)
        shutil.copytree(old, new)
    elif kind == "swapped":
        shutil.copy(old / "model.safetensors", new / "model.safetensors")
    else:
        old.rename(run.checkpoints / "step-00000030")
    loaded = checkpoint.load_newest(run, expect())
    assert loaded.progress.step == (20 if kind == "renamed" else 10)
    assert len(loaded.problems) == 1


def test_verify_size_still_finds_lengths_and_json(run):
    save_steps(run, 10, 20)
    model = run.checkpoints / "step-00000020" / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(flipped(data, len(data) * 8 - 1))
    assert checkpoint.load_newest(run, expect(), verify="size").progress.step == 20  # what `size` gives up
    model.write_bytes(data[:-1])
    assert checkpoint.load_newest(run, expect(), verify="size").progress.step == 10


# --- faults while saving -----------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["save.begin", "save.write", "save.fsync", "save.manifest", "save.rename"])
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_failed_write_leaves_nothing_behind(run, monkeypatch, point, action):
    save_steps(run, 10)
    monkeypatch.setenv("ANIX_FAULT", f"{point}@20:{action}")
    with pytest.raises(SaveFailed, match="step-00000020 not written"):
        save_steps(run, 20)
    assert os.listdir(run.checkpoints) == ["step-00000010"]
    monkeypatch.delenv("ANIX_FAULT")
    save_steps(run, 20)
    assert steps_of(run) == [10, 20]


def test_disk_too_full_is_known_before_writing(run, monkeypatch):
    save_steps(run, 10)
    for room in (checkpoint, space):
        monkeypatch.setattr(room, "free_bytes", lambda path: 100)
    with pytest.raises(SaveFailed, match=r"needs 0\.\d kB|needs \d.* kB, the disk has 0.1 kB"):
        save_steps(run, 20)
    with pytest.raises(Halt) as caught:
        save_steps(run, 20, settings=CheckpointConfig(on_full_disk="stop"))
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert "the disk has 0.1 kB" in str(space.lacking_space(run, checkpoint.checkpoint_bytes(some_tensors()), KEEP2))
    assert steps_of(run) == [10]


def test_what_a_killed_save_left_counts_as_room_because_it_goes_when_the_run_begins(run, monkeypatch):
    one = checkpoint.checkpoint_bytes(some_tensors())
    monkeypatch.setattr(space, "free_bytes", lambda path: one)
    assert space.lacking_space(run, one, KEEP2) is not None
    for name in ("step-00000010.tmp", "step-00000004.del"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "model.safetensors").write_bytes(b"x" * 2 * one)
    assert space.lacking_space(run, one, KEEP2) is None


def test_room_for_what_is_kept_for_ever_is_told_beforehand_and_refuses_nothing(run, monkeypatch):
    one = 1_000_000_000
    room = 6
    monkeypatch.setattr(space, "free_bytes", lambda path: room * one)

    def told(updates, permanent=None, per_epoch=10):
        settings = CheckpointConfig(keep=2, every_steps=4, permanent_every_steps=permanent)
        assert space.lacking_space(run, one, settings) is None
        return space.permanent_warning(run, one, settings, updates=updates, updates_per_epoch=per_epoch)

    assert told(20) is None  # 2 for ever, 2 kept, 1 being written
    warning = told(100)
    assert "10 more checkpoints will be kept for ever (checkpoint.permanent_every_steps: 10)" in warning
    assert "13.65 GB" in warning
    assert "has 6.00 GB" in warning
    assert told(100, permanent=50) is None
    assert "25 more" in told(100, permanent=1)  # as many as are saved
    save_steps(run, 10, permanent=(10,))
    assert "9 more" in told(100)


def test_waiting_for_space_goes_on_when_there_is_some(run, monkeypatch):
    answers = iter([0, 0, 1 << 40])
    monkeypatch.setattr(checkpoint, "_DISK_POLL_S", 0.0)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: next(answers))
    save_steps(run, 20, settings=CheckpointConfig(on_full_disk="wait"))
    assert steps_of(run) == [20]
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 0)
    with pytest.raises(SaveFailed):
        checkpoint.save(
            run, Progress(30), some_tensors(), {}, CheckpointConfig(on_full_disk="wait"), give_up=lambda: True
        )


def test_a_file_size_limit_is_a_failed_save_not_a_death(tmp_path):
    """A real kernel limit in a real process: EFBIG on the second checkpoint."""
    code = """
import resource, sys
from pathlib import Path
from checkpoints import save_steps
from train.storage import rundir
from train.storage.checkpoint import SaveFailed
run = rundir.open_run_dir(Path(sys.argv[1]), "pretrain")
save_steps(run, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))
try:
    save_steps(run, 20)
except SaveFailed as failure:
    print("failed:", failure.strerror)
"""
    done = run_python(code, str(tmp_path / "run"))
    assert "File too large" in done.stdout, done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000010"]


def run_python(code: str, *arguments: str):
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests/support'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, cwd=root, timeout=120
    )


# --- the manifest itself -----------------------------------------------------------------------------


def test_manifest_accepts_only_its_own_bytes():
    made = manifest.Manifest("0123456789abcdef", 7, False, {"a": manifest.FileRecord(1, "ff", 1)})
    data = manifest.encode(made)
    assert manifest.decode(data) == made
    spaced = json.dumps(json.loads(data)).encode()
    for wrong in (spaced, data + b"\n", b"{}", b"[]", b"", b"null", b"\xff", data.replace(b": 7", b": 8")):
        with pytest.raises(manifest.Damaged):
            manifest.decode(wrong)


@pytest.mark.parametrize(
    "name", ["step-1", "step-00000001.tmp", "step-00000001.del", "xstep-00000001", "step-0000000a"]
)
def test_only_final_names_are_checkpoints(name):
    assert manifest.step_of(name) is None
