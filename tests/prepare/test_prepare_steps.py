"""From pictures to a dataset and back: selection, latents, report; small, in one process, with a real VAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from oddimages import cases
from preparedset import prepare, settings_of, write_posts, write_vae

from train.base.errors import ExitCode, Halt
from train.data.index import Index
from train.data.shards import ShardReader
from train.model.networks import fill
from train.prepare.encoding.encoder import find_vae
from train.prepare.folders.kinds import is_image
from train.prepare.tables.quarantine import Complaint
from train.prepare.tables.schemas import ErrorReason
from train.recipe.rng import Stream, normals, uid_of
from train.tools.show.inputs import dataset as report

pytestmark = pytest.mark.slow
COUNT = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("made")
    write_posts(folder / "pictures", COUNT)
    shutil.copy(folder / "pictures" / "3.png", folder / "pictures" / "900.png")  # an exact duplicate of post 3
    post = json.loads((folder / "pictures" / "3.json").read_text()) | {"id": 900, "score": 59, "rating": "g"}
    (folder / "pictures" / "900.json").write_text(json.dumps(post))
    write_vae(folder / "vae")
    prepare(settings_of(folder))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The finished dataset, to be changed."""
    shutil.copytree(made, tmp_path / "c", copy_function=shutil.copy2)
    (tmp_path / "c" / "dataset.yaml").unlink()
    settings_of(tmp_path / "c")
    return tmp_path / "c"


def test_everything_is_selected_but_the_duplicate(made: Path) -> None:
    index = Index.open(made / "data/set", "pretrain")
    keys = [index.key(i) for i in range(len(index))]
    assert keys == sorted({f"booru:{n}" for n in range(COUNT)} - {"booru:3"} | {"booru:900"})  # 900 has the higher score
    quarantine = pq.read_table(made / "data/set/quarantine.parquet").to_pylist()
    assert [(row["key"], row["reason"], row["kind"]) for row in quarantine] == [("booru:3", "duplicate", "excluded")]


def test_finetune_selection_is_as_written_out(made: Path) -> None:
    """The same rules in plain Python over the posts: rating, area, at most 4 per artist in hash order."""
    table = pq.read_table(made / "data/set/select_ft1.parquet").to_pydict()
    posts = [json.loads(path.read_text()) for path in (made / "pictures").glob("*.json")]
    good = {f"booru:{p['id']}": p for p in posts if p["rating"] in "gs" and p["image_width"] * p["image_height"] > 5000}
    good.pop("booru:3", None)
    by_artist: dict[str, int] = {}
    for key in table["key"]:
        artist = good[key]["tag_string_artist"]
        by_artist[artist] = by_artist.get(artist, 0) + 1
    whole: dict[str, int] = {}
    for post in good.values():
        whole[post["tag_string_artist"]] = whole.get(post["tag_string_artist"], 0) + 1
    assert by_artist == {artist: min(count, 4) for artist, count in whole.items()}
    assert min(np.unique([f"{w}x{h}" for w, h in zip(table["bucket_w"], table["bucket_h"], strict=True)],
                         return_counts=True)[1]) >= 4  # fmt: skip
    assert set(table["why"]) == {"where"}


def test_latents_are_what_the_vae_says(made: Path) -> None:
    """An oracle: Pillow resize and crop, diffusers' own moments, our frozen noise of (dataset seed, uid)."""
    from PIL import Image

    index = Index.open(made / "data/set", "pretrain")
    reader, found = ShardReader(made / "data/set"), find_vae(str(made / "vae/diffusion_pytorch_model.safetensors"))
    vae = fill("vae", found.config, found.weights, found.file)
    for i in (0, 7, 20):
        file = next((made / "pictures").glob(f"{index.key(i).split(':')[1]}.[pjw]*g*"))
        if file.suffix == ".json":
            continue
        size = (int(index.resized_w[i]), int(index.resized_h[i]))
        left, top = int(index.crop_left[i]), int(index.crop_top[i])
        whole = Image.open(file).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        part = whole.crop((left, top, left + int(index.bucket_w[i]), top + int(index.bucket_h[i])))
        pixels = torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            moments = vae.encode(pixels).latent_dist
        noise = torch.from_numpy(normals(5, Stream.VAE_SAMPLE, uid_of(index.key(i)), 0, moments.mean.shape[1:]))
        shard, row = index.latent(i)
        found = reader.read([shard], [row])
        wanted = moments.mean + moments.std * noise
        assert torch.allclose(found, wanted, atol=0.02, rtol=0.02), (found - wanted).abs().max()


