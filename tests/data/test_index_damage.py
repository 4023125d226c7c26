"""Damaged index files are refused by name: a wrong offset or number in them would crash a reader, or shift the plan."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from stages import SMALL, Stage

from train.base.errors import ExitCode, Halt
from train.config.stage import StageConfig, load_stage
from train.data.index import Index, file_hashes
from train.data.index_writer import write_arrow
from train.data.selection import open_selection


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The file with other columns under its old header."""
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    meta = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    write_arrow(path, change(table), meta)


def with_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


DAMAGE = {
    "row beyond the end": ("index_pretrain.arrow", with_column("row", pa.array(np.full(26, 26, np.int32)))),
    "row before the beginning": ("index_pretrain.arrow", with_column("row", pa.array(np.full(26, -1, np.int32)))),
    "row that is null": ("index_pretrain.arrow", with_column("row", pa.array([None] * 26, pa.int32()))),
    "row that is text": ("index_pretrain.arrow", with_column("row", pa.array(["1"] * 26))),
    "no uid": ("index_pretrain.arrow", lambda table: table.drop_columns(["uid"])),
    "no captions": ("index.arrow", lambda table: table.drop_columns(["flex_tags"])),
    "captions that are numbers": ("index.arrow", with_column("flex_tags", pa.array(np.zeros(26, np.int32)))),
    "fractional size": ("index.arrow", with_column("bucket_w", pa.array(np.full(26, 64.5)))),
    "a size that is null": ("index.arrow", with_column("bucket_w", pa.array([None] * 26, pa.int32()))),
    "no shard": ("index.arrow", with_column("shard", pa.array([None] * 26, pa.string()))),
    "a word that is none": ("index.arrow", with_column("shard", pa.DictionaryArray.from_arrays(
        pa.array(np.full(26, 9, np.int32)), pa.array(["latents/x"]), safe=False))),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_refused_by_name(kind: str, dataset: Path, tmp_path: Path) -> None:
    name, change = DAMAGE[kind]
    shutil.copytree(dataset, tmp_path / "set")
    rewritten(tmp_path / "set" / name, change)
    with pytest.raises(Halt, match=name) as caught:
        Index.open(tmp_path / "set", "pretrain").shards()
    assert caught.value.code == ExitCode.MISMATCH
    assert "prepare.py latents" in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("name", ["index.arrow", "index_pretrain.arrow", "dataset.json"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(name: str, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "set")
    (tmp_path / "set" / name).unlink()
    os.mkfifo(tmp_path / "set" / name)
    with pytest.raises(Halt, match=r"prepare\.py") as caught:
        Index.open(tmp_path / "set", "pretrain")
    assert caught.value.code == ExitCode.MISMATCH


def mutated(path: Path, dice: random.Random) -> None:
    """The file cut somewhere, or with one to twenty bits flipped."""
    data = bytearray(path.read_bytes())
    if dice.random() < 0.2:
        data = data[: dice.randrange(len(data))]
    else:
        for _ in range(dice.choice([1, 1, 3, 20])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("recorded", [True, False])
def test_any_damage_is_found_where_hashes_are_kept_and_crashes_nothing_elsewhere(
    recorded: bool, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    names = ["index.arrow", "index_pretrain.arrow"]
    if recorded:
        state = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**state, "index": file_hashes(folder, names)}))
    stage = Stage(tmp_path, folder, base_model)
    config = load_stage([stage.yaml], SMALL)
    kept = {name: (folder / name).read_bytes() for name in names}
    read_all(config)
    dice = random.Random(11)
    for number in range(120):
        name = names[number % 2]
        mutated(folder / name, dice)
        pid = os.fork()  # what goes wrong in a library ends the process
        if pid == 0:
            code = 1  # any other exception
            try:
                read_all(config)
                code = 0
            except Halt as halt:
                code = (2 if name in halt.message else 3) if halt.code == ExitCode.MISMATCH else 4
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 2 if recorded else code in (0, 2, 3), (number, name, code)
        (folder / name).write_bytes(kept[name])


def read_all(config: StageConfig) -> None:
    """Everything of every image."""
    index = open_selection(config.images).index
    for i in range(len(index)):
        assert index.key(i) and index.latent(i) and index.labels(i)
        index.caption(i)
