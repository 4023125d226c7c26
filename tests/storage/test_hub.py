"""Names of the hub to files at one commit, against a stand-in on loopback that the real client asks, faults included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import standin
from standin import Fault, Hub, files_of, sha256

from train.base.errors import ExitCode, Halt
from train.config.stage import ModelConfig
from train.model import source
from train.prepare.encoding.encoder import find_vae
from train.storage import hub as room
from train.storage import revision
from train.storage.revision import Name

BIG = bytes(range(256)) * 256  # 64 KiB: lies in the storage
SINGLE = {"README.md": b"# x", "model-fp32.safetensors": BIG}
MODELS = Path("models")


def parts(folder: Path = MODELS) -> list[Path]:
    return sorted(folder.rglob(".*.part"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", Name("owner/name")),
        ("owner/na.me@refs-1", Name("owner/na.me", "refs-1")),
        ("owner/name@" + "a" * 40, Name("owner/name", "a" * 40)),
        ("owner/name@v1:a/b.safetensors", Name("owner/name", "v1", "a/b.safetensors")),
        ("owner/name:b.safetensors", Name("owner/name", None, "b.safetensors")),
        ("https://huggingface.co/owner/name/resolve/main/b.safetensors?download=true", Name("owner/name", "main", "b.safetensors")),
        ("https://huggingface.co/owner/name/blob/v1/b.safetensors", Name("owner/name", "v1", "b.safetensors")),
        ("https://huggingface.co/owner/name", Name("owner/name")),
        ("https://huggingface.co/owner/name/tree/v1", Name("owner/name", "v1")),
        ("https://elsewhere.example/owner/name", None),
        ("owner/name@v1:../b.safetensors", None),
        ("../name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("name", None),
    ],
)
def test_what_a_name_is(text: str, name: Name | None) -> None:
    assert revision.parse(text) == name


def test_a_branch_becomes_a_commit_that_is_written_and_kept(hub: Hub) -> None:
    first = hub.add("owner/name", SINGLE, license="other", license_name="faipl-1.0-sd")
    got = room.fetch(Name("owner/name"))
    assert (got.place, got.commit, got.license) == (MODELS / "model-fp32.safetensors", first, "faipl-1.0-sd")
    assert got.place.read_bytes() == BIG and got.sha256 == {"model-fp32.safetensors": sha256(BIG)}
    record = json.loads((MODELS / "revision.json").read_text())["sources"][0]
    assert (record["from"], record["revision"], record["commit"]) == ("owner/name", "main", first)
    assert record["files"]["model-fp32.safetensors"]["sha256"] == sha256(BIG)
    assert parts() == []

    second = hub.add("owner/name", {**SINGLE, "model-fp32.safetensors": BIG[::-1]})
    hub.asked.clear()
    again = room.fetch(Name("owner/name"))
    assert again.commit == first and again.place.read_bytes() == BIG
    assert f"owner/name@{second}" in again.notes[0], "main moved: that is said"
    assert not [path for path in hub.paths("GET") if "resolve" in path], "nothing is sent again"
    with pytest.raises(Halt, match=f"holds owner/name@{first}.*--out"):
        room.fetch(Name("owner/name", second))
    elsewhere = room.fetch(Name("owner/name", second), Path("other"))
    assert elsewhere.place.read_bytes() == BIG[::-1]


def test_a_changed_file_is_named_on_the_second_fetch(hub: Hub) -> None:
    hub.add("owner/name", SINGLE)
    file = room.fetch(Name("owner/name")).place
    file.write_bytes(BIG[:-1] + b"x")
    with pytest.raises(Halt, match=r"model-fp32\.safetensors has sha256 .*revision\.json says") as caught:
        room.fetch(Name("owner/name"))
    assert caught.value.code == ExitCode.MISMATCH


def test_a_folder_comes_without_what_nobody_reads(hub: Hub, base_model: Path) -> None:
    extra = {"unet/diffusion_pytorch_model.bin": b"pickle", "unet/diffusion_pytorch_model.fp16.safetensors": b"half", "handler.py": b"code",
             "whole.safetensors": BIG, "README.md": b"---\nlicense: mit\n---\n"}  # fmt: skip
    commit = hub.add("owner/name", {**files_of(base_model), **extra}, license="mit")
    place, found = room.resolve(f"owner/name@{commit}")
    assert (place, found) == (MODELS / "name", commit)
    came = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert came == {*files_of(base_model), "README.md", "revision.json"} - {"lineage.json"}
    hub.asked.clear()
    model = source.resolve(ModelConfig(init_from=f"owner/name@{commit}"))
    assert hub.asked == [], "what lies here is found without a network"
    assert (model.path, model.license) == (place, "mit")


def test_files_that_another_hand_put_there(hub: Hub, base_model: Path) -> None:
    """A folder that was copied by hand is taken where it is the hub's; where it is not, nothing is written into it."""
    files = files_of(base_model)
    commit = hub.add("owner/name", files)
    shutil.copytree(base_model, MODELS / "name")
    hub.asked.clear()
    got = room.fetch(Name("owner/name", commit))
    assert not [path for path in hub.paths("GET") if "resolve" in path] and got.sha256["unet/config.json"] == sha256(files["unet/config.json"])
    assert all(said["sha256"] for said in revision.records(MODELS / "name")[0]["files"].values())

    shutil.copytree(base_model, Path("other/name"))
    Path("other/name/unet/config.json").write_text("{}")
    with pytest.raises(Halt, match=r"unet/config\.json is there already and is not the hub's"):
        room.fetch(Name("owner/name", commit), Path("other"))
    assert not Path("other/name/revision.json").exists()


