"""A set in a store: put there once, brought as it is needed, the same latents bit for bit, faults and changes noticed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from objectstore import BUCKET, Faulty, served

from train.base.errors import ExitCode, Halt
from train.config.derived import Images
from train.data.index import Index
from train.data.published import PUBLISHED, SENT, Cache, Published, files_of, local_set, publish
from train.data.selection import in_plan_order, open_selection
from train.data.shards import ShardReader
from train.recipe.exclusions import EXCLUSIONS_VERSION
from train.storage.objects import Store

SET = Path(__file__).parents[1] / "fixtures/c93b03a/set"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    with served(monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def url(server: Faulty) -> str:
    publish(SET, Store(f"s3://{BUCKET}/sets/one"))
    server.asked.clear()
    server.sent.clear()
    return f"s3://{BUCKET}/sets/one"


def rows(folder: str | Path) -> list[torch.Tensor]:
    index, reader = Index.open(folder, "pretrain"), ShardReader(folder)
    return [reader.read([shard], [row]) for shard, row in map(index.latent, range(len(index)))]


def test_a_set_is_put_there_once_and_no_picture_with_it(server: Faulty) -> None:
    store = Store(f"s3://{BUCKET}/sets/one")
    (line,) = publish(SET, store)
    there = {name for name, _ in store.names()}
    assert there == {*files_of(SET), PUBLISHED, SENT} and {"dataset.json", "index.arrow"} < there
    assert not any(name.startswith(("records", "probe", "quarantine")) for name in there), "paths and what was left out stay"
    assert line == f"s3://{BUCKET}/sets/one: {len(files_of(SET))} files, {line.split()[3]} GB, {line.split()[3]} GB of them sent now"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "put", lambda self, path, name: pytest.fail(name) if name != PUBLISHED else None)
        publish(SET, store)


def test_publishing_goes_on_where_it_was_ended(server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sent = Store(f"s3://{BUCKET}/x", ()), []
    put = Store.put

    def dies(self: Store, path: Path, name: str) -> None:
        if len(sent) == 3 and name not in (SENT, PUBLISHED):
            raise KeyboardInterrupt
        put(self, path, name)
        sent.append(name) if name not in (SENT, PUBLISHED) else None

    monkeypatch.setattr(Store, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        publish(SET, store)
    monkeypatch.setattr(Store, "put", lambda self, path, name: (sent.append(name), put(self, path, name))[1])
    with pytest.raises(Halt, match="holds no set"):
        local_set(store.url, Cache(tmp_path, None), ["pretrain"])
    publish(SET, store)
    assert sorted(name for name in sent if name not in (SENT, PUBLISHED)) == files_of(SET), "each once"


def test_latents_read_one_by_one_and_whole_are_those_of_the_folder(url: str, server: Faulty, tmp_path: Path) -> None:
    wanted = rows(SET)
    folder = local_set(url, Cache(tmp_path, None), ["pretrain"])
    assert not list(Path(folder).glob("latents/*"))
    reader = pickle.loads(pickle.dumps(ShardReader(folder)))  # as a worker gets it
    assert reader.published is not None
    assert all(torch.equal(a, b) for a, b in zip(wanted, rows(folder), strict=True))
    sent = sum(count for name, count in server.sent.items() if name.startswith("sets/one/latents"))
    assert sent == sum(row.numel() * 2 for row in wanted), "the images' own bytes and none beside"
    published = Published.of(Path(folder))
    assert published is not None
    shards = Index.open(folder, "pretrain").shards()
    assert published.keep(shards) == len(shards)
    server.sent.clear()
    assert all(torch.equal(a, b) for a, b in zip(wanted, rows(folder), strict=True))
    assert not server.sent, "what lies here is not asked for again"
    first = Path(folder) / shards[0]
    first.unlink()  # somebody clears the cache while it trains
    assert all(torch.equal(a, b) for a, b in zip(wanted, rows(folder), strict=True))


def test_tables_are_brought_once_and_again_where_they_changed(url: str, server: Faulty, tmp_path: Path) -> None:
    cache = Cache(tmp_path, None)
    folder = local_set(url, cache, ["pretrain"])
    assert (Path(folder) / "index_pretrain.arrow").is_file() and not (Path(folder) / "index_ft1.arrow").exists()
    server.sent.clear()
    assert local_set(url + "/", cache, ["pretrain", "ft1"]) == folder, "one address, one folder"
    assert set(server.sent) == {f"sets/one/{PUBLISHED}", "sets/one/index_ft1.arrow"}
    (Path(folder) / "index.arrow").write_bytes(b"cut")
    local_set(url, cache, ["pretrain"])
    Index.open(folder, "pretrain")


@pytest.mark.parametrize("name", ["index.arrow", "latents"])
def test_an_object_that_changed_since_is_named(name: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.storage.objects._WAITS_S", (0.01,))
    monkeypatch.setattr(Store.__init__, "__defaults__", ((0.01,),))
    store = Store(url)
    if name == "latents":
        name = Index.open(SET, "pretrain").shards()[0]
    other = tmp_path / "other"
    other.write_bytes(bytes(reversed((SET / name).read_bytes())))
    store.put(other, name)
    with pytest.raises(Halt, match=f"{name} is not what published.json says.* publish the set again") as caught:
        rows(local_set(url, Cache(tmp_path / "cache", None), ["pretrain"]))
    assert caught.value.code == ExitCode.MISMATCH
    publish(SET, store)
    assert rows(local_set(url, Cache(tmp_path / "cache", None), ["pretrain"])), "which mends it"


def test_the_cache_is_filled_in_the_order_of_the_plan_until_it_is_full(url: str, tmp_path: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in SET.glob("latents/*.safetensors")}
    folder = Path(local_set(url, Cache(tmp_path, (max(sizes.values()) + 1) / 1e9), ["pretrain"]))
    published = Published.of(folder)
    assert published is not None
    shards = sorted(Index.open(folder, "pretrain").shards(), key=lambda shard: -sizes[shard.split("/")[1]])
    assert published.keep(shards) == 1 and (folder / shards[0]).is_file()
    other = tmp_path / "another" / "latents" / "old.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x" * max(sizes.values()))
    (folder / shards[0]).unlink()
    assert published.keep(shards) == 0, "another set that is in use keeps its room"
    os.utime(other, (1, 1))
    assert published.keep(shards) == 1 and not other.exists(), "one that nobody used for an hour gives way"


def test_the_order_begins_with_what_is_measured_and_asked_for_first(tmp_path: Path) -> None:
    from train.config.derived import Order
    from train.config.stage import NoiseConfig

    order = Order(3, 2, 2, 2, None, "drop")
    images = Images(folder=str(SET), selection="pretrain", separator=None, held_out_share=0.3, held_out_selection="pretrain", min_bucket=None,
                    average="images", flip=False, masked=False, protect=(), noise=NoiseConfig(), order=order)  # fmt: skip
    selection = open_selection(images)
    shards = in_plan_order(selection.kept, selection.held_out, selection.plan, 0)
    held = selection.held_out.shards()
    assert shards[: len(held)] == held and set(shards) >= set(selection.kept.shards()) and len(set(shards)) == len(shards)
    rest = [shard for shard in shards if shard not in held]
    asked = [selection.kept.latent(row)[0] for step in range(selection.plan.total_updates) for tile in selection.plan.update(step) for row in tile.rows.tolist()]
    assert rest == [shard for shard in dict.fromkeys(asked) if shard not in held]


def test_faults_of_the_network_change_nothing(url: str, server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store.__init__, "__defaults__", ((0.01,) * 4,))
    server.share = 0.5
    folder = local_set(url, Cache(tmp_path, None), ["pretrain"])
    assert all(torch.equal(a, b) for a, b in zip(rows(SET), rows(folder), strict=True))
    published = Published.of(Path(folder))
    assert published is not None and published.keep(Index.open(folder, "pretrain").shards())
    assert len(server.faults) >= 4, server.faults
    shutil.copytree(folder, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / PUBLISHED).read_text())["version"] == 1


@pytest.mark.parametrize(
    ("address", "told"),
    [("http://example.org/set", "only https"), ("s3://a/b?x=1", "no address of a store"), ("https://me:word@example.org/x", "no user or password")],
)
def test_addresses_that_are_refused(address: str, told: str) -> None:
    with pytest.raises(Halt, match=told):
        Store(address)


def test_the_command_sends_a_set_to_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from train.tools.commands import publish as command

    to, mine = f"file://{tmp_path}/store", tmp_path / "mine"
    shutil.copytree(SET, mine)
    monkeypatch.setattr("sys.argv", ["publish.py", str(mine), "--to", to, "--go"])
    with pytest.raises(Halt, match="an earlier version of the hard exclusions"):
        command.main()
    assert not (tmp_path / "store").exists()
    record = json.loads((mine / "dataset.json").read_text())
    (mine / "dataset.json").write_text(json.dumps(record | {"hard_exclusion_version": EXCLUSIONS_VERSION}))
    for words, told in (([], "dry run: nothing was sent"), (["--go"], f"train from it with data.path={to}")):
        monkeypatch.setattr("sys.argv", ["publish.py", str(mine), "--to", to, *words])
        assert command.main() == ExitCode.DONE
        assert told in capsys.readouterr().out
        assert (tmp_path / "store").exists() == bool(words)
    assert len(rows(local_set(to, Cache(tmp_path / "cache", None), ["pretrain"]))) == len(rows(SET))


HOSTILE = {
    "a name that leads out": lambda record: record["files"].update({"../../evil.arrow": record["files"]["index.arrow"]}),
    "an absolute name": lambda record: record["files"].update({"/tmp/evil.arrow": record["files"]["index.arrow"]}),
    "another kind of file": lambda record: record["files"].update({"latents/../x": record["files"]["index.arrow"]}),
    "no hash": lambda record: record["files"]["index.arrow"].update(sha256="x"),
    "a size that is none": lambda record: record["files"]["index.arrow"].update(size=-1),
    "rows beyond all": lambda record: next(iter(record["rows"].values())).update(each=1 << 50),
    "rows of another shape": lambda record: next(iter(record["rows"].values())).update(shape=[1, 2]),
    "digests too few": lambda record: next(iter(record["rows"].values())).update(digests=""),
    "rows of no file": lambda record: record["rows"].update({"latents/absent.safetensors": next(iter(record["rows"].values()))}),
    "another version": lambda record: record.update(version=2),
    "no files": lambda record: record.pop("files"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_ours_does_not_write_is_refused_before_anything_is(what: str, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    publish(SET, store)
    path = tmp_path / "store" / PUBLISHED
    record = json.loads(path.read_text())
    HOSTILE[what](record)  # type: ignore[no-untyped-call]
    path.write_text(json.dumps(record))
    with pytest.raises(Halt, match=r"published\.json is damaged or of another version .* publish the set again") as caught:
        local_set(store.url, Cache(tmp_path / "cache", None), ["pretrain"])
    assert caught.value.code == ExitCode.MISMATCH
    assert [str(found.relative_to(tmp_path / "cache")) for found in (tmp_path / "cache").rglob("*") if found.is_file()] == []
    path.write_text("[" * 100_000)
    with pytest.raises(Halt, match="is damaged or of another version"):
        local_set(store.url, Cache(tmp_path / "cache", None), ["pretrain"])
