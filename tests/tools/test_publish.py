"""Publishing a run, an adapter and a set to a stand-in on loopback: what goes, what never does, licences, resuming, faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from standin import Fault, Hub, files_of, git_sha1, sha256

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, write_json
from train.data.index import Index
from train.observe.runs import Picture, Run
from train.recipe.exclusions import EXCLUSIONS_VERSION
from train.storage import hub as hub_room
from train.storage.objects import Store
from train.storage.revision import Name
from train.tools.commands import publish as command
from train.tools.publish import captions, gather, licences, page, upload

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")  # of the hub's client
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_canarycanary"
FAIPL = "Fair AI Public License 1.0-SD"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def finished(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with previews, held-out loss and everything that a user's machine leaves in one."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    run = Path(shutil.copytree(straight, tmp_path_factory.mktemp("mine") / "run"))
    for number, prompt in enumerate(("a red kettle", "a | b <script>")):
        told = PngInfo()
        told.add_text("parameters", f"{prompt}\nNegative prompt: bad\nSteps: 28, Sampler: Euler a, CFG scale: 7, Seed: {number}, Size: 64x64, Model: {run}")
        (run / "samples/step-00000009").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(run / f"samples/step-00000009/{number:02d}.png", pnginfo=told)
    Image.new("RGB", (64, 64), "blue").save(run / "samples/step-00000009/02.png")  # whose picture this is nobody knows
    line = {"images": 3, "strata": {"quality/masterpiece": {"images": 3, "loss": 0.5, "interval": 0.01}}, "losses": {"u": 0.5}}
    (run / "validation.jsonl").write_text("".join(json.dumps({"step": n, "update": n, "loss": 0.9 / n, "interval": 0.02, **line}) + "\n" for n in (3, 9)))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def publish(*words: str, code: int = 0) -> None:
    sys.argv = ["publish.py", *words]
    assert command.main() == code


def restate(run: Path, **changes: Any) -> None:
    for file in (run / "lineage.json", run / "model/lineage.json"):
        write_json(file, {**(read_json(file) or {}), **changes})


def on_page(hub: Hub, name: str = "me/mine") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs["main"]]


def test_a_dry_run_asks_nobody(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(str(run), "--to", "me/mine")
    said = capsys.readouterr().out
    assert hub.asked == []
    assert "dry run: nothing was sent to me/mine" in said and f"  {WEIGHTS}\n" in said
    assert "1 pictures were drawn by no sampler" in said


def test_a_run_becomes_a_page_that_opens(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    publish(str(run), "--to", "me/mine", "--go")
    there = on_page(hub)
    assert capsys.readouterr().out.strip().endswith(f"/me/mine @{hub.repositories['me/mine'].refs['main']}")
    assert {name for name in there if "/" not in name} == {
        "README.md", "lineage.json", "model_index.json", "pretrain.safetensors", "single_file.json", "training.yaml",
    }  # fmt: skip
    assert there["pretrain.safetensors"] == (run / "pretrain.safetensors").read_bytes()
    assert sorted(name for name in there if name.startswith("samples/")) == ["samples/01.png", "samples/02.png"]

    head = yaml.safe_load(there["README.md"].decode().split("---")[1])
    assert (head["license"], head["thumbnail"]) == ("apache-2.0", "samples/01.png")
    text = there["README.md"].decode()
    for words in (
        'from_pretrained("me/mine")', "| ![](samples/01.png) | a red kettle | seed 0, steps 28", "a / b  script", "9 updates over 72 images",
        "72 images, 2.77 passes over its set of 26", "| all | 0.3000 ± 0.0200 (3) | 0.1000 ± 0.0200 (3) |",
        "| quality masterpiece | 0.5000 ± 0.0100 (3) |", "| pretrain |", "Apache-2.0",
    ):  # fmt: skip
        assert words in text, words
    whole = b"".join(there.values())
    assert str(run).encode() not in whole and str(run.parent).encode() not in whole and TOKEN.encode() not in whole
    settings = yaml.safe_load(there["training.yaml"])
    own = yaml.safe_load((run / "model/training.yaml").read_text())
    assert settings["model"]["init_from"] == Path(own["model"]["init_from"]).name and settings["seed"] == own["seed"]
    assert json.loads(there["lineage.json"])["code_revision"] == (read_json(run / "lineage.json") or {})["code_revision"]

    got = hub_room.fetch(Name("me/mine"), Path("back"))
    assert (got.place / WEIGHTS).read_bytes() == (run / "model" / WEIGHTS).read_bytes() and got.license == "apache-2.0"


def test_what_is_there_is_not_sent_again(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish(str(run), "--to", "me/mine", "--go")
    commits = len(hub.repositories["me/mine"].commits)
    hub.asked.clear()
    publish(str(run), "--to", "me/mine", "--go")
    assert len(hub.repositories["me/mine"].commits) == commits, "no empty commit"
    assert hub.paths("PUT") == [] and not [path for path in hub.paths("POST") if "create" not in path]
    (run / "model/README.md").unlink()
    weights = load_file(run / "pretrain.safetensors")
    save_file({name: numpy.asarray(value + 1) for name, value in weights.items()}, run / "pretrain.safetensors")
    hub.asked.clear()
    publish(str(run), "--to", "me/mine", "--go")
    assert hub.paths("PUT") == [f"/{sha256((run / 'pretrain.safetensors').read_bytes())}"], "one file changed, one is sent"


def test_an_upload_that_was_cut_goes_on(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    last = sha256((run / "pretrain.safetensors").read_bytes())
    hub.faults = [Fault(last, status=500, method="PUT", times=99)]
    with pytest.raises(Halt, match=r"answers 500.*what arrived is not sent twice") as caught:
        publish(str(run), "--to", "me/mine", "--go")
    assert caught.value.code == ExitCode.MISMATCH
    assert "README.md" not in on_page(hub), "a page is never half of a model"
    arrived = set(hub.stored)
    assert arrived and last not in arrived
    hub.faults.clear()
    hub.asked.clear()
    publish(str(run), "--to", "me/mine", "--go")
    assert not {path[1:] for path in hub.paths("PUT")} & arrived
    assert on_page(hub)["pretrain.safetensors"] == (run / "pretrain.safetensors").read_bytes()

    hub.faults = [Fault("/commit/", status=503, method="POST", times=99)]
    (run / "model/training.yaml").write_text("seed: 2\n")
    with pytest.raises(Halt, match="503"):
        publish(str(run), "--to", "me/mine", "--go")
    hub.faults = [Fault("preupload|batch|commit", status=502, method="POST", times=2)]
    publish(str(run), "--to", "me/mine", "--go")
    assert on_page(hub)["training.yaml"] == b"seed: 2\n", "a server that is busy is asked again"


def test_who_may_not_write(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Halt, match=r"nobody is signed in.*hf auth login"):
        publish(str(run), "--to", "me/mine", "--go")
    assert hub.asked == []
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_otherotherother")
    with pytest.raises(Halt, match=r"me/mine may not be written by you \(401\)") as caught:
        publish(str(run), "--to", "me/mine", "--go")
    assert "hf_other" not in caught.value.message
    hub.faults = [Fault("/api/repos/create", status=403, method="POST")]
    with pytest.raises(Halt, match=r"\(403\)"):
        publish(str(run), "--to", "me/mine", "--go")


def test_bytes_that_changed_on_the_way(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    true = upload._hashes
    seen: list[Any] = []

    def after_sending(content: Any) -> tuple[str, str]:
        seen.append(content)
        return true(content) if len(seen) <= 25 else ("0", "0")

    monkeypatch.setattr(upload, "_hashes", after_sending)
    with pytest.raises(Halt, match=r"me/mine holds other bytes than were sent"):
        publish(str(run), "--to", "me/mine", "--go")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"license": "MIT", "ancestors": [{"stage": "ft1", "license": FAIPL}]}, f"pretrain states MIT, but stage ft1 is under {FAIPL}"),
        ({"license": "MIT", "parent": {"stage": None, "title": "animagine-xl-3.0-base"}}, f"animagine-xl-3.0-base is under {FAIPL}"),
        ({"license": FAIPL, "parents": [{"title": "one", "license": "CC-BY-NC-4.0"}]}, "one is under CC-BY-NC-4.0"),
        ({"license": ""}, "states no licence"),
    ],
)
def test_licences_that_do_not_allow_it_are_named(run: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    restate(run, **changes)
    with pytest.raises(Halt, match=words):
        publish(str(run), "--to", "me/mine")


@pytest.mark.parametrize(
    ("own", "inherited"), [(FAIPL, "MIT"), (FAIPL, "Apache-2.0"), (FAIPL, "faipl-1.0-sd"), ("openrail++", "CreativeML Open RAIL++-M"), ("CC0", "cc0-1.0")]
)
def test_licences_that_do(own: str, inherited: str) -> None:
    assert licences.refuse_conflicts({"stage": "s", "license": own, "ancestors": [{"stage": "p", "license": inherited}, "no record"]}, None) == own


def test_the_licence_of_what_it_started_from_counts_while_it_lies_here(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    save_file({}, base / WEIGHTS)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: faipl-1.0-sd\n---\n")
    with pytest.raises(Halt, match=f"base is under {FAIPL}"):
        licences.refuse_conflicts({"stage": "s", "license": "MIT"}, str(base))
    assert licences.refuse_conflicts({"stage": "s", "license": "MIT"}, str(tmp_path / "gone")) == "MIT"


def test_a_licence_on_the_page_is_held_to_too(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("me/mine", {"README.md": b""}, license="cc-by-nc-4.0")
    with pytest.raises(Halt, match=r"me/mine states cc-by-nc-4\.0, and this is under Apache-2\.0"):
        publish(str(run), "--to", "me/mine", "--go")
    assert list(on_page(hub)) == ["README.md"], "nothing was sent"


def test_heads_that_a_hub_reads() -> None:
    assert licences.fields("Apache-2.0") == {"license": "apache-2.0"}
    assert licences.fields(FAIPL) == {"license": "other", "license_name": "faipl-1.0-sd", "license_link": "https://freedevproject.org/faipl-1.0-sd/"}
    assert licences.fields("My Own (2)") == {"license": "other", "license_name": "my-own-2"}


def test_pages_by_name() -> None:
    with pytest.raises(Halt, match=r"--to https://elsewhere.example/me/mine: an object store is named s3://bucket/folder") as caught:
        upload.page_of("https://elsewhere.example/me/mine")
    assert caught.value.code == ExitCode.USAGE
    for odd in ("mine", "me/mine@main", "me/mine:file"):
        with pytest.raises(Halt, match="named owner/name"):
            upload.page_of(odd)
    assert upload.page_of("https://huggingface.co/me/mine") == "me/mine"


def test_a_run_in_a_store_of_ones_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files and card; a start that was cut goes on, and what changed alone is sent again."""
    put, sent = Store.put, list[str]()

    def counted(self: Store, path: Path, name: str) -> None:
        if len(sent) == 8 and name != "published.json":
            sent.append("cut")
            raise Halt(ExitCode.UNEXPECTED, "the line was cut")
        sent.extend([name] if name != "published.json" else [])
        put(self, path, name)

    monkeypatch.setattr(Store, "put", counted)
    to = f"file://{tmp_path}/store"
    publish(str(run), "--to", to)
    assert not (tmp_path / "store").exists(), "a dry run"
    with pytest.raises(Halt, match="cut"):
        publish(str(run), "--to", to, "--go")
    first, sent[:] = sent[:8], []
    monkeypatch.setattr(Store, "put", lambda self, path, name: (sent.extend([name] if name != "published.json" else []), put(self, path, name))[1])
    publish(str(run), "--to", to, "--go")
    assert not set(first) & set(sent) and sent[-1] == "README.md"
    there = files_of(tmp_path / "store")
    assert set(there) - {"published.json"} == {*first, *sent} and there[WEIGHTS] == (run / "model" / WEIGHTS).read_bytes()
    assert f'from_pretrained("{to}")'.encode() not in there["README.md"], "a store is no page that a program opens by name"
    sent.clear()
    (run / "model/training.yaml").write_text("seed: 2\n")
    publish(str(run), "--to", to, "--go")
    assert sent == ["training.yaml"]


