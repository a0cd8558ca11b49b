"""A plan from a TOML or a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pycompress.plan_file import WrittenPlan

SUFFIXES = (".toml", ".yaml", ".yml")


def read_plan(path: Path) -> WrittenPlan:
    """The plan that a file says, in the words of :class:`~pycompress.plan_file.WrittenPlan`; one by hand needs no ``version``.

    Raises:
        ValueError: it is no such file, or says something else; the place is named. OSError: it cannot be read.
    """
    from pycompress import toml
    from pycompress.plan_file import VERSION, WrittenPlan

    if path.suffix not in SUFFIXES:
        raise ValueError(f"plan: {path}: expected a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    table = toml.read(path, "plan") if path.suffix == ".toml" else read_yaml(path)
    return WrittenPlan.of_table({"version": VERSION, **table}, f"plan: {path}")


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