def test_a_cut_download_goes_on_in_the_same_start_and_in_the_next(hub: Hub) -> None:
    hub.add("owner/name", SINGLE)
    digest = sha256(BIG)
    hub.faults = [Fault(digest, cut_after=10_000), Fault(digest, cut_after=7_000)]
    room.fetch(Name("owner/name"), Path("one"))
    ranges = [headers.get("range") for how, path, headers in hub.asked if digest in path]
    assert ranges == [None, "bytes=10000-", "bytes=17000-"]

    hub.asked.clear()
    hub.faults = [Fault(digest, cut_after=30_000), Fault(digest, status=500, times=5)]
    with pytest.raises(Halt, match=r"answers 500.*the same command goes on") as caught:
        room.fetch(Name("owner/name"), Path("two"))
    assert caught.value.code == ExitCode.MISMATCH and parts(Path("two"))[0].stat().st_size == 30_000
    assert not (Path("two") / "model-fp32.safetensors").exists(), "a part is no file"
    hub.asked.clear()
    assert room.fetch(Name("owner/name"), Path("two")).sha256 == {"model-fp32.safetensors": digest}
    assert [headers.get("range") for how, path, headers in hub.asked if digest in path] == ["bytes=30000-"]
    assert parts(Path("two")) == []


def test_a_server_that_is_busy_is_asked_again(hub: Hub) -> None:
    hub.add("owner/name", SINGLE)
    hub.faults = [Fault("resolve", status=503, times=4)]
    assert room.fetch(Name("owner/name")).place.read_bytes() == BIG


def test_a_branch_that_moves_between_two_starts_is_not_mixed(hub: Hub) -> None:
    first = hub.add("owner/name", SINGLE)
    hub.faults = [Fault(sha256(BIG), cut_after=20_000), Fault(sha256(BIG), status=502, times=5)]
    with pytest.raises(Halt, match="502"):
        room.fetch(Name("owner/name"))
    hub.add("owner/name", {**SINGLE, "model-fp32.safetensors": BIG[::-1]})
    got = room.fetch(Name("owner/name"))
    assert got.commit == first and got.place.read_bytes() == BIG, "goes on with the commit that it began with"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(sha256(BIG), other=BIG[:-1] + b"?"), "bytes with sha256 .* was listed"),
        (Fault(sha256(BIG), other=BIG[:-9]), "another length|bytes where"),
        (Fault(sha256(BIG), longer=b"more"), "another length|bytes where"),
    ],
)
def test_wrong_content_is_never_kept(hub: Hub, fault: Fault, words: str) -> None:
    hub.add("owner/name", SINGLE)
    hub.faults = [fault]
    with pytest.raises(Halt, match=words) as caught:
        room.fetch(Name("owner/name"))
    assert caught.value.code == ExitCode.MISMATCH
    assert parts() == [] and not (MODELS / "model-fp32.safetensors").exists()
    assert room.fetch(Name("owner/name")).place.read_bytes() == BIG, "the next start is sound"


