"""Wheels for a machine without network: only what it lacks, one version each, checked to be complete and small."""

from __future__ import annotations

import email.parser
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from train.exits import ExitCode, Halt

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 60 * 2**20
# What a training run imports. Trackers, bitsandbytes and torchao only when configured; torch is never in the folder.
WANTED = ("diffusers", "transformers", "accelerate", "safetensors", "omegaconf", "pyarrow", "numpy", "pillow", "tqdm")
NEVER = {"torch", "triton", "torchvision"}
_PLATFORM = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}


@dataclass(frozen=True)
class Wheel:
    """One file of the folder."""

    path: Path
    name: str
    version: Version
    requires: tuple[Requirement, ...]


def read_have(path: Path) -> dict[str, Version]:
    """The target's packages from `pip list` (columns, freeze or JSON). Raises Halt(USAGE) for an unreadable file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Halt(ExitCode.USAGE, f"--have {path} cannot be read: {error.strerror}") from error
    found: dict[str, Version] = {}
    if text.lstrip().startswith("["):
        try:
            pairs = [(str(entry["name"]), str(entry["version"])) for entry in json.loads(text)]
        except (ValueError, KeyError, TypeError) as error:
            raise Halt(ExitCode.USAGE, f"--have {path} is no output of `pip list --format json`: {error}") from error
    else:
        pairs = [tuple(re.split(r"==|\s+", line.strip())[:2]) for line in text.splitlines() if line.strip()]  # type: ignore[misc]
    for name, version in (pair for pair in pairs if len(pair) == 2):
        try:
            found[canonicalize_name(name)] = Version(version)
        except InvalidVersion:
            continue  # the header of `pip list`, or its rule of dashes
    if not found:
        raise Halt(ExitCode.USAGE, f"--have {path} names no package: write it with `pip list` on the target machine")
    return found


def environment(python: str) -> dict[str, str]:
    """Marker values of the target: Linux, x86-64, CPython of that version."""
    return {key: str(value) for key, value in default_environment().items()} | _PLATFORM | {
        "python_version": python, "python_full_version": f"{python}.0", "platform_python_implementation": "CPython",
        "implementation_name": "cpython", "extra": "",
    }  # fmt: skip


def missing(requirements: Iterable[Requirement], have: Mapping[str, Version], python: str) -> list[Requirement]:
    """Requirements that apply to the target and that nothing in `have` meets."""
    env = environment(python)
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate(env)]
    return [r for r in wanted if not _met(r, have)]


def _met(requirement: Requirement, have: Mapping[str, Version]) -> bool:
    version = have.get(canonicalize_name(requirement.name))
    # A build such as 2.11.0+cu128 counts as 2.11.0; a nightly counts too, because it is what the machine has.
    return version is not None and requirement.specifier.contains(version.public, prereleases=True)


def read_wheel(path: Path) -> Wheel:
    """Name, version and requirements of a wheel file."""
    name, version, _, _ = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        meta = email.parser.Parser().parsestr(archive.read(member).decode("utf-8"))
    return Wheel(path, name, version, tuple(Requirement(text) for text in meta.get_all("Requires-Dist") or []))


def collect(
    out: Path, have_file: Path, python: str, extra: Sequence[str] = (), pins: Path | None = None
) -> list[Wheel]:
    """Download what the target lacks into `out`, then check it; the wheels, sorted by name.

    What the target has counts when it lies in pyproject's ranges; `pins`, a constraints file, decides only which
    version is fetched. Raises Halt(MISMATCH) naming what no wheel meets, two versions of one package, or the size when
    it is above 60 MiB; Halt(UNEXPECTED) when pip fails.
    """
    have = read_have(have_file)
    out.mkdir(parents=True, exist_ok=True)
    pinned = _pins(pins)
    queue = missing([*wanted(), *map(Requirement, extra)], have, python)
    done: dict[str, Wheel] = {}
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if name in NEVER:
            raise Halt(
                ExitCode.MISMATCH, f"the target needs {requirement}, which is too large to carry: install it there"
            )
        if name in done:
            continue
        done[name] = _download(_chosen(requirement, pinned.get(name), have.get(name)), out, python)
        queue += missing(done[name].requires, have, python)
    wheels = sorted((read_wheel(path) for path in out.glob("*.whl")), key=lambda wheel: wheel.name)
    check(wheels, have, python)
    return wheels


def _chosen(requirement: Requirement, pin: str | None, there: Version | None) -> Requirement:
    """What to fetch: the pinned version; in place of one the target has, none of a later major version than need be.

    The target's other packages rely on what is there, and `pip list` does not tell how: transformers 5.17 refuses a
    huggingface_hub of the next major version, which the pins would bring.
    """
    if there is None:
        return Requirement(pin) if pin else requirement
    if pin and any(Version(s.version).major == there.major for s in Requirement(pin).specifier):
        return Requirement(pin)
    same_major = Requirement(f"{requirement.name}{requirement.specifier & SpecifierSet(f'<{there.major + 1}')}")
    least = [Version(s.version) for s in requirement.specifier if s.operator in (">=", ">", "~=", "==")]
    if any(version.major > there.major for version in least):
        return Requirement(pin) if pin else requirement
    return same_major


def wanted() -> list[Requirement]:
    """What a training run imports, in the ranges of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [r for r in map(Requirement, project["dependencies"]) if canonicalize_name(r.name) in WANTED]


