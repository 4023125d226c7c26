"""Step `label`: the tagging policy over all records, one unit per unit of the records table.

Only labels depend on the policy: changing a threshold rewrites this table and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.ingest import update_dataset_json
from train.prepare.tables import units
from train.prepare.tables.refusals import SEEN_COLUMNS, refused_by
from train.prepare.tables.schemas import LABELS, Quarantine, quarantine_table
from train.prepare.tables.workers import Peers
from train.prepare.tagging.aliases import Aliases, read_aliases
from train.prepare.tagging.corrections import Corrections, Row, read_corrections
from train.prepare.tagging.matching import plain_tag
from train.prepare.tagging.policy import freeze, open_words, post_days
from train.prepare.tagging.vectorised import Inputs, TokenCount, label_table
from train.recipe.exclusions import EXCLUSIONS_VERSION
from train.recipe.tag_policy import LabelError, Policy

LABEL_VERSION = 2  # 2: tail, prose, variants
_COLUMNS = [
    "key", "source", "rating", "score", "score_real", "created_at", "created_year", "media_year", "tags_general",
    "tags_character", "tags_copyright", "tags_artist", "tags_meta", "tags_species", "caption", "hard_exclusion",
]  # fmt: skip
SHOWN = 10  # corrections that are named when they change nothing
_GENERAL, _CHARACTER = 0, 4  # categories of the WD tagger


def run(settings: DatasetConfig) -> None:
    """Write `labels/`, the step's quarantine, and the counts of missing special tags to dataset.json.

    Raises Halt(MISMATCH) for a record that the preset refuses to label.
    """
    dataset = dataset_dir(settings)
    records = units.require_table(dataset, "records")
    policy, today = freeze(settings.policy, dataset)
    corrections, aliases = read_corrections(settings.corrections, settings.separator), read_aliases(settings.aliases, settings.separator)
    for note in open_words(settings.policy, settings.score.model):
        print(f"label: the vocabulary: {note}")
    tag = settings.tag
    counter, tokenizer_id = token_counter(settings.tokenizers)
    if counter is None:
        print("label: tokenizers is null: token counts are left out")
    wanted = {"aesthetic": settings.score.source, "tags": settings.tag.source}
    used = [table for table, source in wanted.items() if source != "none"]
    config = units.config_id(
        code=LABEL_VERSION, policy=policy.hash(), day=str(today) if policy.quality_min_age_days else None,
        tokenizer=tokenizer_id, tag={"general": tag.general_threshold, "character": tag.character_threshold, "use": tag.use}, exclusions=EXCLUSIONS_VERSION,
        **({"aliases": aliases.identity} if aliases.tags else {}),
    )  # fmt: skip
    step = units.Step(dataset, "labels", LABELS, config, ("records", *used))
    ranges = {table: [(file, _key_range(file)) for file in units.require_table(dataset, table)] for table in used}
    inputs = [_unit_inputs(path, ranges) for path in records]
    mine = [corrections.within(*_key_range(path)) for path in records]
    names = [
        # A unit without corrections keeps its name, and so its labels.
        f"{n:05d}-{units.config_id(config=config, of=of, **({'corrections': rows, 'exclude': settings.exclude.tags} if (rows := mine[n].rows()) else {}))}.parquet"
        for n, (of, _) in enumerate(inputs)
    ]

    def make(number: int) -> None:
        table, entries = _label_unit(settings, records[number], inputs[number][1], mine[number], policy, today, counter, aliases)
        units.write_parquet(dataset / "quarantine" / "labels" / names[number], quarantine_table(entries))
        units.write_parquet(step.folder / names[number], table)

    with Peers(dataset) as peers:
        units.fill(step, names, make, peers)
    units.finalize(step, names)
    units.merge_quarantine(dataset)
    units_of = [(path, joined, one) for path, (_, joined), one in zip(records, inputs, mine, strict=True)]
    if aliases.tags:
        touched = sum(len(aliases.touched(part)) for part in units.stream_table(dataset, "records", _COLUMNS))
        print(f"label: aliases: {len(aliases.tags)} names; {touched} records have one and are told by its tag")
    _write_facts(dataset, policy, settings, _corrected_facts(settings, corrections, aliases, units_of) if settings.corrections else {})


def token_counter(folder: str | None) -> tuple[TokenCount | None, str | None]:
    """(tokens of a text, identity of the tokenizer), both None without `tokenizers`."""
    if folder is None:
        return None, None
    from train.model.text import load_tag_tokenizer

    tokenizer = load_tag_tokenizer(Path(folder))
    return (lambda text: len(tokenizer.content_ids([text]))), tokenizer.identity()


def _unit_inputs(
    path: Path, ranges: Mapping[str, Sequence[tuple[Path, tuple[str, str]]]]
) -> tuple[list[str], dict[str, list[Path]]]:
    """(names of all files that a unit's labels depend on, those of each joined table)."""
    first, last = _key_range(path)
    joined = {
        table: [file for file, (low, high) in files if low <= last and high >= first] for table, files in ranges.items()
    }
    return [path.name, *(file.name for files in joined.values() for file in files)], joined


def _key_range(path: Path) -> tuple[str, str]:
    """First and last key of a file; ("~", "") when it is empty."""
    with pq.ParquetFile(path) as file:
        groups, metadata = file.num_row_groups, file.metadata
        if metadata.num_rows == 0:
            return "~", ""
        place = file.schema_arrow.get_field_index("key")
        ends = [metadata.row_group(group).column(place).statistics for group in (0, groups - 1)]
        if all(end is not None and end.has_min_max for end in ends):  # rows are sorted by key
            return str(ends[0].min), str(ends[1].max)
        first = file.read_row_group(0, columns=["key"])["key"][0].as_py()
        last = file.read_row_group(groups - 1, columns=["key"])["key"][-1].as_py()
    return first, last


def _label_unit(
    settings: DatasetConfig, path: Path, joined: dict[str, list[Path]], corrections: Corrections, policy: Policy,
    today: date | None, counter: TokenCount | None, aliases: Aliases,
) -> tuple[pa.Table, list[Quarantine]]:  # fmt: skip
    records = pq.read_table(path, columns=_COLUMNS)
    # A hard-excluded record gets no labels: nothing after this step can meet it.
    records = records.filter(pc.is_null(records["hard_exclusion"]))
    read, entries = _with_tagger(records, joined.get("tags", []), settings)
    records, excluded = _aliased(read, aliases, settings)
    records, corrected = _corrected(records, read, aliases, corrections, settings)
    entries += [*excluded, *corrected]
    inputs = _inputs(records, _scores(records["key"], joined.get("aesthetic", [])), today)
    try:
        columns = label_table(records, inputs, policy, counter)
    except LabelError as error:
        raise Halt(
            ExitCode.MISMATCH, f"{error}, and policy.missing_rating_or_score is `raise`: mend the record or set `omit`"
        ) from error
    hashes = pa.repeat(pa.scalar(policy.hash()), len(records))
    arrays = {"key": records["key"].combine_chunks(), "policy_hash": hashes, **columns}
    return pa.table({name: arrays[name] for name in LABELS.names}).cast(LABELS), entries


def _inputs(records: pa.Table, aesthetic: np.ndarray, today: date | None) -> Inputs:
    letters = pa.array(["g", "s", "q", "e"])
    rating = pc.index_in(records["rating"].cast(pa.string()), letters).fill_null(-1)
    ages = np.full(len(records), np.nan)
    if today is not None:
        days = post_days(records["created_at"]).cast(pa.int32())
        ages = (today - date(1970, 1, 1)).days - _floats(days)
    return Inputs(
        rating=rating.to_numpy().astype(np.int64),
        score=_floats(pc.coalesce(records["score"].cast(pa.float64()), records["score_real"])),
        created_year=_floats(records["created_year"]),
        media_year=_floats(records["media_year"]),
        age_days=ages,
        aesthetic=aesthetic,
    )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(float("nan")).to_numpy()


def _scores(keys: pa.ChunkedArray, files: Sequence[Path]) -> np.ndarray:
    """float64 aesthetic score of each key, NaN where there is none."""
    if not files:
        return np.full(len(keys), np.nan)
    table = pa.concat_tables([pq.read_table(file, columns=["key", "score"]) for file in files]).combine_chunks()
    places = pc.index_in(keys, value_set=table["key"].combine_chunks())
    return _floats(table["score"].take(places))


def _with_tagger(
    records: pa.Table, files: Sequence[Path], settings: DatasetConfig
) -> tuple[pa.Table, list[Quarantine]]:
    """Records with the tagger's tags where the config wants them, without those that these tags exclude."""
    if not files or settings.tag.source == "none":
        return records, []
    found = {row["key"]: row["tags"] for file in files for row in pq.read_table(file).to_pylist()}
    lists = {name: records[f"tags_{name}"].to_pylist() for name in ("general", "character")}
    keep, entries = np.ones(len(records), bool), []
    light = records.select(["key", "source", "rating", "caption", "tags_meta", "tags_species"])
    for row, record in enumerate(light.to_pylist()):
        general, character = lists["general"][row], lists["character"][row]
        named = general or character or record["caption"] or record["tags_meta"] or record["tags_species"]
        tags = found.get(record["key"])
        if not tags or (named and settings.tag.use == "missing"):
            continue
        general += wanted_tags(tags, _GENERAL, settings.tag.general_threshold, general)
        character += wanted_tags(tags, _CHARACTER, settings.tag.character_threshold, character)
        if found_rule := refused_by(record | {"tags_general": general, "tags_character": character}, settings):
            keep[row] = False
            entries.append(Quarantine(record["key"], "label", "excluded_tag", found_rule[0]))
    for name, values in lists.items():
        place = records.schema.get_field_index(f"tags_{name}")
        records = records.set_column(place, f"tags_{name}", pa.array(values, pa.list_(pa.string())))
    return records.filter(pa.array(keep)), entries


def _aliased(records: pa.Table, aliases: Aliases, settings: DatasetConfig) -> tuple[pa.Table, list[Quarantine]]:
    """Records with tags for aliases, without those that the hard exclusions refuse when they see both."""
    named = aliases.applied(records)
    keep, entries = np.ones(len(records), bool), []
    for row in aliases.touched(records).tolist():
        if found_rule := _refused(_seen(records, row), _seen(named, row), aliases, settings):
            keep[row] = False
            entries.append(Quarantine(records["key"][row].as_py(), "label", "excluded_tag", found_rule[0]))
    return named.filter(pa.array(keep)), entries


def _seen(records: pa.Table, row: int) -> dict[str, Any]:
    """What the hard exclusions read of one record."""
    return {name: records[name][row].as_py() for name in SEEN_COLUMNS}


def _refused(
    old: Mapping[str, Any], new: Mapping[str, Any], aliases: Aliases, settings: DatasetConfig, added: Sequence[str] = ()
) -> tuple[str, str] | None:
    """What the hard exclusions say of all names of a record together: as read, as aliases have it, on the way, and added."""
    both = {name: value + new[name] if isinstance(value, list) else value for name, value in old.items()}
    both["caption"] = "\n".join(filter(None, (old["caption"], new["caption"]))) or None
    between = aliases.on_the_way((tag for value in old.values() if isinstance(value, list) for tag in value), old["caption"])
    return refused_by(both, settings, [*between, *added])


def _corrected(
    records: pa.Table, read: pa.Table, aliases: Aliases, corrections: Corrections, settings: DatasetConfig
) -> tuple[pa.Table, list[Quarantine]]:
    """Records as the corrections have them, without those that an added tag excludes: beside what a drop takes away, and beside
    every name that the record was `read` with."""
    keep, entries = np.ones(len(records), bool), []
    unwanted = set(map(plain_tag, settings.exclude.tags))
    for row, change in corrections.touched(records["key"]):
        first = _seen(read, pc.index(read["key"], records["key"][row]).as_py())
        found_rule = _refused(first, _seen(records, row), aliases, settings, change.add) if change.add else None
        theirs = [tag for tag in change.add if plain_tag(tag) in unwanted]
        if found_rule or theirs:
            keep[row] = False
            entries.append(Quarantine(records["key"][row].as_py(), "label", "excluded_tag", found_rule[0] if found_rule else theirs[0]))
    return corrections.applied(records.filter(pa.array(keep))), entries


def _corrected_facts(
    settings: DatasetConfig, corrections: Corrections, aliases: Aliases, parts: Sequence[tuple[Path, dict[str, list[Path]], Corrections]]
) -> dict[str, Any]:
    """What the corrections did, for dataset.json, and printed; which of them did nothing."""
    idle, known = list[Row](), set[str]()
    for path, joined, mine in parts:
        if mine.changes:
            records = pq.read_table(path, columns=_COLUMNS)
            records = records.take(pa.array([row for row, _ in mine.touched(records["key"])], pa.int64()))
            known |= set(records["key"].to_pylist())
            records = records.filter(pc.is_null(records["hard_exclusion"]))
            idle += mine.idle(aliases.applied(_with_tagger(records, joined.get("tags", []), settings)[0]))
    wanted = pa.array(sorted(known), pa.string())
    labels = units.stream_table(dataset_dir(settings), "labels", ["key"])
    labelled = {key for unit in labels for key in unit["key"].filter(pc.is_in(unit["key"], value_set=wanted)).to_pylist()}
    rows = corrections.rows()
    done = [row for row in rows if row[0] in labelled and row not in set(idle)]
    excluded = [row for row in rows if row[0] in known - labelled]
    strange = [row for row in rows if row[0] not in known]
    counts, captions = Counter(operation for _, _, operation in done), len({key for key, _, _ in done})
    print(f"label: corrections: {counts['drop']} tags dropped and {counts['add']} added, in {captions} captions")
    if excluded:
        print(f"label: corrections: {len(excluded)} are of excluded records, which stay out")
    if idle or strange:
        named = [f"{key} {'has' if operation == 'add' else 'has no'} {tag!r}" for key, tag, operation in idle]
        named += [f"there is no record {key}" for key in dict.fromkeys(key for key, _, _ in strange)]
        more = f" and {len(named) - SHOWN} more, all in dataset.json" if len(named) > SHOWN else ""
        print(f"label: corrections: {len(idle) + len(strange)} change nothing: {'; '.join(named[:SHOWN])}{more}")
    return {"corrections": {
        "dropped": counts["drop"], "added": counts["add"], "captions": captions, "of_excluded": len(excluded),
        "idle": [list(row) for row in [*idle, *strange]],
    }}  # fmt: skip


def wanted_tags(tags: Sequence[dict[str, Any]], category: int, threshold: float, present: Sequence[str]) -> list[str]:
    """Tags of one category above its threshold, most probable first: a character tag never turns general."""
    chosen = [tag for tag in tags if tag["category"] == category and tag["prob"] > threshold]
    chosen.sort(key=lambda tag: -tag["prob"])  # stable: equal ones keep the order of their source
    return [tag["tag"] for tag in chosen if tag["tag"] not in present]


def _write_facts(dataset: Path, policy: Policy, settings: DatasetConfig, corrected: Mapping[str, Any]) -> None:
    counts = Counter[str]()
    for unit in units.stream_table(dataset, "labels", ["quality", "year", "aesthetic", "rating_tags"]):
        counts["rows"] += len(unit)
        for name in ("quality", "year", "aesthetic"):
            counts[f"without_{name}"] += unit[name].null_count
        counts["without_rating"] += pc.sum(pc.equal(pc.list_value_length(unit["rating_tags"]), 0)).as_py() or 0
    update_dataset_json(
        dataset,
        {"policy_hash": policy.hash(), "policy_preset": settings.policy.preset, "label": dict(sorted(counts.items())) | dict(corrected)},
    )
    print("label: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
