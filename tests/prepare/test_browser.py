"""The page of a set in a browser: a tag is found, dropped from two pictures, exported, and prepared again."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from preparedset import prepare, settings_of, write_posts, write_vae

from train.prepare.health.browser import browsed
from train.prepare.tables import units

COUNT = 10
FT1 = {"select.ft1.where": "['tags_general has_any [tag_1]']"}
HOSTILE = "</script><img/src=x/onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten posts, rated g and s; 900 is the picture of 4 once more, 1 has a tag that would be markup."""
    folder = tmp_path_factory.mktemp("browsed")
    write_posts(folder / "pictures", COUNT)
    shutil.copy(folder / "pictures/4.jpg", folder / "pictures/900.jpg")
    (folder / "pictures/900.json").write_text((folder / "pictures/4.json").read_text())
    for path in (folder / "pictures").glob("*.json"):
        post = json.loads(path.read_text()) | {"rating": "gs"[int(path.stem) % 2], "id": int(path.stem)}
        post["tag_string_general"] += f" {HOSTILE}" if path.stem == "1" else ""
        path.write_text(json.dumps(post))
    write_vae(folder / "vae")
    prepare(settings_of(folder, **FT1))
    return folder


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "data/set/report.html").read_text()
    found: dict[str, Any] = json.loads(re.findall(r'<script type="application/json" id="captions">(.*?)</script>', text, re.S)[0])
    return found


def test_the_page_holds_captions_and_one_script_that_its_policy_names(made: Path) -> None:
    text = (made / "data/set/report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    assert html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)"', text)[0]) == f"{policy}{digest}'"
    assert text.count("<script") == 2
    assert HOSTILE not in text
    data = data_of(made)
    assert [one["key"] for one in data["pictures"]] == [*(f"booru:{n}" for n in range(10)), "booru:900"]
    assert data["of"] == COUNT + 1
    first = data["pictures"][1]
    said = [data["texts"][at] for at in first["flex"]]
    assert HOSTILE in said
    assert {data["texts"][at] for at in first["policy"]} < set(said)
    assert first["stages"] == [0, 1], "of pretrain and ft1"
    assert data["pictures"][4]["near"] == data["pictures"][10]["near"] != 0
    at = data["texts"].index("smile")
    assert (data["tokens"][at], data["bare"][at]) == (2, 1), "CLIP's: the comma is a token"
    assert all(one["thumb"] for one in data["pictures"])


def test_a_large_set_is_cut_and_says_so(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "c", copy_function=shutil.copy2)
    (tmp_path / "c/dataset.yaml").unlink()
    before = (tmp_path / "c/data/set/thumbnails.parquet").stat().st_mtime_ns
    settings = settings_of(tmp_path / "c", **{"report.captions": 3})
    three = browsed(settings, {})["pictures"]
    assert browsed(settings, {})["pictures"] == three
    prepare(settings_of(tmp_path / "c", **FT1, **{"report.captions": 3}), "report")
    text = (tmp_path / "c/data/set/report.html").read_text()
    assert [one["key"] for one in data_of(tmp_path / "c")["pictures"]] == [one["key"] for one in three]
    assert "A random 3 of 11 pictures are on this page: report.captions" in text
    assert (tmp_path / "c/data/set/thumbnails.parquet").stat().st_mtime_ns != before
    prepare(settings_of(tmp_path / "c", **FT1, **{"report.captions": 0}), "report")
    assert "<script" not in (tmp_path / "c/data/set/report.html").read_text()


def test_an_unrated_set_says_which_key_shows_it_and_no_table_is_empty(tmp_path: Path) -> None:
    write_posts(tmp_path / "pictures", 4)
    for path in (tmp_path / "pictures").glob("*.json"):
        post = json.loads(path.read_text())
        path.with_suffix(".txt").write_text(post["tag_string_general"].replace(" ", ", "))
        path.unlink()
    write_vae(tmp_path / "vae")
    settings_of(tmp_path)
    text = tmp_path / "dataset.yaml"
    text.write_text(f"sources:\n  - {{name: own, adapter: sidecar, path: {tmp_path / 'pictures'}}}\nselect:\n  run: {{min_bucket: 1}}\n")
    prepare(settings_of(tmp_path))
    page = (tmp_path / "data/set/report.html").read_text()
    told = "4 pictures are not shown because nothing says how they are rated (sources: own). assume_rating: g (or s) of their source"
    assert told in page
    assert "report.pictures: all shows every picture" in page
    assert not any("thumb" in one for one in data_of(tmp_path)["pictures"])
    assert "<tbody></tbody>" not in page.replace("\n", "")
    assert ">none<" not in page
    for nothing in ("Hard exclusions", "Duplicates", "Quarantine", "Stale", "0 pictures are enlarged", "Quality by year"):
        assert nothing not in page, nothing
    for shown in ({"report.pictures": "all"}, {"sources.0.assume_rating": "g"}):
        prepare(settings_of(tmp_path, **shown), "report")
        assert told not in (tmp_path / "data/set/report.html").read_text()
        assert all(one["thumb"] for one in data_of(tmp_path)["pictures"])


CLICK = "[...document.querySelectorAll('.card[data-key=\"{}\"] .tag')].find(e => e.textContent == '{}').click()"
KEYS = "[...document.querySelectorAll('.card')].map(e => e.dataset.key)"
OUTSIDE = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))"


