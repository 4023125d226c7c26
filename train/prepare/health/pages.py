"""HTML pages from the templates beside this file, for the dataset's report and the runs': what is not Markup is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
html: Any = _TEMPLATES.get_template("parts.html").module  # its macros: table, p, figure, ...


def page(title: str, style: str, lead: str, sections: Iterable[tuple[str, str, str]], script: str = "") -> str:
    """A whole page in the looks of `style`; a section is (anchor, name, body). `script`: the one template that may run.

    A browser runs nothing else: the page's policy names the script by its hash.
    """
    code = _TEMPLATES.loader.get_source(_TEMPLATES, script)[0] if script and _TEMPLATES.loader else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() if code else ""
    return render("page.html", title=title, style=style, lead=lead, sections=list(sections), script=Markup(code), digest=digest)


def render(name: str, **values: Any) -> str:
    """A template with its values filled in; Markup."""
    return _TEMPLATES.get_template(name).render(values) + "\n"


def joined(parts: Iterable[str]) -> Markup:
    """One after the other; what is not Markup is escaped."""
    return Markup("").join(parts)
