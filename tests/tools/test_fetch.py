"""`fetch.py`: the recipe's words, addresses, what is printed; the command itself against a stand-in named by HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import standin
from safetensors.numpy import save
from stages import Stage
from standin import Fault, Hub, files_of, sha256

from train.base.errors import ExitCode, Halt
from train.tools import fetch as room
from train.tools.fetch import RECIPE, fetch

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("models")


def model(seed: int = 0, **metadata: str) -> bytes:
    import numpy

    return save({"a": numpy.full((64, 64), seed, dtype=numpy.float32)}, metadata or None)


def test_the_recipes_words(hub: Hub, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, vae = RECIPE["base"], RECIPE["vae"]
    hub.add(base.name.repository, {base.name.file or "": model(), **files_of(base_model)}, license="other", license_name="faipl-1.0-sd")
    lines = fetch("base", OUT)
    assert (OUT / "animagine-xl-3.0-base.safetensors").read_bytes() == model(), "where configs/pretrain.yaml names it"
    assert any(line.startswith("  licence: faipl-1.0-sd") for line in lines)
    assert any(f"model.init_sha256={sha256(model())}" in line for line in lines)
    assert lines[-1].startswith("note: commit and hash"), "what nobody knows is said"

    network = files_of(base_model / "vae")
    repository = hub.repositories.setdefault(vae.name.repository, standin.Repository())
    repository.commits[str(vae.name.commit)] = network
    with pytest.raises(Halt, match=r"where 1b909373b28f.* was listed"):
        fetch("vae", OUT)
    weights = network["diffusion_pytorch_model.safetensors"]
    monkeypatch.setitem(RECIPE, "vae", room.Weight(vae.name, "MIT", {"diffusion_pytorch_model.safetensors": sha256(weights)}, ""))
    lines = fetch("vae", OUT)
    assert lines[-1] == f"  model.vae=models/sdxl-vae-fp16-fix model.vae_sha256={sha256(weights)}"
    assert "  licence: MIT" in lines, "its page here states none; ours is sourced"


def test_the_configs_name_what_base_fetches() -> None:
    for config in ("configs/pretrain.yaml", "configs/as_run/pretrain.yaml"):
        assert f"init_from: models/{RECIPE['base'].name.file}" in (ROOT / config).read_text()


def test_tokenizers_need_no_network(tmp_path: Path) -> None:
    lines = fetch("tokenizers", tmp_path / "models")
    place = tmp_path / "models/tokenizers"
    assert (place / "tokenizer/vocab.json").is_file() and (place / "tokenizer_2/merges.txt").is_file()
    assert lines[-1] == f"  tokenizers: {place}  # in dataset.yaml"
    assert fetch("tokenizers", tmp_path / "models") == lines
    (place / "tokenizer/merges.txt").write_text("changed")
    with pytest.raises(Halt, match=r"tokenizer/merges\.txt has sha256"):
        fetch("tokenizers", tmp_path / "models")


def test_an_address_is_pinned_by_its_hash(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    data = model(1, **{"modelspec.license": "CC0"})
    hub.plain = {"/get/mine.safetensors": data, "/get/two?token=secretsecret": data}
    lines = fetch(f"{hub.elsewhere}/get/mine.safetensors", OUT)
    assert (OUT / "mine.safetensors").read_bytes() == data
    assert "  licence: CC0" in lines and lines[-1] == f"  model.init_from=models/mine.safetensors model.init_sha256={sha256(data)}"
    assert not any("authorization" in headers for _, _, headers in hub.asked), "no token of the hub's goes to an address"
    hub.asked.clear()
    assert fetch(f"{hub.elsewhere}/get/mine.safetensors", OUT) == lines and hub.asked == []
    (OUT / "mine.safetensors").write_bytes(data[:-1] + b"x")
    with pytest.raises(Halt, match=r"mine\.safetensors has sha256"):
        fetch(f"{hub.elsewhere}/get/mine.safetensors", OUT)
    with pytest.raises(Halt, match=r"names no \.safetensors file \(two\)") as caught:
        fetch(f"{hub.elsewhere}/get/two?token=secretsecret", OUT)
    assert caught.value.code == ExitCode.USAGE and "secretsecret" not in caught.value.message


@pytest.mark.parametrize("etag", [True, False])
def test_an_address_that_changes_between_two_starts(hub: Hub, etag: bool) -> None:
    hub.plain, hub.plain_etag = {"/a.safetensors": model(1)}, etag
    hub.faults = [Fault("/a", cut_after=9000), Fault("/a", status=503, times=5)]
    with pytest.raises(Halt, match="503"):
        fetch(f"{hub.elsewhere}/a.safetensors", OUT)
    hub.plain = {"/a.safetensors": model(2)}
    fetch(f"{hub.elsewhere}/a.safetensors", OUT)
    assert (OUT / "a.safetensors").read_bytes() == model(2), "no mixture of both"
    assert not list(OUT.glob(".*.part"))


@pytest.mark.parametrize(("data", "words"), [(b"<!doctype html><p>sign in", "web page"), (b"PK\x03\x04 archive/data.pkl", "pickle")])
def test_what_is_no_model_is_not_kept(hub: Hub, data: bytes, words: str) -> None:
    hub.plain = {"/a.safetensors": data}
    with pytest.raises(Halt, match=words):
        fetch(f"{hub.elsewhere}/a.safetensors", OUT)
    assert not list(OUT.glob("*"))[1:]


def test_what_has_no_form() -> None:
    for what in ("bass", "a/b/c", "ftp://x/y.safetensors"):
        with pytest.raises(Halt, match=r"neither base, vae, tokenizers nor owner/name") as caught:
            fetch(what, OUT)
        assert caught.value.code == ExitCode.USAGE


@pytest.mark.long
def test_the_command_asks_the_hub_that_the_environment_names(hub: Hub, tmp_path: Path) -> None:
    """Two at once, as the processes of a run: one fetches, the other waits for it; then without a network."""
    commit = hub.add("owner/name", {"a.safetensors": model(3), "README.md": b""}, license="mit")
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts/fetch.py"), "owner/name"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], outs
    assert outs[0][0] == outs[1][0] and f"owner/name@{commit} -> models/a.safetensors" in outs[0][0]
    assert len([path for path in hub.paths("GET") if sha256(model(3)) in path]) == 1
    assert json.loads((OUT / "revision.json").read_text())["sources"][0]["license"] == "mit"

    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([*command, "owner/other@" + "a" * 40], env=offline, capture_output=True, text=True, check=False)
    assert found.returncode == ExitCode.MISMATCH and "Traceback" not in found.stderr
    assert re.search(rf"owner/other@{'a' * 40} cannot be fetched: HF_HUB_OFFLINE is set.*into models/other/", found.stderr)
    assert "owner/name@" in found.stdout, "what lies here is checked and told without one"


@pytest.mark.slow
def test_a_stage_starts_from_a_name_and_only_with_its_commit(hub: Hub, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """Everything else is looked at first; then the model is fetched, trained, and its licence inherited."""
    readme = b"---\nlicense: other\nlicense_name: faipl-1.0-sd\n---\n"
    commit = hub.add("owner/name", {**files_of(base_model), "README.md": readme})
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("model.init_from=owner/name") == ExitCode.USAGE
    assert f"model.init_from=owner/name@{commit}" in stage.message
    hub.asked.clear()
    assert stage.run(f"model.init_from=owner/name@{commit}", "data.path=nowhere") != 0
    assert hub.asked == [], "nothing is fetched for a start that is refused"
    assert stage.run(f"model.init_from=owner/name@{commit}", "max_updates=1", "export.license=null") == 0, stage.message
    record = json.loads((stage.output / "lineage.json").read_text())
    assert (record["license"], record["parent"]["title"]) == ("Fair AI Public License 1.0-SD", "name")
    hub.asked.clear()
    assert stage.run(f"model.init_from=owner/name@{commit}", "max_updates=2", "export.license=null") == 0, stage.message
    assert hub.asked == []


def test_a_new_folder_takes_a_base_by_name(hub: Hub) -> None:
    """`new.py --base owner/name`: fetched at one commit, found here the next time, whatever the branch is then."""
    from train.tools.new import base

    commit = hub.add("owner/name", {"a.safetensors": model(3)})
    here = Path.cwd() / "models/a.safetensors"
    assert base.find("owner/name") == (here, commit)
    hub.add("owner/name", {"a.safetensors": model(4)})
    hub.asked.clear()
    assert base.find("owner/name") == base.find(f"owner/name@{commit}") == base.find("models/a.safetensors") == (here, commit) and hub.asked == []
    for path in ("models/b.safetensors", "runs/one"):
        with pytest.raises(Halt, match=f"{path} does not exist here"):
            base.find(path)