def find(browser: Browser, words: str) -> list[str]:
    """Type into the search box; the keys of the pictures that are shown then."""
    browser.evaluate(f"(() => {{ const box = document.querySelector('#find'); box.value = {json.dumps(words)};"
                     "box.dispatchEvent(new Event('input')); })()")  # fmt: skip
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    keys: list[str] = browser.evaluate(KEYS)
    return keys


def reload(browser: Browser) -> None:
    """The page anew, with the two corrections that its set was prepared with; the old one is not taken for it."""
    browser.evaluate("window.old = true")
    browser.call("Page.reload")
    browser.wait_for("!window.old && document.querySelector('#count')?.textContent == '2 corrections'")


def exported(browser: Browser, folder: Path) -> str:
    """Click on export; what the browser saved."""
    folder.mkdir()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.evaluate("document.querySelector('#export').click()")
    file = folder / "corrections.csv"
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    for _ in range(100):
        if file.exists() and file.read_text():
            return file.read_text()
        browser.evaluate("new Promise(done => setTimeout(done, 100))")
    raise AssertionError(f"nothing was saved: {list(folder.iterdir())}")


@pytest.mark.slow
def test_look_click_prepare_again(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(made, folder, copy_function=shutil.copy2)
    (folder / "dataset.yaml").unlink()
    settings_of(folder)
    labels = {row["key"]: row for row in units.read_table(folder / "data/set", "labels").to_pylist()}
    shards = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "data/set/latents").glob("*")}
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=(folder / "data/set/report.html").as_uri())
        browser.wait_for("document.querySelectorAll('.card').length == 11")
        assert find(browser, "Tag_1") == ["booru:1", "booru:7"]
        assert find(browser, "smile, -tag 1, booru:9") == ["booru:9"]
        assert find(browser, "no such tag") == []
        assert find(browser, HOSTILE) == ["booru:1"]
        browser.evaluate("document.querySelector('#find').value = ''; document.querySelector('#only').value = 'near-duplicates';"
                         "document.querySelector('#only').dispatchEvent(new Event('change'))")  # fmt: skip
        assert browser.evaluate(KEYS) == ["booru:4", "booru:900"]
        browser.evaluate("document.querySelector('#only').selectedIndex = 0")
        assert len(find(browser, "smile")) == 11
        browser.evaluate(CLICK.format("booru:2", "smile"))
        browser.evaluate(CLICK.format("booru:3", "smile"))
        assert exported(browser, tmp_path / "one") == "key,tag,change\nbooru:2,smile,drop\nbooru:3,smile,drop\n"
        prepare(settings_of(folder, corrections=str(tmp_path / "one/corrections.csv"), **FT1))
        after = {row["key"]: row for row in units.read_table(folder / "data/set", "labels").to_pylist()}
        assert {key for key in labels if labels[key] != after[key]} == {"booru:2", "booru:3"}
        assert "smile" not in after["booru:2"]["flex_tags"]
        again = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "data/set/latents").glob("*")}
        assert again == shards

        reload(browser)
        assert find(browser, "smile") == [key for key in sorted(labels) if key not in ("booru:2", "booru:3")]
        find(browser, "")
        browser.evaluate(CLICK.format("booru:3", "smile"))  # taken back
        browser.evaluate("(() => { const box = document.querySelector('.card[data-key=\"booru:5\"] input'); box.value = 'red scarf';"
                         "box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'})); })()")  # fmt: skip
        assert browser.evaluate("document.querySelector('#count').textContent") == "2 corrections, 1 new, 1 taken back"
        assert exported(browser, tmp_path / "two") == "key,tag,change\nbooru:2,smile,drop\nbooru:5,red scarf,add\n"

        browser.evaluate(CLICK.format("booru:5", "+ red scarf"))
        for width in (360, 1400):
            for scheme in ("light", "dark"):
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
                assert browser.evaluate(OUTSIDE) == [], (width, scheme)
        reload(browser)  # with corrections that nobody exported: no word on the console
        assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert browser.errors == []
    finally:
        browser.close()
