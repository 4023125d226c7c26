"""The weights that a stage starts from, on this machine and pinned: the recipe's own, a model of the hub, an address."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, read_json
from train.base.secrets import mask
from train.storage import download, hub, revision, tensor_files
from train.storage.download import Wanted
from train.storage.hub import Fetched
from train.storage.revision import Name


@dataclass(frozen=True)
class Weight:
    """One of the recipe's own, and what is known of it."""

    name: Name
    license: str  # where its page is silent; docs/weights.md
    sha256: dict[str, str]
    said: str


# Commits and hashes as published lists of pins give them (docs/weights.md); None: nobody publishes them.
RECIPE = {
    "base": Weight(
        Name("cagliostrolab/animagine-xl-3.0-base", None, "animagine-xl-3.0-base.safetensors"), "", {},
        "commit and hash of the file that the released run started from were never published: this pins what main is today",
    ),
    "vae": Weight(
        Name("madebyollin/sdxl-vae-fp16-fix", "207b116dae70ace3637169f1ddd2434b91b3a8cd"), "MIT",
        {"diffusion_pytorch_model.safetensors": "1b909373b28f2137098b0fd9dbc6f97f8410854f31f84ddc9fa04b077b0ace2c"}, "",
    ),
}  # fmt: skip
WORDS = (*RECIPE, "tokenizers")


def fetch(what: str, out: Path) -> list[str]:
    """Fetch one of `WORDS`, `owner/name[@revision][:file]` or an address into `out`; lines that say what lies where.

    Raises Halt: USAGE (no such form), MISMATCH (unknown, gated, unreachable, another hash than pinned), CANNOT_WRITE.
    """
    if what == "tokenizers":
        return [*_told(_tokenizers(out), out)]
    if what in RECIPE:
        weight = RECIPE[what]
        return [*_told(_by_name(weight.name, out, weight.sha256), out, weight.license), *([f"note: {weight.said}"] if weight.said else [])]
    name = revision.parse(what)
    if name is not None:
        return [*_told(_by_name(name, out, {}), out)]
    if what.startswith(("http://", "https://")):
        return [*_told(_address(what, out), out)]
    ways = "owner/name, owner/name@REVISION, owner/name@REVISION:FILE, or an address"
    raise Halt(ExitCode.USAGE, f"{what} is neither {', '.join(WORDS)} nor {ways}")


def _by_name(name: Name, out: Path, known: dict[str, str]) -> Fetched:
    try:
        return hub.fetch(name, out, known)
    except Halt as halt:
        if halt.code != ExitCode.MISMATCH or "cannot be fetched" not in halt.message:
            raise
        raise Halt(halt.code, f"{halt.message} {hub.what_to_put(name, name.commit, 'model.init_from', out)}") from halt


def _tokenizers(out: Path) -> Fetched:
    """CLIP's, as they are shipped with this code: no network is asked."""
    from train.model import folder as model_folder

    place = out / "tokenizers"
    if not place.exists():
        with download.writing(out), model_folder.new_folder(place) as new:
            model_folder.write_tokenizers(None, new)
    hashes = {path.relative_to(place).as_posix(): file_sha256(path) for path in sorted(place.glob("tokenizer*/*"))}
    record = next(iter(revision.records(place)), None)
    if record is None:
        files = {file: {"bytes": (place / file).stat().st_size, "sha256": digest} for file, digest in hashes.items()}
        record = {"from": "shipped with anix", "file": None, "revision": None, "commit": None, "license": "MIT", "single": None, "files": files}
        revision.write_record(place, record)
    for file in record["files"]:
        hub.held(place / file, revision.said_of(record["files"], file).get("sha256"), place)
    return Fetched(place, str(record["from"]), None, "MIT", hashes)


# --- an address --------------------------------------------------------------------------------------


def _address(url: str, out: Path) -> Fetched:
    """One .safetensors file of any server; pinned by its sha256 alone."""
    shown = mask(url)
    with hub.alone(out):
        for record in revision.records(out):
            if record.get("from") == shown and (file := out / str(record.get("single"))).is_file():
                digest = hub.held(file, revision.said_of(record["files"], file.name).get("sha256"), out)
                return Fetched(file, shown, None, record.get("license"), {file.name: digest})
        name, wanted = _asked(url)
        target = out / name
        if target.exists():
            raise Halt(ExitCode.USAGE, f"{target} is there already, from elsewhere: choose another folder with --out")
        hub.refuse_too_large(shown, wanted.size_bytes or 0, out)
        digest = download.bring(url, target, wanted)
        try:
            metadata = tensor_files.open_file(target).metadata
        except Halt:
            target.unlink()
            raise
        stated = metadata.get("modelspec.license") or None
        listed = {"bytes": target.stat().st_size, "sha256": digest}
        revision.write_record(
            out, {"from": shown, "file": None, "revision": None, "commit": None, "license": stated, "single": name, "files": {name: listed}}
        )
        return Fetched(target, shown, None, stated, {name: digest})


def _asked(url: str) -> tuple[str, Wanted]:
    """Name and length of what lies there, and the mark by which a second start knows it again. No token of the hub's goes along."""
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().head(url, follow_redirects=True, timeout=15)
    except Exception as error:  # each HTTP library raises its own, and which one the hub's client uses changes
        raise download.unreachable(url, error) from error
    headers = answer.headers if answer.status_code < 400 else {}  # some servers answer to GET alone
    told = re.search(r"filename\*?=(?:UTF-8'')?\"?([^\";]+)", headers.get("content-disposition", ""))
    name = PurePosixPath(unquote(told[1] if told else urlsplit(url).path)).name
    if not re.fullmatch(r"\w[\w .()+-]*\.safetensors", name):
        raise Halt(ExitCode.USAGE, f"{mask(url)} names no .safetensors file ({name or 'no name'}): give the address of the file itself")
    length = headers.get("content-length", "")
    mark = headers.get("etag") or headers.get("last-modified")
    return name, Wanted(int(length) if length.isdigit() else None, mark=hashlib.sha256(mark.encode()).hexdigest() if mark else None)


# --- what is said ------------------------------------------------------------------------------------


def _told(got: Fetched, out: Path, known_license: str = "") -> Iterator[str]:
    """Lines of one fetch, those to paste last."""
    yield f"{got.source}{f'@{got.commit}' if got.commit else ''} -> {got.place}"
    width = max(map(len, got.sha256))
    for file, digest in sorted(got.sha256.items()):
        yield f"  {file:<{width}}  sha256 {digest}"
    stated = got.license or known_license
    yield f"  licence: {stated or 'its page states none; look there before you pass on what is made of it'}"
    yield from (f"  note: {note}" for note in got.notes)
    yield from (f"  {line}" for line in _lines_to_paste(got))


def _lines_to_paste(got: Fetched) -> Iterator[str]:
    config = read_json(got.place / "config.json") or {} if got.place.is_dir() else {}
    weights = [digest for file, digest in got.sha256.items() if file.endswith(".safetensors")]
    if got.place.name == "tokenizers":
        yield f"tokenizers: {got.place}  # in dataset.yaml"
    elif config.get("_class_name") == "AutoencoderKL":
        yield f"model.vae={got.place} model.vae_sha256={weights[0]}"
    elif got.place.is_file():
        yield f"model.init_from={got.place} model.init_sha256={weights[0]}"
    elif (got.place / "model_index.json").is_file():
        yield f"model.init_from={got.place} model.init_sha256={_of_folder(got.place)}"


def _of_folder(place: Path) -> Any:
    from train.model.source import model_sha256

    return model_sha256(place)