def test_report_counts_and_shows(made: Path) -> None:
    facts = json.loads((made / "data/set/report.json").read_text())
    assert facts["counts"]["records"] == COUNT + 1
    assert facts["counts"]["index_images"] == COUNT
    assert facts["duplicates"]["sha256"] == {"groups": 1, "rows": 2, "dropped": 1, "examples": [["booru:900", "booru:3"]]}
    assert all(check["ok"] for check in facts["checks"])
    page = (made / "data/set/report.html").read_text()
    assert page.count("<script") == 2, "the browser's data and its code, which the page's policy names: tests/prepare/test_browser.py"
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg;base64,") > 10
    assert "loading=" not in page, "printed and photographed pages show every picture"
    assert facts["counts"]["found"] == COUNT + 1
    assert facts["counts"]["refused"] == {}
    safe = {f"booru:{n}" for n in range(COUNT) if n % 4 in (0, 1)} | {"booru:900"}
    assert {sample["key"] for sample in facts["samples"]} <= safe, "only ratings g and s are shown"


def test_nothing_is_done_twice(copy: Path) -> None:
    prepare(settings_of(copy))  # the copy lies elsewhere: paths are not part of anything
    before = {path: path.stat().st_mtime_ns for path in (copy / "data/set").rglob("*.safetensors")}
    tables = {path: path.read_bytes() for path in (copy / "data/set").rglob("*.parquet")}
    prepare(settings_of(copy))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: path.read_bytes() for path in (copy / "data/set").rglob("*.parquet")} == tables


def test_new_images_go_to_new_shards(copy: Path) -> None:
    shards = {path.name: path.read_bytes() for path in (copy / "data/set/latents").glob("*.safetensors")}
    old = Index.open(copy / "data/set", "pretrain")
    places = {old.key(i): old.latent(i) for i in range(len(old))}
    write_posts(copy / "pictures", 5, first=100)
    with pytest.raises(Halt, match=r"prepare.py"):
        prepare(settings_of(copy), "ingest", "latents")
    prepare(settings_of(copy))
    now = {path.name: path.read_bytes() for path in (copy / "data/set/latents").glob("*.safetensors")}
    assert {name: now[name] for name in shards} == shards
    assert len(now) > len(shards)
    new = Index.open(copy / "data/set", "pretrain")
    assert len(new) == len(old) + 5
    moved = {f"booru:{n}" for n in range(COUNT)} & {new.key(i) for i in range(len(new)) if
                                                   places.get(new.key(i), new.latent(i)) != new.latent(i)}  # fmt: skip
    assert not moved, "latents that exist stay where they are"
    assert new.fingerprint != old.fingerprint


def test_other_preprocessing_is_encoded_anew(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in (copy / "data/set/latents").glob("*.safetensors")}
    prepare(settings_of(copy, **{"latents.content": "mean"}), "latents")
    after = {path.name: path.read_bytes() for path in (copy / "data/set/latents").glob("*.safetensors")}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    assert Index.open(copy / "data/set", "pretrain").content == "mean"


def test_moments_have_eight_channels(copy: Path) -> None:
    prepare(settings_of(copy, **{"latents.content": "moments", "latents.dtype": "bf16"}), "latents")
    index = Index.open(copy / "data/set", "pretrain")
    shard, row = index.latent(0)
    assert ShardReader(copy / "data/set").read([shard], [row]).shape[1] == 8


def test_picture_that_vanished_is_named_after_the_rest(copy: Path) -> None:
    shutil.rmtree(copy / "data/set/latents")
    (copy / "pictures/6.png").unlink()
    with pytest.raises(Complaint, match=r"1 files.*booru:6.*probe again") as complaint:
        prepare(settings_of(copy), "latents")
    assert complaint.value.code == ExitCode.MISMATCH
    index = Index.open(copy / "data/set", "pretrain")
    assert len(index) == COUNT - 1
    prepare(settings_of(copy))
    reasons = {row["key"]: row["reason"] for row in pq.read_table(copy / "data/set/quarantine.parquet").to_pylist()}
    assert reasons["booru:6"] == "missing_file"


