"""Wheels for a machine without network: what is missing, what is complete, what is too large. No download here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from train.exits import Halt
from train.tools import wheelhouse

HAVE = {"torch": Version("2.11.0+cu128"), "numpy": Version("2.4.1"), "filelock": Version("3.1")}


def wheel(folder: Path, name: str, version: str, requires: list[str], padding: int = 0) -> wheelhouse.Wheel:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    meta += "".join(f"Requires-Dist: {text}\n" for text in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", meta)
        archive.writestr("filler", b"\0" * padding)
    return wheelhouse.read_wheel(path)


def test_pip_list_in_three_forms(tmp_path: Path) -> None:
    forms = (
        "Package    Version\n---------- -------\ntorch      2.11.0+cu128\nTyping_Extensions 4.15\n",
        "torch==2.11.0+cu128\ntyping-extensions==4.15\n",
        '[{"name": "torch", "version": "2.11.0+cu128"}, {"name": "typing_extensions", "version": "4.15"}]',
    )
    for text in forms:
        (tmp_path / "have.txt").write_text(text)
        expected = {"torch": Version("2.11.0+cu128"), "typing-extensions": Version("4.15")}
        assert wheelhouse.read_have(tmp_path / "have.txt") == expected
    (tmp_path / "have.txt").write_text("\n")
    with pytest.raises(Halt, match="names no package"):
        wheelhouse.read_have(tmp_path / "have.txt")
    with pytest.raises(Halt, match="cannot be read"):
        wheelhouse.read_have(tmp_path / "none.txt")


def test_what_is_missing_depends_on_version_marker_and_extra() -> None:
    asked = [
        Requirement(text)
        for text in (
            "torch>=2.11", "numpy<2", "filelock", "pywin32; sys_platform == 'win32'", "tomli; python_version < '3.11'",
            "flax; extra == 'flax'", "importlib-metadata", "old; python_version < '3.13'",
        )
    ]  # fmt: skip
    found = [str(r.name) for r in wheelhouse.missing(asked, HAVE, "3.12")]
    assert found == ["numpy", "importlib-metadata", "old"]


def test_complete_folder_passes_and_gaps_are_named(tmp_path: Path) -> None:
    whole = [
        wheel(tmp_path, "diffusers", "0.42.1", ["importlib-metadata", "numpy", "torch; extra == 'torch'"]),
        wheel(tmp_path, "importlib_metadata", "9.0", ["zipp>=3"]),
        wheel(tmp_path, "zipp", "3.20", []),
    ]
    wheelhouse.check(whole, HAVE, "3.12")
    with pytest.raises(Halt, match=r"importlib-metadata needs zipp>=3"):
        wheelhouse.check(whole[:2], HAVE, "3.12")
    twice = [*whole, wheel(tmp_path, "zipp", "3.21", [])]
    with pytest.raises(Halt, match="two versions of zipp"):
        wheelhouse.check(twice, HAVE, "3.12")


def test_too_large_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheelhouse, "LIMIT_BYTES", 2000)
    with pytest.raises(Halt, match=r"the largest is big-1\.0"):
        wheelhouse.check([wheel(tmp_path, "big", "1.0", [], 4000)], HAVE, "3.12")


def test_what_the_target_has_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older version inside pyproject's range stays, whatever is pinned; one outside is replaced by the pinned one."""
    have = tmp_path / "have.txt"
    lowest = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in wheelhouse.wanted()}
    assert lowest.keys() == set(wheelhouse.WANTED)
    lowest["omegaconf"] = "2.3.0"
    have.write_text("".join(f"{name}=={version}\n" for name, version in lowest.items()))
    asked: list[str] = []

    def download(requirement: Requirement, out: Path, python: str) -> wheelhouse.Wheel:
        asked.append(str(requirement))
        needs = ["pyyaml>=5"] if requirement.name == "omegaconf" else []
        return wheel(out, requirement.name, "2.4.0" if needs else "6.0", needs)

    monkeypatch.setattr(wheelhouse, "_download", download)
    pins = tmp_path / "constraints.txt"
    pins.write_text("omegaconf==2.4.0  # ours\nnumpy==2.4.6\ntransformers==5.23.0\n")
    wheels = wheelhouse.collect(tmp_path / "wheels", have, "3.12", pins=pins)
    assert asked == ["omegaconf==2.4.0", "pyyaml>=5"]
    assert [w.name for w in wheels] == ["omegaconf", "pyyaml"]
    assert "--no-index --no-deps" in wheelhouse.install_line(tmp_path / "wheels")
    with pytest.raises(Halt, match="too large to carry"):
        wheelhouse.collect(tmp_path / "other", have, "3.12", extra=["torch"])


@pytest.mark.parametrize(("asked", "pin", "there", "fetched"), [
    ("hub<3.0,>=1.32.0", "hub==2.4.0", None, "hub==2.4.0"),
    ("hub<3.0,>=1.32.0", None, None, "hub<3.0,>=1.32.0"),
    ("hub<3.0,>=1.32.0", "hub==2.4.0", "1.12.0", "hub<2,<3.0,>=1.32.0"),
    ("arrow>=24", "arrow==26.0.1", "23.0.0", "arrow==26.0.1"),  # its own next major version will not do
])  # fmt: skip
def test_what_is_replaced_on_the_target_keeps_its_major_version(
    asked: str, pin: str | None, there: str | None, fetched: str
) -> None:
    found = wheelhouse._chosen(Requirement(asked), pin, Version(there) if there else None)
    assert found == Requirement(fetched)
