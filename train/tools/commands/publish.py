"""A finished run or a prepared set to a page of the hub, or to an object store, with a card made from its records; a dry run unless --go."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.base.errors import ExitCode, Halt


def main() -> int:
    """Parse, gather, show the card, send where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", type=Path, metavar="RUN|SET", help="finished run, folder of new.py, or prepared set")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME|URL", help="the page, made where it does not exist; or s3://bucket/folder, gs://: of a set what data.path reads")
    parser.add_argument("--go", action="store_true", help="send it; without this nothing is asked of any network")
    parser.add_argument("--public", action="store_true", help="a page that is made anew can be seen by everybody (default: by you)")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="pictures by sample.py for the card (default: the run's newest previews)")
    parser.add_argument("--license", help="of a set, which knows none; a run states its own")
    a = parser.parse_args()
    in_store = a.to.startswith(("s3://", "gs://", "file://"))
    if in_store and (a.what / "dataset.json").is_file():
        return _to_store(a.what, a.to, go=a.go)
    from train.storage.objects import Store
    from train.tools.publish import gather, licences, page, store, upload

    to = Store(a.to).url if in_store else upload.page_of(a.to)
    found = gather.gather(a.what, a.samples)
    if found.kind == "dataset":
        if not a.license:
            raise Halt(ExitCode.USAGE, f"{a.what} is a prepared set, whose licence nobody knows but you: give --license")
        found.license = a.license
        text = page.text_of_set(found)
    else:
        if a.license:
            raise Halt(ExitCode.USAGE, "--license is of sets: a run's licence is that of its lineage (export.license)")
        found.license = licences.of_run(found.source)
        text = page.text_of_run(found, "path/to/this/folder" if in_store else to)
    found.files["README.md"] = text.encode()
    gather.refuse_private(found)
    total = 0
    for name, content in sorted(found.files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        total += size
        print(f"{size:>14,}  {name}")
    print(f"{total:>14,}  bytes in {len(found.files)} files; licence: {found.license}")
    for note in found.notes:
        print(f"note: {note}")
    if not a.go:
        print(f"\n{text}\ndry run: nothing was sent to {to}; --go sends it")
        return ExitCode.DONE
    print(store.send(found, Store(to)) if in_store else upload.send(found, to, public=a.public))
    return ExitCode.DONE


def _to_store(folder: Path, url: str, *, go: bool) -> int:
    """A set for `data.path: URL`: tables, captions and latents, resumed where an earlier start was ended."""
    from train.data.published import files_of, publish
    from train.storage.objects import Store
    from train.tools.publish.gather import refuse_unchecked

    refuse_unchecked(folder)
    store = Store(url)
    if go:
        print("\n".join(publish(folder, store)))
        print(f"train from it with data.path={store.url}")
        return ExitCode.DONE
    sizes = {name: (folder / name).stat().st_size for name in files_of(folder)}
    for name, size in sizes.items():
        print(f"{size:>14,}  {name}")
    print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files\ndry run: nothing was sent to {store.url}; --go sends it")
    return ExitCode.DONE