def test_a_small_file_is_held_to_its_git_hash(hub: Hub) -> None:
    hub.add("owner/name", {"config.json": b'{"a": 1}', "model.safetensors": BIG})
    hub.faults = [Fault(r"config\.json", other=b'{"a": 2}')]
    with pytest.raises(Halt, match="git hash"):
        room.fetch(Name("owner/name"))


def test_a_pin_of_ours_wins_over_what_the_hub_lists(hub: Hub) -> None:
    hub.add("owner/name", SINGLE)
    with pytest.raises(Halt, match=f"where {'0' * 64} was listed"):
        room.fetch(Name("owner/name"), known={"model-fp32.safetensors": "0" * 64})


def test_the_hubs_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", SINGLE)
    hub.repositories["owner/name"].gated, hub.token = True, "hf_canarycanary"
    with pytest.raises(Halt, match=r"owner/name is gated: accept its terms at http://127\.0\.0\.1:\d+/owner/name .*hf auth login"):
        room.fetch(Name("owner/name"))
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    room.fetch(Name("owner/name"))
    seen = {path.split("/")[1] == sha256(BIG): headers.get("authorization") for _, path, headers in hub.asked}
    assert seen == {False: "Bearer hf_canarycanary", True: None}, "not to where it redirects"
    assert "canary" not in (MODELS / "revision.json").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/nothing", "does not exist on the hub, or is private or gated"),
        ("owner/name@nowhere", "exists, but not that revision"),
        ("owner/name@main:other.safetensors", r"has no file other\.safetensors; it has model-fp32\.safetensors"),
        ("owner/several", r"holds 2 models; name one of them\n  owner/several:a\.safetensors\n  owner/several:b\.safetensors"),
        ("owner/pickles", "holds no model that can be read"),
    ],
)
def test_what_cannot_be_fetched_says_why(hub: Hub, name: str, words: str) -> None:
    hub.add("owner/name", SINGLE)
    hub.add("owner/several", {"a.safetensors": BIG, "b.safetensors": BIG})
    hub.add("owner/pickles", {"model.ckpt": BIG})
    with pytest.raises(Halt, match=words) as caught:
        room.resolve(name)
    assert caught.value.code == ExitCode.MISMATCH
    assert not list(MODELS.glob("*"))[1:], "nothing is left but the lock"


def test_one_network_alone(hub: Hub, base_model: Path) -> None:
    vae = files_of(base_model / "vae")
    commit = hub.add("owner/vae", {**vae, "sdxl_vae.safetensors": BIG, "x.bin": b"", "README.md": b""})
    place, _ = room.resolve(f"owner/vae@{commit}", "model.vae")
    assert {path.name for path in place.iterdir()} == {*vae, "README.md", "revision.json"}
    model = source.resolve(ModelConfig(init_from=str(base_model), vae=f"owner/vae@{commit}"))
    assert model.vae_sha256 == sha256(vae["diffusion_pytorch_model.safetensors"])
    assert find_vae(f"owner/vae@{commit}").file == place / "diffusion_pytorch_model.safetensors", "of the latents too"
    with pytest.raises(Halt, match=rf"latents\.vae owner/vae .*: latents\.vae=owner/vae@{commit}"):
        find_vae("owner/vae")


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", SINGLE)
    with monkeypatch.context() as patch:
        patch.setattr(room, "free_bytes", lambda folder: 1000)
        with pytest.raises(Halt, match=r"needs 0\.0 GB, models has 0\.0 GB free") as caught:
            room.fetch(Name("owner/name"))
        assert caught.value.code == ExitCode.CANNOT_WRITE
        assert not [path for path in hub.paths("GET") if "resolve" in path], "before a byte is asked for"
    part = MODELS / f".model-fp32.safetensors.{room.Wanted(len(BIG), sha256(BIG)).identity}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(Halt, match="no space is left") as caught:
        room.fetch(Name("owner/name"))
    assert caught.value.code == ExitCode.CANNOT_WRITE