@pytest.mark.parametrize("encode", ["fp16", "fp32"])
def test_not_finite_latents(copy: Path, monkeypatch: pytest.MonkeyPatch, encode: str) -> None:
    """A VAE that overflows: in fp16 the picture is tried again in fp32; still not finite = quarantined, never zeros."""
    from train.prepare.encoding import encoder

    real = encoder.Encoder._moments

    def overflowing(self: encoder.Encoder, vae: object, dtype: torch.dtype, pixels: list[np.ndarray]) -> torch.Tensor:
        moments = real(self, self._full, torch.float32, pixels)
        moments[0, 0, 0, 0] = moments[0, 0, 0, 0] if dtype == torch.float32 and encode == "fp16" else float("nan")
        return moments

    whole = settings_of(copy, **{"latents.encode": encode, "latents.batch": 2, "latents.content": "mean"})
    with monkeypatch.context() as patch:
        patch.setattr(encoder.Encoder, "_moments", overflowing)
        prepare(whole, "latents", "report")
    index = Index.open(copy / "data/set", "pretrain")
    rows = pq.read_table(copy / "data/set/quarantine.parquet").to_pylist()
    lost = sorted({row["key"] for row in rows if row["reason"] == "nan_latent"})
    if encode == "fp16":
        assert lost == []
        assert len(index) == COUNT
    else:
        assert len(lost) > 5
        assert len(index) == COUNT - len(lost)
        assert not set(lost) & {index.key(i) for i in range(len(index))}


def test_select_refusals(copy: Path) -> None:
    for keys, message in ((["booru:1", "booru:77777"], "1 unknown keys: booru:77777"),):
        (copy / "keys.txt").write_text("\n".join(keys))
        with pytest.raises(Halt, match=message):
            prepare(settings_of(copy, **{"select.ft1.allow": str(copy / "keys.txt")}), "select")
    for _ in range(2):  # a selection that stands already is as empty
        with pytest.raises(Complaint, match=r"select\.ft1 leaves no image: .*area > 99999999 0") as halt:
            prepare(settings_of(copy, **{"select.ft1.where": "[area > 99999999]"}), "select")
        assert halt.value.code == ExitCode.MISMATCH
    assert pq.read_metadata(copy / "data/set/select_ft1.parquet").num_rows == 0
    assert pq.read_metadata(copy / "data/set/select_pretrain.parquet").num_rows > 0
    prepare(settings_of(copy, **{"select.ft1.where": "[area > 99999999]"}), "latents", "report")
    for bad in ({"repeats": 40_000}, {"quota": "{by: rating, shares: {g: 0.8, s: 0.3}, total: 8}"},
                {"quota": "{by: rating, shares: {g: 1}, total: 0}"}):  # fmt: skip
        with pytest.raises(Halt, match=r"select\.ft1") as halt:
            settings_of(copy, **{f"select.ft1.{key}": value for key, value in bad.items()})
        assert halt.value.code == ExitCode.USAGE
    with pytest.raises(Halt, match="there is no column 'colour'") as halt:
        prepare(settings_of(copy, **{"select.ft1.where": "[colour == red]"}), "select")
    assert halt.value.code == ExitCode.USAGE


def test_allow_and_deny(copy: Path) -> None:
    """Allow skips the predicates, deny wins, and neither brings a duplicate back."""
    (copy / "allow.txt").write_text("booru:2\nbooru:3\n\n# a comment\nbooru:6\n")
    (copy / "deny.txt").write_text("booru:6\n")
    lists = {"select.ft1.allow": str(copy / "allow.txt"), "select.ft1.deny": str(copy / "deny.txt")}
    prepare(settings_of(copy, **lists, **{"select.ft1.where": "[area > 99999999]"}), "select")
    table = pq.read_table(copy / "data/set/select_ft1.parquet").to_pydict()
    assert table["key"] == ["booru:2"]
    assert table["why"] == ["allow"]


def test_one_more_image_never_reshuffles_the_rest(copy: Path) -> None:
    quota = {"select.ft1.quota": "{by: rating, shares: {g: 0.5, s: 0.5}, total: 8}", "select.ft1.where": "[]"}
    prepare(settings_of(copy, **quota), "select")
    before = pq.read_table(copy / "data/set/select_ft1.parquet").to_pydict()["key"]
    write_posts(copy / "pictures", 3, first=200)
    prepare(settings_of(copy, **quota))
    after = pq.read_table(copy / "data/set/select_ft1.parquet").to_pydict()["key"]
    assert len(before) == len(after) == 8
    assert len(set(before) & set(after)) >= 5  # each new image takes at most one place


def test_hard_exclusions_cannot_be_brought_back(copy: Path) -> None:
    post = json.loads((copy / "pictures/8.json").read_text())
    post["tag_string_general"] += " loli"
    (copy / "pictures/8.json").write_text(json.dumps(post))
    (copy / "allow.txt").write_text("booru:8\n")
    prepare(settings_of(copy, **{"select.ft1.allow": str(copy / "allow.txt")}))
    for stage in ("pretrain", "ft1"):
        index = Index.open(copy / "data/set", stage)
        assert "booru:8" not in {index.key(i) for i in range(len(index))}
    facts = json.loads((copy / "data/set/report.json").read_text())
    assert facts["hard_exclusions"] == {"R1": {"loli": 1}}
    shown = {"samples": facts["samples"], "duplicates": facts["duplicates"], "crop": facts["crop"], "sizes": facts["sizes"]}
    assert "booru:8" not in json.dumps(shown) + (copy / "data/set/report.html").read_text()
    assert "booru:8" not in set(pq.read_table(next((copy / "data/set/probe").glob("*.parquet")))["key"].to_pylist())


