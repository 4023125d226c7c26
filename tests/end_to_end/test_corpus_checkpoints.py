"""R10: at least 20 damaged checkpoints and bad configs, each reported with its path and reason; checkpoints in one pass."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import expect, save_steps, signed

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.storage import checkpoint, manifest, rundir, space


def state_with(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text()) | changes
        signed(folder, "state.json", json.dumps(state).encode())

    return spoil


def manifest_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A manifest changed and signed again as we sign."""

    def spoil(folder: Path) -> None:
        body = json.loads((folder / manifest.NAME).read_text())
        del body["sha256"]
        change(body)
        body["sha256"] = hashlib.sha256(manifest._canonical(body)).hexdigest()
        (folder / manifest.NAME).write_bytes(manifest._canonical(body))

    return spoil


def flip(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 16
        (folder / name).write_bytes(data)

    return spoil


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def becomes_link(folder: Path) -> None:
    target = folder.parent.parent / "elsewhere"
    folder.rename(target)
    folder.symlink_to(target)


def becomes_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def twice(folder: Path) -> None:
    text = (folder / manifest.NAME).read_text()
    line = next(part for part in text.split('  "model.safetensors": ')[1:])
    entry = line[: line.index("}") + 1]
    (folder / manifest.NAME).write_text(text.replace('"files": {', f'"files": {{\n  "model.safetensors": {entry},', 1))


def pickled(folder: Path) -> None:
    torch.save({"w": torch.zeros(2)}, folder / "x.pt")
    data = (folder / "x.pt").read_bytes()
    (folder / "x.pt").unlink()
    signed(folder, "model.safetensors", data)


HEADER = (10**15).to_bytes(8, "little")
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in the model": (flip("model.safetensors"), "model.safetensors: sha256"),
    "bit in the optimizer": (flip("optimizer.safetensors"), "optimizer.safetensors: sha256"),
    "bit in the state": (flip("state.json"), "state.json: sha256"),
    "bit in the manifest": (flip("manifest.json"), "manifest.json"),
    "model cut": (cut("model.safetensors"), "model.safetensors: "),
    "state cut": (cut("state.json"), "state.json: "),
    "manifest cut": (cut("manifest.json"), "manifest.json: not readable"),
    "manifest empty": (lambda f: (f / "manifest.json").write_text(""), "manifest.json: not readable"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
    "model missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "extra file": (lambda f: (f / "note.txt").write_text("x"), "note.txt: not in the manifest"),
    "symlink": (becomes_link, "not a directory"),
    "file": (becomes_file, "not a directory"),
    "manifest lists a path that climbs": (
        manifest_with(lambda body: body["files"].update({"../x": body["files"]["state.json"]})), "no file of a checkpoint",
    ),
    "manifest lists a file twice": (twice, "its own sha256 does not match"),
    "manifest lists itself": (
        manifest_with(lambda body: body["files"].update({"manifest.json": body["files"]["state.json"]})), "no file of a",
    ),
    "sizes that are text": (
        manifest_with(lambda body: body["files"]["model.safetensors"].update(bytes="many")), "another type",
    ),
    "checksum that is a number": (
        manifest_with(lambda body: body["files"]["model.safetensors"].update(sha256=5)), "another type",
    ),
    "step of another": (manifest_with(lambda body: body.update(step=5)), "is that of step 5"),
    "state says NaN": (state_with(step=float("nan")), "NaN"),
    "state of another step": (state_with(step=3), "is that of step 3"),
    "state counts in text": (state_with(updates="10"), "are no counts"),
    "state counts in fractions": (state_with(images=1.5), "are no counts"),
    "state counts below nothing": (state_with(skipped=-1), "are no counts"),
    "state says true": (state_with(skipped=True), "are no counts"),
    "state applied more than it did": (state_with(updates=10**30), "do not add up"),
    "settings are a text": (state_with(config="null"), "config is null"),
    "facts are a list": (state_with(facts=[[]]), "facts is [[]]"),
    "notes are a number": (state_with(notes=2**31), "notes is 2147483648"),
    "held is nothing": (state_with(held=None), "held is None"),
    "history is a number": (state_with(history=3), "history is 3"),
    "state of another schema": (state_with(schema_version=99), "schema version 99"),
    "state is huge": (lambda f: signed(f, "state.json", b'{"a": [' + b"[],"  * (3 << 20) + b"[]]}"), "larger than"),
    "state is deep": (lambda f: signed(f, "state.json", b"[" * 100_000), "RecursionError"),
    "state is a list": (lambda f: signed(f, "state.json", b"[]"), "cannot be read"),
    "header of absurd length": (lambda f: signed(f, "model.safetensors", HEADER + b"{}" * 9), "no header length"),
    "header is no JSON": (lambda f: signed(f, "model.safetensors", (8).to_bytes(8, "little") + b"nonsense"), "cannot be read"),
    "pickle": (pickled, "no header length"),
    "counts other tensors": (
        lambda f: signed(f, "model.safetensors", (f / "model.safetensors").read_bytes(), tensors=7), "other tensors",
    ),
}  # fmt: skip


def test_every_damaged_checkpoint_is_named_in_one_pass_and_none_is_used(tmp_path: Path) -> None:
    run = rundir.open_run_dir(tmp_path / "run", "pretrain")
    save_steps(run, 1)
    sound = run.checkpoints / "step-00000001"
    wanted = {}
    for number, (what, (spoil, reason)) in enumerate(CHECKPOINTS.items(), 10):
        folder = run.checkpoints / f"step-{number:08d}"
        shutil.copytree(sound, folder)
        state = json.loads((folder / "state.json").read_text()) | {"step": number, "updates": number}
        manifest_with(lambda body, number=number: body.update(step=number))(folder)
        signed(folder, "state.json", json.dumps(state).encode())
        checkpoint.open_checkpoint(folder)  # sound so far
        if what == "symlink":
            (tmp_path / "run" / "elsewhere").unlink(missing_ok=True)
        spoil(folder)
        wanted[folder.name] = (what, reason)
    loaded = checkpoint.load_newest(run, expect())
    assert loaded is not None
    assert loaded.path == sound
    told = dict(problem.split(": ", 1) for problem in loaded.problems)
    assert told.keys() == wanted.keys()
    for name, (what, reason) in wanted.items():
        assert reason in told[name], (what, told[name])
        assert len(told[name]) < 300
    space.lacking_space(run, 1, checkpoint.CheckpointConfig())  # looks at them too
    assert checkpoint.retain(run, 2, 99) == []  # what is damaged does not push out what is sound
    shutil.rmtree(sound)
    with pytest.raises(Halt) as caught:
        checkpoint.load_newest(run, expect())
    assert caught.value.code == ExitCode.NO_CHECKPOINT
    assert all(name in caught.value.message for name in wanted)
    run.close()


ENOUGH = "stage: s\nseed: 1\noutput_dir: r\nepochs: 1\n"
CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "missing value"),
    "list": (b"- 1\n- 2\n", "must hold keys and values"),
    "scalar": (b"7\n", "cannot be read"),
    "not utf-8": (b"stage: \xff\xfe\n", "cannot be read"),
    "nul": (b"stage: a\0b\n", "cannot be read"),
    "tabs": (b"stage:\n\t- x\n", "cannot be read"),
    "unclosed": (b"stage: [\n", "cannot be read"),
    "key twice": (ENOUGH.encode() + b"seed: 2\n", "cannot be read"),
    "python tag": (b"stage: !!python/object/apply:os.getcwd []\n", "cannot be read"),
    "unknown tag": (b"stage: !thing x\n", "cannot be read"),
    "unknown anchor": (b"stage: *x\n", "cannot be read"),
    "too large": (b"# " + b"x" * (1 << 20), "larger than"),
    "deep": (b"a: " + b"[" * 5000, "cannot be read"),
    "two documents": (b"stage: a\n---\nstage: b\n", "cannot be read"),
    "number as key": (b"7: 8\n", "unknown key"),
    "section is text": (ENOUGH.encode() + b"ema: many\n", "ema must hold keys and values"),
    "reference to itself": (ENOUGH.encode() + b"tracking: {name: '${tracking.name}'}\n", "tracking.name"),
    "reference to nothing": (ENOUGH.encode() + b"tracking: {name: '${nowhere}'}\n", "nowhere"),
    "infinite rate": (ENOUGH.encode() + b"optimizer: {name: adamw, unet_lr: .inf}\n", "optimizer.unet_lr"),
    "rate is no number": (ENOUGH.encode() + b"optimizer: {name: adamw, unet_lr: .nan}\n", "optimizer.unet_lr"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_bad_config_is_refused_by_key_or_file(kind: str, tmp_path: Path) -> None:
    data, words = CONFIGS[kind]
    path = tmp_path / f"{kind.replace(' ', '-')}.yaml"
    path.write_bytes(data)
    needed = ["model.init_from=x", "data.path=x", "batch.micro=1", "batch.effective=1", "schedule.name=constant"]
    if "unet_lr" not in data.decode("latin-1"):
        needed += ["optimizer.name=adamw", "optimizer.unet_lr=1e-5"]
    with pytest.raises(Halt) as caught:
        load_stage([path], needed)
    assert caught.value.code == ExitCode.USAGE
    assert words in caught.value.message
    assert words != "cannot be read" or str(path) in caught.value.message
    assert len(caught.value.message) < 2000


def test_there_are_enough() -> None:
    assert len(CHECKPOINTS) + len(CONFIGS) >= 20
