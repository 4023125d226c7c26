"""R11: at least 25 hostile inputs: nothing in them is executed, nothing outside is read, none takes 256 MB, each is named.

Every case runs in a child of its own, so that its memory can be measured. The canary is a file that the payload would
make; the secret is a file outside the data root that must not be read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import expect, save_steps, signed
from ingests import GOOD, config, write_picture
from ingests import run as ingest
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.base.files import free_bytes
from train.config import prompts
from train.config.dataset import dataset_dir, load_settings
from train.config.stage import ModelConfig, load_stage
from train.data import shards
from train.model import networks, source
from train.prepare import probe
from train.prepare.tables.units import read_table
from train.storage import checkpoint, rundir

PEAK_MB = 256
SECRET = "the-secret-outside-the-root"
Case = Callable[["Place"], str]  # makes the input, opens it as the program does; what was said about it


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Place:
    """One case's folder: `root` may be read, `canary` must not appear, `secret` must not be read."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.root, self.canary, self.secret, self.model = folder / "root", folder / "canary", folder / "secret", model
        self.root.mkdir()
        self.secret.write_text(SECRET)

    def payload(self) -> bytes:
        """A pickle that makes the canary when it is read."""

        return pickle.dumps({"state_dict": Evil(f"touch {self.canary}")})

    def torch_file(self, path: Path) -> Path:
        """The same in torch's zip format."""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", self.payload())
            archive.writestr("archive/version", "3\n")
        return path

    def copy(self) -> Path:
        return Path(shutil.copytree(self.model, self.root / "model"))


def refused(act: Callable[[], object], *codes: ExitCode) -> str:
    with pytest.raises(Halt) as caught:
        act()
    assert caught.value.code in (codes or (ExitCode.MISMATCH, ExitCode.USAGE))
    return caught.value.message


def model_refused(path: Path) -> str:
    return refused(lambda: networks.build(source.resolve(ModelConfig(init_from=str(path)))))


# --- weights -------------------------------------------------------------------------------------------


def suffix(ending: str, whole: bool) -> Case:
    def case(place: Place) -> str:
        path = place.root / f"model{ending}"
        place.torch_file(path) if whole else path.write_bytes(place.payload())
        return model_refused(path)

    return case


def pickle_in_folder(place: Place) -> str:
    model = place.copy()
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    place.torch_file(file.with_suffix(".bin"))
    return model_refused(model)


def pickle_as_safetensors(place: Place) -> str:
    model = place.copy()
    place.torch_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    return model_refused(model)


def header(place: Place, text: bytes, data: bytes = b"", length: int | None = None) -> str:
    path = place.root / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return model_refused(path)


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def big_header(place: Place) -> str:
    """90 MB of JSON that would be gigabytes of objects; the file is sparse where it can be."""
    path = place.root / "x.safetensors"
    with open(path, "wb") as file:
        file.write((90_000_000).to_bytes(8, "little") + b'{"a":[')
        for _ in range(90):
            file.write(b"[]," * 333_333)
    return model_refused(path)


def config_with(network: str, **values: Any) -> Case:
    def case(place: Place) -> str:
        path = place.copy() / network / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return model_refused(place.root / "model")

    return case


def config_is(text: str) -> Case:
    def case(place: Place) -> str:
        (place.copy() / "unet" / "config.json").write_text(text)
        return model_refused(place.root / "model")

    return case


def remote_code(place: Place) -> str:
    """Files that name code of their own: read as the closed classes they must be, or refused; never imported."""
    model = place.copy()
    code = f"import os\nos.system('touch {place.canary}')\nclass A: pass\n"
    for folder in (model, model / "unet", model / "tokenizer", model / "text_encoder"):
        (folder / "evil.py").write_text(code)
    (model / "model_index.json").write_text(
        json.dumps(json.loads((model / "model_index.json").read_text()) | {"_class_name": ["evil", "A"]})
    )
    for name in ("tokenizer/tokenizer_config.json", "text_encoder/config.json", "unet/config.json"):
        path = model / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | {"auto_map": {"AutoModel": "evil.A", "AutoTokenizer": ["evil.A", "evil.A"]}}))
    try:
        networks.build(source.resolve(ModelConfig(init_from=str(model))))
    except Halt as halt:
        return halt.message
    return "loaded without its code: evil"


