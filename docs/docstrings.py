"""Reads the package's docstrings for the API pages.

They are in the Google style but for three things: roles such as ``:class:`Int8```, sections on one line or without a blank
line above, and several exceptions in one paragraph below ``Raises``.
"""

import re
from itertools import pairwise
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:attr|class|exc|func|meth|mod):(?=`)")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Shapes|Yields):(?: +(\S.*))?$", re.MULTILINE)
RAISES = re.compile(r"^Raises:\n((?: +\S.*\n?)+)", re.MULTILINE)
EXCEPTION = re.compile(r"(?:\w+[,;] )*(?:\w+Error|Refused): ")


def readable(text: str) -> str:
    """A docstring in the words that griffe knows."""
    text = SECTION.sub(lambda found: f"\n{found[1]}:" + (f"\n    {found[2]}" if found[2] else ""), ROLE.sub("", text))
    return RAISES.sub(lambda found: "Raises:\n" + exceptions(found[1]), text)


def exceptions(paragraph: str) -> str:
    """One line for each exception: ``TypeError: no matrix. ValueError: it is empty.`` are two."""
    words = " ".join(paragraph.split())
    starts = [0, *(found.start() for found in EXCEPTION.finditer(words) if found.start()), len(words)]
    return "".join(f"    {words[a:b].strip()}\n" for a, b in pairwise(starts))


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