def test_odd_files_are_all_reported(tmp_path: Path) -> None:
    """One pass over every odd file: each bad one in quarantine with its reason, each good one in the index."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    wanted = {}
    odd = [case for case in cases() if is_image(case[0])]  # other names are no pictures to a sidecar folder
    assert len(odd) >= 60
    for number, (name, data, reason) in enumerate(odd):
        (folder / f"{number:03d}-{name}").write_bytes(data)
        (folder / f"{number:03d}-{name}").with_suffix(".txt").write_text("1girl ||| smile, solo")
        wanted[f"odd:{number:03d}-{name}"] = reason
    write_vae(tmp_path / "vae")
    (tmp_path / "dataset.yaml").write_text(
        f"sources:\n  - {{name: odd, adapter: sidecar, path: {folder}, assume_rating: g}}\nselect:\n  pretrain: {{min_bucket: 1}}\n"
    )
    settings = settings_of(tmp_path)
    prepare(settings)
    rows = pq.read_table(tmp_path / "data/set/quarantine.parquet").to_pylist()
    errors = {row["key"]: row["reason"] for row in rows if row["kind"] == "error"}
    others = {row["key"]: row["reason"] for row in rows if row["reason"] == "not_a_picture"}
    assert errors | others == {key: reason for key, reason in wanted.items() if reason is not None}
    assert all(row["key"].removeprefix("odd:") in row["message"] for row in rows if row["kind"] == "error"), "each path"
    assert set(errors.values()) <= set(ErrorReason.__args__)  # type: ignore[attr-defined]
    index = Index.open(tmp_path / "data/set", "pretrain")
    left = {index.key(i) for i in range(len(index))} | {row["key"] for row in rows}
    assert left == set(wanted)
    strict = settings_of(tmp_path, max_quarantine_fraction=0.02)
    with pytest.raises(Complaint, match=r"max_quarantine_fraction 0\.02"):
        prepare(strict, "probe")


def test_report_names_the_broken_limit(copy: Path) -> None:
    limits = {"report.fail_if.masterpiece": 0.0, "policy.quality.min_group": 1, "report.pictures": "none"}
    with pytest.raises(Complaint, match=r"report\.fail_if\.masterpiece: .* > 0 ") as complaint:
        prepare(settings_of(copy, **limits), "report")
    assert complaint.value.code == ExitCode.MISMATCH
    page = (copy / "data/set/report.html").read_text()
    assert "1 limit broken" in page
    assert 'src="data:image' not in page
    assert '"thumb": "' not in page
    shard = next((copy / "data/set/latents").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(Complaint, match="unreadable_latents"):
        prepare(settings_of(copy), "report")


def test_report_says_what_a_missing_rating_counts_as(copy: Path) -> None:
    assert "<td>booru</td><td class=\"n\">31</td><td>explicit</td>" in (copy / "data/set/report.html").read_text()
    text = copy / "dataset.yaml"
    text.write_text(text.read_text().replace("adapter: danbooru", "adapter: danbooru, assume_rating: s"))
    prepare(settings_of(copy))
    assert json.loads((copy / "data/set/report.json").read_text())["counts"]["assume_rating"] == {"booru": "s"}
    assert "<td>booru</td><td class=\"n\">31</td><td>s</td>" in (copy / "data/set/report.html").read_text()


def test_hostile_text_is_shown_as_text(copy: Path) -> None:
    post = json.loads((copy / "pictures/0.json").read_text())
    post["tag_string_general"] += " <img/src=x/onerror=alert(1)> &amp;"
    (copy / "pictures/0.json").write_text(json.dumps(post))
    prepare(settings_of(copy))
    page = (copy / "data/set/report.html").read_text()
    assert "<img/src" not in page
    assert "&lt;img/src=x/onerror" in page


def test_show_dataset(made: Path) -> None:
    facts = report(made / "data/set")
    assert facts["stages"]["pretrain"]["images"] == COUNT
    assert sum(facts["stages"]["pretrain"]["buckets"].values()) == COUNT
    assert facts["stages"]["ft1"]["fingerprint"] == Index.open(made / "data/set", "ft1").fingerprint
    with pytest.raises(Halt, match="not a prepared dataset"):
        report(made)
