"""A plan, or candidates for one, from a TOML or a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pycompress.methods.method import Method
    from pycompress.plan_file import WrittenPlan

SUFFIXES = (".toml", ".yaml", ".yml")


def read_plan(path: Path) -> WrittenPlan:
    """The plan that a file says, in the words of :class:`~pycompress.plan_file.WrittenPlan`; one by hand needs no ``version``.

    Raises:
        ValueError: it is no such file, or says something else; the place is named. OSError: it cannot be read.
    """
    from pycompress.plan_file import VERSION, WrittenPlan

    return WrittenPlan.of_table({"version": VERSION, **_table(path, "plan")}, f"plan: {path}")


def read_candidates(path: Path) -> dict[str, Method]:
    """Methods by name: a table ``candidates`` in the words of a plan's ``layers``. Raises as :func:`read_plan`."""
    from pycompress.plan_file import VERSION, WrittenPlan

    table = _table(path, "candidates")
    if set(table) != {"candidates"}:
        raise ValueError(f"candidates: {path}: it holds {', '.join(table) or 'nothing'}, expected a table candidates")
    found = WrittenPlan.of_table({"version": VERSION, "layers": table["candidates"]}, f"candidates: {path}")
    if dense := [name for name, method in found.items() if method is None]:
        raise ValueError(f"candidates: {path}: {dense[0]} is dense, which every layer may stay anyway")
    return {name: method for name, method in found.items() if method is not None}


def _table(path: Path, what: str) -> dict[str, Any]:
    from pycompress import toml

    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what}: {path}: expected a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return toml.read(path, what) if path.suffix == ".toml" else read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ValueError where it is no YAML, or names a key twice (PyYAML would take the last one)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    try:
        table = yaml.load(path.read_text("utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f'plan: {path}: not YAML (a glob such as "*" needs quotes): {error}') from None
    if not isinstance(table, dict):
        raise ValueError(f"plan: {path}: it holds {type(table).__name__}, expected layers with a table for each glob")
    return table
