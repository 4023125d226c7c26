"""Models of the hub: what a name means, where its files lie on this machine, and getting them at one commit.

`revision.json` beside what was fetched says from where, at which commit and with which sha256; whoever opens a model by
`owner/name@<commit>` finds it by that file, or in the cache of the hub's own library, before any network is asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, free_bytes
from train.storage import download
from train.storage.download import Wanted
from train.storage.revision import (
    REVISION,
    Name,
    commit_in,
    endpoint,
    fetched_before,
    is_commit,
    parse,
    place,
    said_of,
    target,
    write_record,
)

log = logging.getLogger("anix")
MODELS = Path("models")  # where what is fetched lies, unless --out says otherwise
_OURS = ("runs", "data", "models")  # folders that our own configs name
_TIMEOUT_S = 15.0
LIMIT_BYTES = 40 * 10**9  # of one download; SDXL in fp32 is 14 GB
_NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae")
_PARTS = (*_NETWORKS, "tokenizer", "tokenizer_2", "scheduler")
_TEXTS = (".json", ".txt", ".csv")
_STANDARD = ("diffusion_pytorch_model.safetensors", "model.safetensors", "model.onnx")  # one network's weights, where several files lie


@dataclass(frozen=True)
class Fetched:
    """What lies on this machine, checked."""

    place: Path  # folder of a model or a network, or the one file
    source: str  # owner/name, or the address
    commit: str | None  # None: an address has none, its sha256 pins it
    license: str | None  # as its page states it
    sha256: Mapping[str, str]  # by path within the folder of revision.json
    notes: tuple[str, ...] = field(default=())


def resolve(text: str, key: str = "model.init_from", out: Path = MODELS) -> tuple[Path, str]:
    """(folder or single file, commit) of a model by name: without a network where it lies here, else fetched into `out`.

    Raises Halt: USAGE (no such form of a name), MISMATCH (unknown, gated, not reachable: says which file to put where),
    CANNOT_WRITE.
    """
    name = parse(text)
    if name is None:
        raise Halt(ExitCode.USAGE, f"{key} {text}: a model of the hub is named owner/name@<40-digit commit>, or owner/name@<commit>:<file> of it")
    commit = name.commit or known_commit(name, out)
    if commit is not None and (here := local(name, commit, out)) is not None:
        return here, commit
    try:
        got = fetch(name if commit is None else Name(name.repository, commit, name.file), out)
    except Halt as halt:
        if halt.code != ExitCode.MISMATCH:
            raise
        raise Halt(halt.code, f"{key} {halt.message} {what_to_put(name, commit, key, out)}") from halt
    return got.place, str(got.commit)


def named(text: str) -> Name | None:
    """The hub's model that `text` names; None for another form, or for what is rather a local path that is not there.

    The hub is not asked about those.
    """
    name, first = parse(text), text.partition("/")[0]
    local = first in _OURS or Path(first).is_dir() or (name is not None and name.file is None and text.endswith(".safetensors"))
    return None if local and "@" not in text else name


def line_with_commit(text: str, key: str) -> str | None:
    """`key=owner/name@<commit>` for a name without its commit, as far as this machine or the hub knows it; None for no name."""
    if (name := named(text)) is None:
        return None
    commit = known_commit(name, MODELS)
    if commit is None:
        with contextlib.suppress(Exception):  # no network, no such model: the line goes without
            commit = _info(name).sha
    return f"{key}={name.at(commit or '<40-digit commit>')}"


def known_commit(name: Name, out: Path = MODELS) -> str | None:
    """The commit that stands for a name on this machine: what was fetched, else what the library's cache says."""
    for _, record in fetched_before(name, out):
        if (name.revision or "main") in (record.get("revision"), record.get("commit")):
            return commit_in(record)
    ref = _cache(name) / "refs" / (name.revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    return commit if is_commit(commit) else None


def local(name: Name, commit: str, out: Path = MODELS) -> Path | None:
    """Where the model lies at this commit, whole; None where it does not."""
    for folder, record in fetched_before(name, out):
        files = record["files"]
        if record.get("commit") == commit and all(said_of(files, file).get("sha256") and target(folder, record, file).is_file() for file in files):
            return place(folder, record)
    snapshot = _cache(name) / "snapshots" / commit
    try:
        files = choose(name, [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()])
    except Halt:
        return None
    if (single := _single(files)) is not None:
        return snapshot / single
    return snapshot if any(file.endswith((".safetensors", ".onnx")) for file in files) else None


def _cache(name: Name) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.repository.replace('/', '--')}"