def checkpoint_with(spoil: Callable[[Path, Place], None]) -> Case:
    def case(place: Place) -> str:
        run = rundir.open_run_dir(place.root / "run", "pretrain")
        save_steps(run, 10)
        spoil(run.checkpoints / "step-00000010", place)
        return refused(lambda: checkpoint.load_newest(run, expect()), ExitCode.NO_CHECKPOINT)

    return case


def signed_pickle(folder: Path, place: Place) -> None:
    signed(folder, "optimizer.safetensors", place.payload())


def link_out(folder: Path, place: Place) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to(place.secret)


def shard_outside(place: Place) -> str:
    return refused(lambda: shards.ShardReader(place.root).read(["../secret"], [0]))


def pickled_shard(place: Place) -> str:
    (place.root / "x.safetensors").write_bytes(place.payload())
    return refused(lambda: shards.ShardReader(place.root).read(["x.safetensors"], [0]))


def object_array(place: Place) -> str:
    np.save(place.root / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (place.root / "x.npy").rename(place.root / "x.safetensors")
    return refused(lambda: shards.ShardReader(place.root).read(["x.safetensors"], [0]))


# --- settings ------------------------------------------------------------------------------------------


def yaml(text: str, load: Callable[[Path], object]) -> Case:
    def case(place: Place) -> str:
        path = place.root / "hostile.yaml"
        path.write_text(text.replace("CANARY", str(place.canary)).replace("SECRETFILE", str(place.secret)))
        os.environ["HOSTILE_TOKEN"] = SECRET
        return refused(lambda: load(path), ExitCode.USAGE)

    return case


def stage(path: Path) -> object:
    return load_stage([path], [])


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


# --- data ----------------------------------------------------------------------------------------------


def told(place: Place, adapter: str, **options: Any) -> str:
    records, quarantine = ingest(config(place.root, place.root / "in", adapter, **options))
    assert set(records) <= {"s:ok.png", "s:a.tar/ok.png", "s:1"}, set(records)
    return "\n".join(f"{row['key']} {row['reason']} {row['message']}" for row in quarantine)


def sidecars(make: Callable[[Path, Place], None]) -> Case:
    def case(place: Place) -> str:
        folder = place.root / "in"
        write_picture(folder / "ok.png")
        (folder / "ok.txt").write_text("fine")
        write_picture(folder / "bad.png")
        make(folder, place)
        return told(place, "sidecar", assume_rating="g")

    return case


def huge_caption(folder: Path, place: Place) -> None:
    with open(folder / "bad.txt", "wb") as file:
        file.truncate(1 << 30)


def linked_caption(folder: Path, place: Place) -> None:
    (folder / "bad.txt").symlink_to(place.secret)


def linked_picture(folder: Path, place: Place) -> None:
    (folder / "bad.png").unlink()
    (folder / "bad.png").symlink_to(place.secret)


def linked_folder(folder: Path, place: Place) -> None:
    (folder / "bad").symlink_to(place.secret.parent)


def device(folder: Path, place: Place) -> None:
    (folder / "bad.txt").symlink_to("/dev/zero")


def named_with_newline(folder: Path, place: Place) -> None:
    (folder / "bad.png").rename(folder / "bad\nname.png")


def named_not_utf8(folder: Path, place: Place) -> None:
    os.rename(folder / "bad.png", os.path.join(os.fsencode(folder), b"bad\xff.png"))


def post_with(**values: Any) -> Case:
    def case(place: Place) -> str:
        (place.root / "in").mkdir()
        posts = [GOOD, GOOD | {"id": 2} | values]
        (place.root / "in" / "bad.jsonl").write_text("\n".join(map(json.dumps, posts)))
        return told(place, "danbooru")

    return case


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Case:
    def case(place: Place) -> str:
        (place.root / "in").mkdir()
        with tarfile.open(place.root / "in" / "a.tar", "w") as archive:
            for path in ("ok.png", "ok.txt"):
                info = tarfile.TarInfo(path)
                info.size = 4
                archive.addfile(info, io.BytesIO(b"fine"))
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link.replace("SECRETFILE", str(place.secret))
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"evil"))
        return told(place, "webdataset", assume_rating="g")

    return case