def _pins(path: Path | None) -> dict[str, str]:
    """Package to `name==version` of a constraints file."""
    if path is None:
        return {}
    if not path.is_file():
        raise Halt(ExitCode.USAGE, f"--pins {path} is no file")
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {canonicalize_name(Requirement(line).name): line for line in lines if line}


def _download(requirement: Requirement, out: Path, python: str) -> Wheel:
    before = set(out.glob("*.whl"))
    tags = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)] + ["manylinux2014_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
               python, *platforms, "--dest", str(out), str(requirement)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Halt(ExitCode.UNEXPECTED, f"pip could not download {requirement}: {last}")
    new = set(out.glob("*.whl")) - before
    name = canonicalize_name(requirement.name)
    found = [w for w in map(read_wheel, new or out.glob("*.whl")) if w.name == name]
    if not found:
        raise Halt(ExitCode.UNEXPECTED, f"pip downloaded no wheel of {requirement}")
    return found[0]


def check(wheels: Sequence[Wheel], have: Mapping[str, Version], python: str) -> None:
    """Raises Halt(MISMATCH) unless folder and target together meet every requirement, within the size limit."""
    names = [wheel.name for wheel in wheels]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Halt(ExitCode.MISMATCH, f"two versions of {', '.join(twice)} in the folder: empty it and start again")
    together = dict(have) | {wheel.name: wheel.version for wheel in wheels}
    gaps = [f"{wheel.name} needs {r}" for wheel in wheels for r in missing(wheel.requires, together, python)]
    if gaps:
        raise Halt(ExitCode.MISMATCH, f"not complete: {'; '.join(gaps)}")
    size = sum(wheel.path.stat().st_size for wheel in wheels)
    if size > LIMIT_BYTES:
        largest = max(wheels, key=lambda wheel: wheel.path.stat().st_size)
        raise Halt(
            ExitCode.MISMATCH,
            f"{size / 2**20:.1f} MiB of wheels, {LIMIT_BYTES / 2**20:.0f} allowed; the largest is {largest.path.name} "
            f"({largest.path.stat().st_size / 2**20:.1f} MiB)",
        )


def install_line(out: Path) -> str:
    """What to run on the target, in the folder above the wheels."""
    return f"pip install --no-index --no-deps --target site {out.name}/*.whl && export PYTHONPATH=$PWD/site:$PYTHONPATH"
