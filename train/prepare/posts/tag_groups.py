"""Tags of a post by group, from whichever form a site or its downloader wrote them in.

Known forms: one text or list per category (`tag_string_artist`, `tags_artist`), a list of {name, category} or {tag, type},
and flat tags. What the flat tags hold beside the categorised ones is general, so that nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from train.prepare.posts.census import note
from train.prepare.posts.normalise import BadRecord, words

CATEGORIES = {0: "general", 1: "artist", 3: "copyright", 4: "character", 5: "meta"}  # of Danbooru, by number
_GROUPS = {  # a site's word for a category: our group
    "general": "general", "tag": "general", "artist": "artist", "circle": "artist", "contributor": "artist", "studio": "artist",
    "copyright": "copyright", "series": "copyright", "character": "character", "meta": "meta", "metadata": "meta",
    "medium": "meta", "faults": "meta", "style": "meta", "species": "species", "lore": "meta", "deprecated": "general",
    "6": "general",  # Gelbooru's number of deprecated tags
}  # fmt: skip
_PREFIXES = ("tag_string_", "tags_")
_NAMES, _KINDS = ("name", "tag", "name_en"), ("category", "type")  # of an entry that is an object
_LISTS = ("tags", "tag_info")  # where such entries stand
_FLAT = ("tag_string", "tags")
Clean = Callable[[str], str]


def tag_groups(post: Mapping[str, Any], rest: Mapping[str, str] | None = None, clean: Clean = str) -> dict[str, Any]:
    """Tags by group. `rest` gives flat tags without a category their group; `clean` mends each tag.

    Raises BadRecord for a category that is not known, or when there are no tags at all.
    """
    groups = _entries(post) or _by_field(post)
    groups = {group: _cleaned(tags, clean) for group, tags in groups.items()}
    flat = next((post[name] for name in _FLAT if isinstance(post.get(name), str | list)), None)
    if isinstance(flat, list) and any(isinstance(tag, dict) for tag in flat):
        flat = []
    if flat is None and not groups:
        raise BadRecord(
            f"tags are {post.get('tags')!r}: expected tag_string_general and its like, or tags as one text or list"
        )
    plain = _cleaned(words(flat) if isinstance(flat, str) else flat or [], clean)
    if groups:
        known = {tag for tags in groups.values() for tag in tags if isinstance(tag, str)}
        plain = [tag for tag in plain if tag not in known]
    for tag in plain:
        groups.setdefault((rest or {}).get(tag, "general"), []).append(tag)
    return groups or {"general": []}


def _cleaned(tags: list[Any], clean: Clean) -> list[Any]:
    return tags if clean is str else [clean(tag) if isinstance(tag, str) else tag for tag in tags]


def _by_field(post: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Tags of the fields that each hold one category; where a post has both forms of one, they are the same."""
    found: dict[str, list[Any]] = {}
    seen: set[str] = set()
    names = [name for name in post if name.startswith("tag")]
    for prefix in _PREFIXES:
        for name in names:
            category, value = name.removeprefix(prefix), post[name]
            if category == name or category in seen or not isinstance(value, str | list | tuple):
                continue
            group = _GROUPS.get(category)
            if group is None:
                if category == "invalid" or not value:
                    continue
                note("categories", name)
                group = "general"
            seen.add(category)
            tags = words(value) if isinstance(value, str) else list(value)
            found[group] = found[group] + [tag for tag in tags if tag not in found[group]] if group in found else tags
    return found


def _entries(post: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Tags of a list of objects, each of which says its category by number or by word."""
    groups: dict[str, list[Any]] = {}
    for name in _LISTS:
        listed = post.get(name)
        if not isinstance(listed, list) or not any(isinstance(tag, dict) for tag in listed):
            continue
        for entry in listed:
            tag = next((entry[key] for key in _NAMES if isinstance(entry.get(key), str)), None) if isinstance(entry, dict) else None
            if tag is None:
                raise BadRecord(f"tag {entry!r} has no name")
            groups.setdefault(_group(tag, entry), []).append(tag)
        return groups
    return groups


def _group(tag: str, entry: Mapping[str, Any]) -> str:
    category = str(next((entry[key] for key in _KINDS if entry.get(key) is not None), None)).strip().lower()
    if category.isascii() and category.isdigit() and int(category) in CATEGORIES:
        return CATEGORIES[int(category)]
    if category not in _GROUPS:
        raise BadRecord(f"tag {tag!r} has category {category!r}, expected one of {sorted(CATEGORIES)} or {', '.join(_GROUPS)}")
    return _GROUPS[category]