def fetch(name: Name, out: Path = MODELS, known: Mapping[str, str] | None = None) -> Fetched:
    """The model's files under `out`, at one commit, hashes checked; what is there already is checked and not sent again.

    `known`: sha256 that files of it must have, by name. Raises the Halts of `resolve`.
    """
    if fetched_before(name, out):
        with alone(out):
            folder, record = fetched_before(name, out)[0]
            return _again(name, folder, record, known or {})
    info = _info(name)  # asked before anything is made here
    files = choose(name, [file.rfilename for file in info.siblings or []])
    with alone(out):
        for folder, record in fetched_before(name, out):  # by a process that was here first
            return _again(name, folder, record, known or {})
        single = PurePosixPath(only).name if (only := _single(files)) is not None else None
        folder = out if single else out / name.short
        if (folder / (single or REVISION)).exists():
            raise Halt(ExitCode.USAGE, f"{folder / (single or REVISION)} is there already, from elsewhere: choose another folder with --out")
        listed = {file.rfilename: _listed(file) for file in info.siblings or [] if file.rfilename in files}
        record = {
            "from": name.repository, "file": name.file, "revision": name.revision or "main", "commit": info.sha,
            "license": _license(info), "single": single, "files": listed,
        }  # fmt: skip
        return _complete(name, folder, record, known or {})


def _again(name: Name, folder: Path, record: dict[str, Any], known: Mapping[str, str]) -> Fetched:
    """A second fetch: the pinned commit, whatever the branch says today; what is missing is brought, the rest held to its hash."""
    commit, notes = commit_in(record), list[str]()
    if (wanted := name.commit) is None and (name.revision or "main") != record.get("revision"):
        wanted = _info(name).sha
    if wanted not in (None, commit):
        raise Halt(ExitCode.USAGE, f"{folder} holds {name.repository}@{commit}, pinned in {REVISION}: fetch @{wanted} into another folder with --out")
    if name.commit is None and wanted is None:
        with contextlib.suppress(Exception):  # no network is no fault here
            if (now := _info(name).sha) != commit:
                notes.append(f"{name.revision or 'main'} is {name.repository}@{now} today; {folder} stays @{commit}")
    got = _complete(name, folder, record, known)
    return Fetched(got.place, got.source, got.commit, got.license, got.sha256, (*notes, *got.notes))


def _complete(name: Name, folder: Path, record: dict[str, Any], known: Mapping[str, str]) -> Fetched:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    files, commit = dict(record["files"]), str(record["commit"])
    here = {file: target(folder, record, file) for file in sorted(files)}
    wanted = {file: _wanted(said_of(files, file), known.get(file)) for file in here}
    hashes = {file: _present(path, said_of(files, file).get("sha256"), wanted[file], folder) for file, path in here.items() if path.is_file()}
    missing = [file for file in here if file not in hashes]
    with download.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    need = sum(wanted[file].size_bytes or 0 for file in missing)
    refuse_too_large(name.at(commit), need, folder, sum(part.stat().st_size for part in folder.rglob(".*.part")))

    def note() -> None:
        write_record(folder, {**record, "files": {file: {**said_of(files, file), **({"sha256": hashes[file]} if file in hashes else {})} for file in here}})

    note()  # first: whoever starts again goes on with this commit, whatever the branch says then
    for file in missing:
        if (cached := _cache(name) / "snapshots" / commit / file).is_file():
            hashes[file] = _linked(cached, here[file], wanted[file])
        else:
            hashes[file] = download.bring(hf_hub_url(name.repository, file, revision=commit), here[file], wanted[file], build_hf_headers())
        note()
    return Fetched(place(folder, record), name.repository, commit, record.get("license"), hashes)


def _wanted(said: Mapping[str, Any], known_sha256: str | None) -> Wanted:
    listed = said.get("listed") or {}
    return Wanted(said.get("bytes"), known_sha256 or listed.get("sha256"), listed.get("git"))


def _present(file: Path, pinned_sha256: str | None, wanted: Wanted, folder: Path) -> str:
    """sha256 of a file that is there: fetched before, or by another hand and then the hub's own."""
    if pinned_sha256 is not None:
        return held(file, pinned_sha256, folder)
    digest = file_sha256(file)
    if said := download.unlike(file, digest, wanted):
        raise Halt(ExitCode.MISMATCH, f"{file} is there already and is not the hub's, it holds {said}: choose another folder with --out, or remove it")
    return digest


def held(file: Path, pinned_sha256: str | None, folder: Path) -> str:
    """sha256 of a file that was fetched before. Halt(MISMATCH) where it is not the one that was pinned then."""
    digest = file_sha256(file)
    if pinned_sha256 is not None and digest != pinned_sha256:
        raise Halt(
            ExitCode.MISMATCH,
            f"{file} has sha256 {digest}, {folder / REVISION} says {pinned_sha256}: it was changed since it was fetched. "
            "Remove it and fetch again, or keep yours under another name",
        )
    return digest


def _linked(cached: Path, here: Path, wanted: Wanted) -> str:
    """A file of the library's cache: a second name where the disk allows, else a copy."""
    digest = file_sha256(cached)
    if wanted.sha256 is not None and digest != wanted.sha256:
        raise Halt(ExitCode.MISMATCH, f"{cached} has sha256 {digest}, the hub lists {wanted.sha256}: remove it and fetch again")
    with download.writing(here.parent):
        here.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(cached), here)
        except OSError:
            shutil.copyfile(cached, here)
    return digest


