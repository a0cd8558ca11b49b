"""Real sentences of different kinds, so that a model is calibrated on other text than it is measured on.

Film reviews, news, product reviews and short messages, rated by people (Hutto & Gilbert 2014, "VADER: a parsimonious rule-based
model for sentiment analysis of social media text"), come in the source distribution of vaderSentiment, which pip fetches once into
`build/`; nothing of it is redistributed. Docstrings: `pycompress.demo.docstring_sentences`.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent.parent / "build" / "texts"
PACKAGE = "vaderSentiment==3.3.2"
SOURCES = {
    "reviews": "movieReviewSnippets", "news": "nytEditorialSnippets", "products": "amazonReviewSnippets", "messages": "tweets",
}  # fmt: skip
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


class Rated(NamedTuple):
    """A text, and the mean of its ratings from -4 (most negative) to 4."""

    text: str
    rating: float


@cache
def rated(source: str) -> list[Rated]:
    """All texts of a source of SOURCES of at least 5 words, in an order that is always the same, and is not that of the file."""
    fetch()
    with tarfile.open(FOLDER / "vaderSentiment-3.3.2.tar.gz") as package:
        inner = package.extractfile(_ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            name = f"hutto_ICWSM_2014/{SOURCES[source]}_GroundTruth.txt"
            member = archive.extractfile(name)
            assert member is not None
            lines = member.read().decode("utf-8", errors="replace").splitlines()
    fields = [line.split("\t") for line in lines]
    found = [Rated(f[2].strip(), float(f[1])) for f in fields if len(f) == 3 and len(f[2].split()) >= 5]
    random.Random(1).shuffle(found)
    return found


def evaluation(count: int = 256) -> list[str]:
    """Film reviews to measure on."""
    return [review.text for review in rated("reviews")[:count]]


def mixed(count: int, seed: int = 0) -> list[str]:
    """Different sentences of all sources, but for the first 2,000 film reviews, which are to measure on."""
    held = set(evaluation(2000))
    texts = [item.text for source in SOURCES for item in rated(source) if item.text not in held]
    texts = list(dict.fromkeys(texts))
    random.Random(seed).shuffle(texts)
    if count > len(texts):
        raise ValueError(f"mixed: count is {count}, expected at most {len(texts)}")
    return texts[:count]


def fetch() -> None:
    """Downloads the package where it is not there yet."""
    if (FOLDER / "vaderSentiment-3.3.2.tar.gz").exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-binary", ":all:", "--no-deps", "--dest", str(FOLDER)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