def test_what_the_librarys_cache_holds_is_not_sent_again(hub: Hub, tmp_path: Path, base_model: Path) -> None:
    from huggingface_hub import snapshot_download

    commit = hub.add("owner/name", files_of(base_model))
    snapshot = Path(snapshot_download("owner/name", revision="main", cache_dir=tmp_path / "cache", endpoint=hub.address))
    hub.asked.clear()
    assert room.resolve("owner/name") == (snapshot, commit)
    assert hub.asked == [], "as the cache knows it"
    got = room.fetch(Name("owner/name", commit), Path("out"))
    assert not [path for path in hub.paths("GET") if "resolve" in path]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (got.place / weights).read_bytes() == (base_model / weights).read_bytes()


def test_without_a_network_it_says_which_file_to_put_where(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = hub.add("owner/name", {**SINGLE, "b.safetensors": BIG})
    name = Name("owner/name", commit, "b.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        words = rf"HF_HUB_OFFLINE is set.*scripts/fetch\.py owner/name@{commit}:b\.safetensors.*owner/name/resolve/{commit}/b\.safetensors as models/b\.safetensors, and say model\.vae=models/b\.safetensors"
        with pytest.raises(Halt, match=words) as caught:
            room.resolve(str(name), "model.vae")
        assert caught.value.code == ExitCode.MISMATCH
        with pytest.raises(Halt, match=r"into models/name/ \(model_index\.json and unet/, text_encoder/.*say model\.init_from=models/name"):
            room.resolve(f"owner/name@{commit}")
    hub.faults = [Fault(sha256(BIG), status=500, times=9)]
    with pytest.raises(Halt, match="500"):
        room.fetch(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Halt, match=r"as models/b\.safetensors"):
        room.resolve(str(name))


def test_a_name_without_commit_is_refused_with_the_line(hub: Hub) -> None:
    commit = hub.add("owner/name", SINGLE)
    for text in ("owner/name", "owner/name@main"):
        with pytest.raises(Halt, match=rf"40-digit commit.*: model\.init_from=owner/name@{commit}$") as caught:
            source.find(text)
        assert caught.value.code == ExitCode.USAGE
    assert not MODELS.exists(), "nothing is fetched for it"
    hub.asked.clear()
    for text in ("runs/pretrain", "models/a.safetensors", "other/a.safetensors"):
        with pytest.raises(Halt, match=f"{text} does not exist: give"):
            source.find(text)
    assert hub.asked == [], "a path that is not there is nobody's business"


def test_a_fetched_files_licence_is_that_of_its_page(hub: Hub, tmp_path: Path, base_model: Path) -> None:
    from train.model import single_file

    single_file.to_single_file(base_model, tmp_path / "m.safetensors")
    commit = hub.add("owner/name", {"m.safetensors": (tmp_path / "m.safetensors").read_bytes()}, license="other", license_name="faipl-1.0-sd")
    model = source.resolve(ModelConfig(init_from=f"owner/name@{commit}"))
    assert (model.kind, model.license) == ("single_file", "Fair AI Public License 1.0-SD")


def test_a_record_that_leads_elsewhere_is_no_record(tmp_path: Path) -> None:
    for files, single in (({"../x": {}}, None), ({"x": {}}, "../x"), ({"/x": {}}, None), ({}, None), (None, None)):
        record = {"from": "owner/name", "file": None, "commit": "a" * 40, "single": single, "files": files}
        (tmp_path / "revision.json").write_text(json.dumps({"sources": [record, "no", 3]}))
        assert revision.records(tmp_path) == []
    shutil.rmtree(tmp_path)
    assert revision.records(tmp_path) == []


def test_only_what_a_model_needs_is_wanted() -> None:
    wanted = ["model_index.json", "README.md", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
              "tokenizer/merges.txt", "scheduler/scheduler_config.json"]  # fmt: skip
    refused = ["animagine-xl-3.1.safetensors", "unet/diffusion_pytorch_model.bin", "vae_1_0/x.safetensors",
               "unet/diffusion_pytorch_model.fp16.safetensors", "handler.py", "unet/model.py"]  # fmt: skip
    assert [name for name in wanted + refused if room.wanted_of_folder(name)] == wanted


def test_too_much_for_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Halt, match="41 GB, too much"):
        room.refuse_too_large("owner/name", 41 * 10**9, tmp_path)
    assert len(BIG) > standin.LARGE_BYTES