def refuse_too_large(what: str, need_bytes: int, folder: Path, have_bytes: int = 0) -> None:
    """Halt for a download beyond the limit (MISMATCH), or beyond the disk (CANNOT_WRITE), before a byte of it is asked for."""
    if need_bytes > LIMIT_BYTES:
        raise Halt(ExitCode.MISMATCH, f"{what} holds {need_bytes / 1e9:.0f} GB, too much for an SDXL model")
    if (free := free_bytes(folder)) < need_bytes - have_bytes:
        raise Halt(ExitCode.CANNOT_WRITE, f"{what} needs {need_bytes / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free: make room or choose --out")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """One process at a time: those of a run all ask for the same model."""
    with download.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".fetch.lock").open("a")
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _info(name: Name) -> Any:
    """What the hub knows of the model at that revision: its commit, files and licence. Raises Halt(MISMATCH)."""
    from huggingface_hub import HfApi

    page = f"{endpoint()}/{name.repository}"
    try:
        info = HfApi(endpoint=endpoint()).model_info(name.repository, revision=name.revision, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception as error:  # each HTTP library raises its own, and which one the hub's client uses changes
        raise download.unreachable(str(name), error, page=page) from error
    if not is_commit(info.sha):
        raise Halt(ExitCode.MISMATCH, f"{page} did not say which commit {name.revision or 'main'} is")
    return info


def _listed(file: Any) -> dict[str, Any]:
    if file.lfs is not None:
        return {"bytes": file.lfs.size, "listed": {"sha256": file.lfs.sha256}}
    return {"bytes": file.size, "listed": {"git": file.blob_id}}


def _license(info: Any) -> str | None:
    stated = {key: getattr(info.card_data, key, None) for key in ("license", "license_name")}
    name = stated["license_name"] if stated["license"] in (None, "other") else stated["license"]
    return str(name) if name else None


def choose(name: Name, files: Iterable[str]) -> list[str]:
    """The files of a model's page that are wanted. Halt(MISMATCH) where nothing there can be read, or two could be meant."""
    files = sorted(files)
    if name.file:
        if name.file in files:
            return [name.file]
        raise Halt(ExitCode.MISMATCH, f"{name.repository} has no file {name.file}; it has {', '.join(_models(files)) or 'no .safetensors'}")
    if "model_index.json" in files:
        return [file for file in files if wanted_of_folder(file)]
    top = [file for file in files if "/" not in file]
    if "config.json" in top:  # one network: a VAE, a judge, a tagger
        standard = [file for file in top if file in _STANDARD]
        weights = standard or [file for file in top if file.endswith((".safetensors", ".onnx"))]
        if weights:
            return [*weights, *(file for file in top if file.endswith(_TEXTS) or file == "README.md")]
    models = _models(top)
    if len(models) == 1:
        return models
    ways = "\n".join(f"  {name.at(name.revision)}:{file}" for file in models or _models(files))
    said = f"holds {len(models)} models; name one of them" if models else "holds no model that can be read (a diffusers folder or a .safetensors)"
    raise Halt(ExitCode.MISMATCH, f"{name} {said}{chr(10) if ways else ''}{ways}")


def _single(files: Sequence[str]) -> str | None:
    """The one file of a model that is nothing else."""
    return files[0] if len(files) == 1 and files[0].endswith(".safetensors") else None


def _models(files: Iterable[str]) -> list[str]:
    return [file for file in files if file.endswith(".safetensors")]


def wanted_of_folder(file: str) -> bool:
    """True for what an SDXL folder needs: configs, tokenizers, full-precision safetensors, the licence's README."""
    folder, _, name = file.rpartition("/")
    if not folder:
        return name in ("model_index.json", "README.md")
    return folder in _PARTS and (name.endswith((".json", ".txt")) or (name.endswith(".safetensors") and ".fp16." not in name))


def what_to_put(name: Name, commit: str | None, key: str, out: Path = MODELS) -> str:
    """For a machine without a network: which files to put where, and what to say then."""
    folder = out / name.short
    listed = [
        target(where, one, file) for where, one in fetched_before(name, out) for file in one["files"] if not target(where, one, file).is_file()
    ]
    at, page = name.at(commit or name.revision), f"{endpoint()}/{name.repository}"
    if name.file:
        put = out / PurePosixPath(name.file).name
        files = f"{page}/resolve/{commit or name.revision or 'main'}/{name.file} as {put}"
    elif listed:
        put, files = folder, f"of {page} what is missing here: {', '.join(map(str, listed))}"
    else:
        put = folder
        files = f"the files of {page} into {folder}/ (model_index.json and {', '.join(f'{part}/' for part in _PARTS)}; or its one .safetensors)"
    return (
        f"Without a network here: run `scripts/fetch.py {at}` where there is one and copy {out}/ with its {REVISION}; "
        f"or put {files}, and say {key}={put}"
    )
