"""The record as Markdown, and as a model card."""

from __future__ import annotations

import json
import re
from typing import Any

from pycompress.report.sections import Table, headline, sections

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!&])")


def escaped(text: str) -> str:
    """As the text that it is, in one line, whatever is in it."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown(data: dict[str, Any]) -> str:
    """Headings, sentences and tables; figures are left out, the tables have their numbers."""
    lines = [f"# {escaped(data['title'])}", "", escaped(headline(data)), ""]
    for section in sections(data):
        lines += [f"## {escaped(section.title)}", ""]
        for text in section.text:
            lines += [escaped(text), ""]
        if section.points:
            lines += [*(f"- {escaped(point)}" for point in section.points), ""]
        for table in section.tables:
            lines += [f"**{escaped(table.caption)}**", "", *_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Table) -> list[str]:
    rows = [table.head, tuple("---" for _ in table.head), *table.rows]
    return [f"| {' | '.join(cell if cell == '---' else escaped(cell) for cell in row)} |" for row in rows]


def card(data: dict[str, Any], licence: str, base_model: str) -> str:
    """YAML, in which each value is written as JSON, which is YAML too; then the Markdown."""
    front: dict[str, Any] = {"library_name": "pycompress", "tags": ["pycompress", "compression", *_methods(data)]}
    if licence:
        front["license"] = licence
    if base_model:
        front["base_model"] = base_model
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    use = (
        "## Use\n\n```python\nimport pycompress as pc\n\nmodel = pc.load(dense_model, \"model.safetensors\")"
        "  # a model of the same class as before; its weights are replaced\n```\n"
    )  # fmt: skip
    return f"---\n{head}\n---\n{markdown(data)}\n{use}"


def _methods(data: dict[str, Any]) -> list[str]:
    return sorted({layer["method"] for layer in data["layers"] if layer["method"]})
