"""What of a run or a prepared set is published, and what never is: no training picture, no page that holds one, no private path."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.base.secrets import mask_settings
from train.observe.runs import Picture, read_pictures, read_run
from train.recipe.exclusions import EXCLUSIONS_VERSION
from train.storage import tensor_files
from train.tools.publish import captions

MOST_PICTURES = 12
# Of a prepared set. Its records, tags and probes hold paths and file names; report.html holds pictures.
_OF_A_SET = ("dataset.json", "index*.parquet", "index*.arrow", "select_*.parquet", "labels/*", "latents/*.safetensors", "masks/*.safetensors")
_COMMIT = re.compile(r"\b[0-9a-f]{40}\b")  # a code revision looks like a key
_REWRITTEN = ("training.yaml", "lineage.json")


@dataclass
class Publication:
    """Files by their name on the page; a file is a path, or bytes made here."""

    kind: Literal["model", "adapter", "dataset"]
    source: Path
    stage: str
    license: str = ""
    files: dict[str, Path | bytes] = field(default_factory=dict)
    pictures: list[tuple[str, Picture, bool]] = field(default_factory=list)  # name on the page, what it was asked for, whether that may be told
    notes: list[str] = field(default_factory=list)

    @property
    def repository_type(self) -> str:
        """As the hub calls it."""
        return "dataset" if self.kind == "dataset" else "model"


def gather(what: Path, samples: Path | None) -> Publication:
    """What is published of a finished run, or a folder of new.py that holds one, or a prepared set; its card is still missing.

    Raises Halt: USAGE (neither), MISMATCH (not finished, or what no run of ours left).
    """
    if (what / "run" / "lineage.json").is_file():
        what, samples = what / "run", samples or (what / "samples" / "after" if (what / "samples" / "after").is_dir() else None)
    if (what / "dataset.json").is_file():
        if samples is not None:
            raise Halt(ExitCode.USAGE, f"--samples is of runs, and {what} is a prepared set: a set has no pictures on its page")
        return _set(what)
    if not (what / "lineage.json").is_file():
        raise Halt(ExitCode.USAGE, f"{what} is neither a finished run (lineage.json) nor a prepared set (dataset.json)")
    if not (what / "DONE").is_file():
        raise Halt(ExitCode.MISMATCH, f"{what} is not finished (no DONE): run that stage to its end")
    found = _run(what)
    _add_pictures(found, samples)
    return found


def _run(what: Path) -> Publication:
    record = read_json(what / "lineage.json") or {}
    stage = str(record.get("stage") or what.name)
    files: dict[str, Path | bytes] = {}
    if (what / "model").is_dir():
        files |= {path.relative_to(what / "model").as_posix(): path for path in sorted((what / "model").rglob("*")) if path.is_file()}
    lora = {path.name: path for path in sorted((what / "lora").glob("*")) if path.is_file()} if (what / "lora").is_dir() else {}
    files |= {(f"lora/{name}" if "model_index.json" in files else name): path for name, path in lora.items()}
    for name in (f"{stage}.safetensors", f"{stage}-ema.safetensors", f"{stage}-lora.safetensors", f"{stage}-ema-lora.safetensors"):
        if (what / name).is_file():
            files[name] = what / name
    kind: Literal["model", "adapter"] = "model" if "model_index.json" in files else "adapter"
    wanted = f"{stage}.safetensors" if kind == "model" else f"{stage}-lora.safetensors"
    if wanted not in files:
        raise Halt(ExitCode.MISMATCH, f"{what} holds no {wanted}: its export is gone. Remove {what / 'DONE'} and start the stage again, which makes it anew")
    found = Publication(kind, what, stage, files=files)
    found.files.setdefault("lineage.json", what / "lineage.json")
    for name in [name for name in found.files if name.rpartition("/")[2] in _REWRITTEN]:
        found.files[name] = _without_private(Path(str(found.files[name])))
    if kind == "adapter" and "ss_tag_frequency" in tensor_files.open_file(what / wanted).metadata:
        found.notes.append(f"{wanted} tells how often each tag was trained (ss_tag_frequency), as kohya's files do")
    return found


def refuse_unchecked(what: Path) -> dict[str, Any]:
    """`dataset.json` of a set; Halt(MISMATCH) where today's hard exclusions have not seen what it holds."""
    said = read_json(what / "dataset.json") or {}
    if said.get("hard_exclusion_version") != EXCLUSIONS_VERSION:
        raise Halt(ExitCode.MISMATCH, f"{what} was looked through by an earlier version of the hard exclusions: run scripts/prepare.py all again, which renews its tables")
    return said