def test_what_is_not_finished_is_not_published(run: Path, tmp_path: Path) -> None:
    (run / "DONE").unlink()
    with pytest.raises(Halt, match="is not finished"):
        gather.gather(run, None)
    with pytest.raises(Halt, match="neither a finished run"):
        gather.gather(tmp_path / "none", None)
    (run / "DONE").write_text("{}")
    (run / "pretrain.safetensors").unlink()
    with pytest.raises(Halt, match=r"holds no pretrain\.safetensors"):
        gather.gather(run, None)


def test_a_private_path_or_a_secret_stops_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-swordfish")
    found = gather.gather(run, None)
    for text, words in ((f"see {run}/notes", "would tell of"), ("swordfish-swordfish", "looks like a secret"), ("hf_abcdefgh12", "looks like a secret")):
        found.files["README.md"] = text.encode()
        with pytest.raises(Halt, match=f"README.md .*{words}"):
            gather.refuse_private(found)
    found.files["README.md"] = b"a commit 944ed1dba1f8debc217aa389c526bf959ccc276a"
    gather.refuse_private(found)


def test_a_folder_of_new_takes_its_run_and_the_pictures_after(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    shutil.copytree(run, folder / "run")
    shutil.copytree(run / "samples/step-00000009", folder / "samples/after")
    found = gather.gather(folder, None)
    assert found.source == folder / "run" and [picture.prompt for _, picture, _ in found.pictures] == ["a red kettle", "a | b <script>"]
    with pytest.raises(Halt, match="is no folder"):
        gather.gather(folder, tmp_path / "none")


def test_a_caption_of_the_set_is_no_words_of_a_card(run: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """new.py draws prompts from captions: their pictures stand without words, and without the set no prompt is told."""
    fixed, flex = Index.open(dataset, "pretrain").caption(3)
    caption = ", ".join(["masterpiece, best quality", "trigger", *fixed, *flex])
    monkeypatch.setattr(gather, "read_pictures", lambda *_: [])
    monkeypatch.setattr(Run, "newest_pictures", lambda self: [
        Picture(run / "samples/step-00000009/00.png", prompt, {"Steps": "28", "Seed": "1"}, False) for prompt in (caption, "a red kettle")
    ])  # fmt: skip
    found = gather.gather(run, None)
    assert [told for _, _, told in found.pictures] == [False, True] and "1 prompts are captions of the set" in found.notes[-1]
    found.license = "MIT"
    text = page.text_of_run(found, "me/mine")
    assert "a red kettle" in text and "trigger" not in text and flex[0] not in text
    elsewhere = captions.given_away([caption], run, "pretrain")
    assert elsewhere is None
    monkeypatch.setattr(captions, "given_away", lambda *_: None)
    found = gather.gather(run, None)
    assert [told for _, _, told in found.pictures] == [False, False] and "prompts are left out" in found.notes[-1]


@pytest.mark.parametrize(
    ("prompt", "caption", "given"),
    [
        ("1girl, miku, smile", "1girl, miku, smile", True),
        ("masterpiece, tok, 1girl, miku, smile, outdoors", "1girl, miku, smile, outdoors, sky, safe, newest", True),
        ("1girl, solo, smile", "1girl, solo, smile, a, b, c, d", False),  # what many pictures are
        ("a, b, c, d, e, f, g, h", ", ".join("abcdefghijklmnopqrstuvwxyz"), True),  # cut after many
        ("1girl, miku, smile, in a forest, at night, red hat", "1girl, miku, smile", False),
        ("miku", "miku", False),
    ],
)
def test_what_gives_a_caption_away(prompt: str, caption: str, given: bool) -> None:
    assert captions._is_of(captions._own_tags(prompt.split(", ")), captions._own_tags(caption.split(", "))) is given


def test_an_adapter_is_loaded_by_its_page(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "model")
    (run / "pretrain.safetensors").unlink()
    (run / "lora").mkdir()
    record = {**(read_json(run / "lineage.json") or {}), "adapter": {"type": "lora", "rank": 4, "base": {"sha256": "ab" * 32}}}
    for file in (run / "lineage.json", run / "lora/lineage.json"):
        write_json(file, record)
    save_file({}, run / "lora/pytorch_lora_weights.safetensors")
    save_file({}, run / "pretrain-lora.safetensors", metadata={"ss_tag_frequency": "{}", "modelspec.title": "Mine", "modelspec.prediction_type": "v"})
    (run / "lora/training.yaml").write_text(f"data:\n  path: {tmp_path}/my set\nseed: 1\n")
    found = gather.gather(run, None)
    assert found.kind == "adapter" and "ss_tag_frequency" in found.notes[0]
    assert {"pytorch_lora_weights.safetensors", "pretrain-lora.safetensors", "lineage.json", "training.yaml"} <= set(found.files)
    assert found.files["training.yaml"] == b"data:\n  path: my set\nseed: 1\n"
    found.license = licences.of_run(run)
    text = page.text_of_run(found, "me/mine")
    for words in ("# Mine", 'pipe.load_lora_weights("me/mine", weight_name="pytorch_lora_weights.safetensors")', "rank 4", "abababababab", "InvokeAI", '"lora"'):
        assert words in text, words


def test_a_set_goes_without_its_pictures(hub: Hub, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = Path(shutil.copytree(dataset, tmp_path / "set"))
    for private in ("report.html", "records/a.parquet", "probe/a.parquet", "images/a.png", "quarantine.parquet", "labels/0.parquet"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("private")
    said = {**(read_json(folder / "dataset.json") or {}), "hard_exclusion_version": EXCLUSIONS_VERSION}
    write_json(folder / "dataset.json", said)
    with pytest.raises(Halt, match="give --license"):
        publish(str(folder), "--to", "me/set")
    publish(str(folder), "--to", "me/set", "--license", "CC0", "--go")
    out = capsys.readouterr().out
    assert "left out: images, probe, quarantine.parquet, records, report.html" in out and "latents can be turned back into pictures" in out
    there = on_page(hub, "me/set")
    own = files_of(folder)
    expected = {name for name in own if name.startswith(("index", "select_", "labels/", "latents/", "masks/", "dataset.json"))}
    assert set(there) == expected | {"README.md"} and all(there[name] == own[name] for name in expected)
    assert yaml.safe_load(there["README.md"].decode().split("---")[1])["license"] == "cc0-1.0"
    assert any(path.startswith("/api/datasets/me/set/") for path in hub.paths("POST")), "a data set's page, not a model's"

    write_json(folder / "dataset.json", {**said, "hard_exclusion_version": EXCLUSIONS_VERSION - 1})
    with pytest.raises(Halt, match="earlier version of the hard exclusions"):
        publish(str(folder), "--to", "me/set", "--license", "CC0")


def test_hashes_are_the_hubs_two(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert upload._hashes(tmp_path / "a") == upload._hashes(b"abc") == (sha256(b"abc"), git_sha1(b"abc"))
    assert git_sha1(b"abc") == "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f", "what git hash-object says"


@pytest.mark.long
def test_the_command_publishes_to_the_hub_that_the_environment_names(hub: Hub, run: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
    }  # fmt: skip
    hub.token = TOKEN
    command = [sys.executable, str(ROOT / "scripts/publish.py"), str(run), "--to", "me/mine", "--go"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert on_page(hub)["pretrain.safetensors"] == (run / "pretrain.safetensors").read_bytes()
    assert TOKEN not in done.stdout + done.stderr
