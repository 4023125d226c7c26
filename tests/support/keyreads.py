"""Which room reads which config key, as mypy sees it: every attribute of an object whose type is a config section.

mypy asks its plugins about each attribute it resolves; this one, for attributes of the dataclasses of `train/config/`,
writes down the file that asks. So `x.separator` counts for the section that `x` really is, through parameters, locals,
loops and fields, and not for something else with an attribute of that name. Other people's packages are left out,
which makes it a matter of seconds. A key read by a name that is worked out (`getattr`) is not seen: name it plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mypy import build
from mypy.modulefinder import BuildSource
from mypy.nodes import MemberExpr
from mypy.options import Options
from mypy.plugin import AttributeContext, Plugin
from mypy.types import Type

Use = tuple[str, str, int, int]  # module.Class.field, path of the file, line, column
SEEN: set[Use] = set()
WRITTEN: set[Use] = set()  # targets of assignments, which mypy looks at twice


class KeyReads(Plugin):
    """Notes every attribute that is read of something in `train.config`; changes no type."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """mypy's hook: `fullname` is the class's full name and the attribute."""
        if not fullname.startswith("train.config."):
            return None

        def note(context: AttributeContext) -> Type:
            if isinstance(context.context, MemberExpr):
                at = (fullname, context.api.path, context.context.line, context.context.column)  # type: ignore[attr-defined]
                (WRITTEN if context.is_lvalue else SEEN).add(at)
            return context.default_attr_type

        return note


def plugin(_version: str) -> type[Plugin]:
    """What mypy looks for in a plugin's file."""
    return KeyReads


def reads(root: Path) -> dict[str, set[str]]:
    """`train.config.stage.NoiseConfig.offset` to the rooms below `root`/train but testing/ that read it (`diffusion.noise`)."""
    options = Options()
    options.plugins, options.config_file = [str(Path(__file__).resolve())], str(root / "pyproject.toml")
    options.incremental, options.follow_imports, options.ignore_missing_imports = False, "skip", True
    options.check_untyped_defs = options.namespace_packages = True
    options.cache_dir = "/dev/null"
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in sorted(root.glob("train/**/*.py"))}
    for uses in (SEEN, WRITTEN):
        uses.clear()  # this module is the plugin that mypy finds: it imports it by its file's name
    build.build([BuildSource(str(path), name.removesuffix(".__init__")) for path, name in names.items()], options)
    rooms = {str(path): name.removeprefix("train.") for path, name in names.items()}
    found: dict[str, set[str]] = {}
    for key, path, *_ in SEEN - WRITTEN:
        if not rooms[path].startswith("testing."):  # benchmarks are no part of the product
            found.setdefault(key, set()).add(rooms[path])
    return found
