"""The record as one HTML page: no script, no network, no other file."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from pycompress.report.sections import headline, sections

MOST_BYTES = 1_000_000


def page(data: dict[str, Any]) -> str:
    """Raises ImportError that names the extra, ValueError where the page would be larger than a megabyte."""
    try:
        import jinja2
        import matplotlib as mpl  # noqa: F401 - the figures need it
    except ImportError as error:
        raise ImportError(f'report needs jinja2 and matplotlib ({error}): pip install "pycompress[report]"') from error
    from pycompress.report.figures import drawn

    parts = sections(data)
    figures = {
        part.name: drawn(part.figure, data, f"{part.title}: {part.tables[0].caption}") for part in parts if part.figure
    }
    template = files("pycompress.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(template).render(data=data, headline=headline(data), sections=parts, figures=figures)
    if (size := len(text.encode())) > MOST_BYTES:
        raise ValueError(
            f"report: the page has {size:,} bytes, expected at most {MOST_BYTES:,}: .json and .md hold as much as there is"
        )
    return text