def _set(what: Path) -> Publication:
    said = refuse_unchecked(what)
    files = {path.relative_to(what).as_posix(): path for form in _OF_A_SET for path in sorted(what.glob(form)) if path.is_file()}
    files = {name: path for name, path in files.items() if not path.name.startswith(".")}
    found = Publication("dataset", what, str(said.get("name") or what.name), files={**files, "dataset.json": _without_private(what / "dataset.json")})
    found.notes.append("latents can be turned back into pictures by their VAE, and labels are captions: publish only what you may pass on")
    if left := sorted({path.name for path in what.iterdir()} - {name.partition("/")[0] for name in files}):
        found.notes.append(f"left out: {', '.join(left)}")
    return found


def _add_pictures(found: Publication, samples: Path | None) -> None:
    """The newest whole preview, or what sample.py drew into a folder, without what PNGs say beside their pixels."""
    if samples is not None and not samples.is_dir():
        raise Halt(ExitCode.USAGE, f"--samples {samples} is no folder")
    run = read_run(found.source)
    pictures = run.newest_pictures() if samples is None else read_pictures(samples, found.notes)
    drawn = [picture for picture in pictures if "Steps" in picture.facts]
    if len(drawn) < len(pictures):
        found.notes.append(f"{len(pictures) - len(drawn)} pictures were drawn by no sampler, so they stay here: a training picture is never published")
    if len(drawn) > MOST_PICTURES:
        found.notes.append(f"{len(drawn) - MOST_PICTURES} more pictures were drawn than a page shows")
    shown = drawn[:MOST_PICTURES]
    if not shown:
        return
    folder, stage = str(run.config.get("data.path", "")), run.config.get("data.select") or found.stage
    secret = captions.given_away([picture.prompt for picture in shown], Path(folder), str(stage))
    if secret is None:
        found.notes.append(f"prompts are left out: the set is not at {folder or '?'}, so nobody can tell which of them are its captions")
    elif secret:
        found.notes.append(f"{len(secret)} prompts are captions of the set, so their pictures stand without words")
    for number, picture in enumerate(shown, 1):
        name = f"samples/{number:02d}.png"
        found.files[name] = _pixels(picture.path)
        found.pictures.append((name, picture, secret is not None and picture.prompt not in secret))


def _pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        image.info.clear()  # its text names the model's path and every setting
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
    return buffer.getvalue()


def _without_private(path: Path) -> bytes:
    """A record or a config of ours without secrets, and of paths that say where things lie on this machine only the last name."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":  # its texts were masked when it was written, and it holds a commit, which looks like a key
        return (json.dumps(_cleaned(json.loads(text)), indent=2, ensure_ascii=False) + "\n").encode()
    return yaml.safe_dump(mask_settings(_cleaned(yaml.safe_load(text))), sort_keys=False, allow_unicode=True, width=10**6).encode()


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    if not isinstance(value, str):
        return value
    place = Path(value)
    private = place.is_absolute() or value.startswith("~") or ".." in place.parts
    return place.name if private and "\n" not in value else value


def refuse_private(found: Publication) -> None:
    """Halt(MISMATCH) naming a text or a file's metadata that still tells of this machine. The last look before anything is sent."""
    here = {Path.home(), *(one for one in (Path.cwd(), found.source.resolve(), found.source.resolve().parent) if len(one.parts) > 2)}
    private = [re.compile(rf"(?<![\w.-]){re.escape(str(place))}(?![\w.-])") for place in here if len(place.parts) > 1]
    for name, content in found.files.items():
        texts = []
        if name.endswith((".json", ".yaml", ".md")) and not name.startswith("tokenizer"):
            data = content if isinstance(content, bytes) else content.read_bytes()
            texts = [data.decode("utf-8", "replace")]
        elif name.endswith(".safetensors") and isinstance(content, Path):
            texts = list(tensor_files.open_file(content).metadata.values())
        for text in texts:
            if told := [match[0] for pattern in private if (match := pattern.search(text))]:
                raise Halt(ExitCode.MISMATCH, f"{name} would tell of {told[0]} on this machine: nothing is published")
            text = _COMMIT.sub("", text)
            if mask_settings(text) != text:
                raise Halt(ExitCode.MISMATCH, f"{name} holds what looks like a secret: nothing is published")
