"""Latents of sd-scripts: taken over bit for bit where they fit, encoded anew and told where they do not."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from oddimages import drawn, encoded
from PIL import Image
from preparedset import prepare, settings_of, write_vae

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, SourceConfig
from train.data.index import Index
from train.data.shards import ShardReader
from train.prepare.encoding.npz import Unusable, imported

SIZE, BUCKET = (120, 72), (160, 96)  # every picture's, and the one it gets


class Canary:
    """Unpickling this would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def latents(seed: int, bucket: tuple[int, int] = BUCKET) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, bucket[1] // 8, bucket[0] // 8)).astype(np.float32)


def save(path: Path, values: np.ndarray, size: tuple[int, int] = SIZE, suffix: str = "", **more: Any) -> None:
    """As sd-scripts writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"latents": values, "original_size": np.array(size), "crop_ltrb": np.array([0, 0, 160.0, 96.0])}
    np.savez(path, **{f"{name}{suffix}": array for name, array in arrays.items()}, **more)


def source(root: Path) -> SourceConfig:
    return SourceConfig(name="mine", adapter="sd_scripts", path=str(root / "meta.json"), images=str(root), npz_vae="v")


def fact(uri: str = "a.png", **changes: Any) -> dict[str, Any]:
    plain = {"uri": uri, "member": None, "width": 120, "height": 72, "has_alpha": False, "exif_orientation": None}
    return plain | changes


@pytest.mark.parametrize("name", ["a.b.npz", "a.b_0120x0072_sdxl.npz"])
def test_both_namings_give_the_values_written(tmp_path: Path, name: str) -> None:
    save(tmp_path / "sub" / name, latents(1), latents_flipped=latents(2), alpha_mask=np.ones((96, 160)))
    found = imported(source(tmp_path), fact("sub/a.b.png"), BUCKET, "fp16")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, latents(1))


def test_a_file_of_several_resolutions_gives_the_bucket_s(tmp_path: Path) -> None:
    more = {"latents_8x8": latents(3, (64, 64)), "original_size_8x8": np.array(SIZE)}
    save(tmp_path / "a.npz", latents(1), suffix="_12x20", **more)
    found = imported(source(tmp_path), fact(), BUCKET, "fp16")
    np.testing.assert_array_equal(found, latents(1))  # type: ignore[arg-type]


def test_without_a_declared_vae_or_a_file_nothing_is_taken(tmp_path: Path) -> None:
    assert imported(source(tmp_path), fact(), BUCKET, "fp16") is None
    save(tmp_path / "a.npz", latents(1))
    undeclared = SourceConfig(name="mine", adapter="sd_scripts", path=str(tmp_path))
    assert imported(undeclared, fact(), BUCKET, "fp16") is None
    assert imported(source(tmp_path), fact(member="x"), BUCKET, "fp16") is None


def _forged(kind: str, path: Path, canary: Path) -> None:
    """A .npz that is not what it should be."""
    values = latents(1)
    match kind:
        case "nan":
            values[0, 0, 0] = np.nan
            save(path, values)
        case "too large for fp16":
            values[0, 0, 0] = 1e5
            save(path, values)
        case "other bucket":
            save(path, latents(1, (96, 160)))
        case "other picture":
            save(path, values, size=(240, 180))
        case "cut off":
            save(path, values)
            path.write_bytes(path.read_bytes()[:-500])
        case "empty":
            path.write_bytes(b"")
        case "flipped bit":
            save(path, values)
            data = bytearray(path.read_bytes())
            data[600] ^= 1
            path.write_bytes(bytes(data))
        case "text outputs":
            np.savez(path, hidden_state1=values)
        case "first release":
            np.savez(path, arr_0=values)
        case "pickle":
            objects = np.empty(1, dtype=object)
            objects[0] = Canary(canary)
            np.savez(path, latents=objects, original_size=np.array(SIZE))
        case "raw pickle":
            path.write_bytes(pickle.dumps(Canary(canary)))
        case "bomb":
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (4, 1 << 24)})
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("original_size.npy", b"")
                archive.writestr("latents.npy", head.getvalue() + bytes(1 << 28))
        case "forged shape":
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("original_size.npy", head.getvalue())
                archive.writestr("latents.npy", head.getvalue())
        case "integers":
            save(path, values.astype(np.int32))


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("nan", "finite"), ("too large for fp16", "finite"), ("other bucket", "96x160, ours is 160x96"),
        ("other picture", "another size"), ("cut off", ""), ("empty", ""), ("flipped bit", ""),
        ("text outputs", "no array `latents`"), ("first release", "no array `latents`"), ("pickle", ""),
        ("raw pickle", ""), ("bomb", ""), ("forged shape", ""), ("integers", "int32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_never_executed(tmp_path: Path, kind: str, word: str) -> None:
    _forged(kind, tmp_path / "a.npz", tmp_path / "canary")
    found = imported(source(tmp_path), fact(), BUCKET, "fp16")
    assert isinstance(found, Unusable), kind
    assert found.name == "a.npz" and word in found.why and found.why
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("change", "word"), [({"exif_orientation": 6}, "EXIF"), ({"has_alpha": True}, "transparent")])
def test_what_sd_scripts_reads_otherwise_is_encoded_anew(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    save(tmp_path / "a.npz", latents(1))
    found = imported(source(tmp_path), fact(**change), BUCKET, "fp16")
    assert isinstance(found, Unusable) and word in found.why


def test_a_link_out_of_the_source_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "other" / "a.npz", latents(1))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.npz").symlink_to(tmp_path / "other" / "a.npz")
    found = imported(source(tmp_path / "root"), fact(), BUCKET, "fp16")
    assert isinstance(found, Unusable) and "leaves the source root" in found.why


COUNT = 8


def _user_folder(folder: Path) -> dict[str, int]:
    """What a user of sd-scripts owns: pictures, metadata with relative and full keys, .npz for most; name -> seed."""
    root = folder / "pictures"
    root.mkdir(parents=True)
    meta, seeds = {}, {}
    for number in range(COUNT):
        picture = drawn(*SIZE, seed=number)
        (root / f"{number}.png").write_bytes(encoded(picture, "PNG"))
        key = str(root / f"{number}.png") if number % 2 else str(number)
        meta[key] = {"tags": f"1girl, ||| tag {number}, smile", "caption": "", "train_resolution": list(BUCKET)}
        if number < 5:
            name = f"{number}.npz" if number % 2 else f"{number}_0120x0072_sdxl.npz"
            save(root / name, latents(number))
            seeds[f"mine:{number}.png"] = number
    Image.fromarray(np.zeros((72, 120, 4), np.uint8)).save(root / "7.png")
    save(root / "7.npz", latents(7))  # transparent: not taken
    (root / "meta.json").write_text(json.dumps(meta))
    return seeds


def _settings(folder: Path, **overrides: Any) -> DatasetConfig:
    text = folder / "dataset.yaml"
    root = folder / "pictures"
    text.write_text(
        f"sources:\n  - {{name: mine, adapter: sd_scripts, path: {root}/meta.json, images: {root}, assume_rating: g,"
        f" npz_vae: {overrides.pop('npz_vae', 'null')}}}\nselect:\n  pretrain: {{min_bucket: 2}}\n"
    )
    return settings_of(folder, **overrides)


@pytest.mark.slow
def test_a_dataset_takes_them_over_and_encodes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = _user_folder(tmp_path)
    vae = write_vae(tmp_path / "vae")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "pictures").iterdir())}
    prepare(_settings(tmp_path))
    dataset = tmp_path / "data/set"
    encoded_anew = _stored(dataset)
    prepare(_settings(tmp_path, npz_vae=vae))
    out = capsys.readouterr().out
    assert "5 taken over from .npz" in out and "1 .npz not taken, encoded instead: transparent" in out
    stored = _stored(dataset)
    assert len(stored) == COUNT
    for key, values in stored.items():
        wanted = latents(seeds[key]).astype(np.float16).astype(np.float32) if key in seeds else encoded_anew[key]
        np.testing.assert_array_equal(values, wanted)
    table = pq.read_table(dataset / "index.parquet").to_pylist()
    assert {row["key"] for row in table if row["preproc_hash"] == "sd-scripts"} == set(seeds)
    state = json.loads((dataset / "dataset.json").read_text())
    assert state["latents"]["npz"]["images"] == 5
    assert str(tmp_path) not in (dataset / "dataset.json").read_text()
    assert before == {path: path.read_bytes() for path in sorted((tmp_path / "pictures").iterdir())}
    # another VAE than declared, and a kind of latents that .npz do not hold
    other = write_vae(tmp_path / "other")
    data = bytearray((other / "diffusion_pytorch_model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "diffusion_pytorch_model.safetensors").write_bytes(bytes(data))
    with pytest.raises(Halt, match="two VAEs do not mix") as error:
        prepare(_settings(tmp_path, npz_vae=other), "latents")
    assert error.value.code == ExitCode.MISMATCH
    with pytest.raises(Halt, match="needs latents"):
        _settings(tmp_path, npz_vae=vae, **{"latents.content": "mean"})


def _stored(dataset: Path) -> dict[str, np.ndarray]:
    index, reader = Index.open(dataset, "pretrain"), ShardReader(dataset)
    return {
        index.key(row): reader.read([index.latent(row)[0]], [index.latent(row)[1]])[0].numpy() for row in range(len(index))
    }