def picture(data: Callable[[], bytes]) -> Case:
    def case(place: Place) -> str:
        folder = place.root / "in"
        folder.mkdir()
        (folder / "bad.png").write_bytes(data())
        (folder / "bad.txt").write_text("fine")
        settings = config(place.root, folder, "sidecar", assume_rating="g")
        ingest(settings)
        probe.run(settings)
        rows = read_table(dataset_dir(settings), "probe").to_pylist()
        assert [row["status"] for row in rows] == ["quarantined"], rows
        quarantine = (dataset_dir(settings) / "quarantine.parquet").is_file()
        return f"{rows[0]['key']} {rows[0]['reason']} {quarantine}"

    return case


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def profile_chunk() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", icc_profile=bytes(300 << 20))
    return buffer.getvalue()


CASES: dict[str, tuple[Case, str]] = {  # input: (case, what must be named)
    **{f"pickle {ending}": (suffix(ending, False), f"model{ending}") for ending in (".ckpt", ".pt", ".bin", ".pkl")},
    "torch zip": (suffix(".pth", True), "model.pth"),
    "bare pickle named safetensors": (suffix(".safetensors", False), "model.safetensors"),
    "torch zip named safetensors": (suffix(".safetensors", True), "model.safetensors"),
    "pickle in a folder": (pickle_in_folder, "diffusion_pytorch_model.bin"),
    "torch zip for a network": (pickle_as_safetensors, "diffusion_pytorch_model.safetensors"),
    "header of 90 MB": (big_header, "x.safetensors"),
    "header of 2^63 bytes": (lambda p: header(p, b"{}", length=2**63), "x.safetensors"),
    "tensor of 10^15 bytes": (lambda p: header(p, entry([10**15 // 4], [0, 10**15])), "x.safetensors"),
    "negative offset": (lambda p: header(p, entry([1], [-4, 0]), b"1234"), "x.safetensors"),
    "fractional offset": (lambda p: header(p, entry([1], [0.0, 4.0]), b"1234"), "x.safetensors"),
    "deep header": (lambda p: header(p, b'{"a":' + b"[" * 100_000), "x.safetensors"),
    "terminal codes in names": (
        lambda p: header(p, json.dumps({"\x1b]0;x\x07\x1b[2J{0}%s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode(), b"1234"),
        "x.safetensors",
    ),
    "config that names a billion layers": (config_with("unet", layers_per_block=10**9), "model"),
    "config that names a billion channels": (config_with("unet", block_out_channels=[10**9] * 3), "model"),
    "config of other types": (config_with("unet", block_out_channels="x", down_block_types=7), "model"),
    "config without anything": (config_is("{}"), "model"),
    "config that is a list": (config_is("[]"), "config.json"),
    "encoder of a billion layers": (config_with("text_encoder", num_hidden_layers=10**9), "model"),
    "code of its own": (remote_code, "evil"),
    "signed pickle as optimizer state": (checkpoint_with(signed_pickle), "optimizer.safetensors"),
    "checkpoint file that is a link out": (checkpoint_with(link_out), "state.json: not a regular file"),
    "shard outside the dataset": (shard_outside, "../secret"),
    "shard that is a pickle": (pickled_shard, "x.safetensors"),
    "shard that is an object array": (object_array, "x.safetensors"),
    "yaml that runs a program": (yaml("a: !!python/object/apply:os.system ['touch CANARY']", stage), "hostile.yaml"),
    "yaml that makes an object": (yaml("a: !!python/object/new:os.system ['touch CANARY']", stage), "hostile.yaml"),
    "yaml that imports": (yaml("a: !!python/module:antigravity", stage), "hostile.yaml"),
    "alias bomb": (yaml(BOMB, stage), "hostile.yaml"),
    "secret by reference": (yaml("tracking: {name: '${oc.env:HOSTILE_TOKEN}'}", stage), "HOSTILE_TOKEN"),
    "secret by nested reference": (yaml("tracking: {name: '${oc.env:${tracking.project}}', project: HOSTILE_TOKEN}", stage), "oc.env"),
    "dotted path as scheduler": (yaml("schedule: {name: os.system}", stage), "schedule.name"),
    "data settings that run a program": (yaml("name: !!python/name:os.system", lambda p: load_settings([p])), "hostile.yaml"),
    "data settings that climb": (yaml("name: ../../up\nsources: []", lambda p: load_settings([p])), "name"),
    "prompts that run a program": (yaml("prompts: !!python/object/apply:os.system ['touch CANARY']", lambda p: prompts.load_prompts(p)), "hostile.yaml"),
    "caption of 1 GiB": (sidecars(huge_caption), "bad.txt"),
    "caption link out": (sidecars(linked_caption), "bad.png outside_root"),
    "picture link out": (sidecars(linked_picture), "bad.png outside_root"),
    "folder link out": (sidecars(linked_folder), "bad outside_root"),
    "caption is a device": (sidecars(device), "bad.png"),
    "line break in a name": (sidecars(named_with_newline), "bad\\nname.png"),
    "name that is not UTF-8": (sidecars(named_not_utf8), "bad\\udcff.png"),
    "post whose file climbs": (post_with(file_name="../../secret.png"), "bad.jsonl row 1"),
    "post with an absolute file": (post_with(file_name="/etc/passwd.png"), "bad.jsonl row 1"),
    "post with NUL in a file": (post_with(file_name="a\0.png"), "bad.jsonl row 1"),
    "post with NUL in a tag": (post_with(tags_meta=["a\0b"]), "bad.jsonl row 1"),
    "member that climbs": (member("../up.png"), "../up.png"),
    "member with an absolute name": (member("/abs.png"), "/abs.png"),
    "member that is a symlink": (member("link.png", tarfile.SYMTYPE, "SECRETFILE"), "link.png"),
    "member that is a hard link": (member("hard.png", tarfile.LNKTYPE, "SECRETFILE"), "hard.png"),
    "member that is a device": (member("dev.png", tarfile.CHRTYPE), "dev.png"),
    "member that is a pipe": (member("pipe.png", tarfile.FIFOTYPE), "pipe.png"),
    "picture of 900 million pixels": (picture(bomb), "bad.png too_many_pixels"),
    "profile chunk of 300 MB": (picture(profile_chunk), "bad.png"),
    "web page named png": (picture(lambda: b"<html><script>alert(1)</script></html>"), "bad.png"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_model(base_model: Path) -> Path:
    free_bytes(base_model)
    networks.build(source.resolve(ModelConfig(init_from=str(base_model))))  # the children find all imports done
    return base_model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CASES)
def test_nothing_happens_but_a_refusal(kind: str, small_model: Path, tmp_path: Path) -> None:
    case, name = CASES[kind]
    place = Place(tmp_path, small_model)
    outside = hashlib.sha256(place.secret.read_bytes()).hexdigest()
    answer = tmp_path / "answer.json"
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        result: dict[str, Any] = {}
        try:
            torch.set_num_threads(1)
            signal.alarm(60)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), used + (3 << 30)))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = {"said": case(place)}
            result["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        except BaseException:
            result = {"error": traceback.format_exc()}
        finally:
            answer.write_text(json.dumps(result))
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "it hung"
    found = json.loads(answer.read_text())
    assert "error" not in found, found["error"]
    assert name in found["said"], found["said"]
    assert not set("\x1b\x07\0") & set(found["said"])
    assert SECRET not in found["said"]
    assert not place.canary.exists()
    assert hashlib.sha256(place.secret.read_bytes()).hexdigest() == outside
    assert time.monotonic() - started < 60
    if "picture" not in kind and "chunk" not in kind:  # making those costs memory; test_decode.py measures reading them
        assert found["peak_mb"] < PEAK_MB
    written = b"".join(p.read_bytes() for p in (place.root / "out").rglob("*") if p.is_file())
    assert SECRET.encode() not in written


def test_there_are_enough() -> None:
    assert len(CASES) >= 25
