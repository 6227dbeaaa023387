"""Every entry of the catalog as a row of one table."""

from collections.abc import Mapping
from typing import NamedTuple

from sidactl.catalog.datasets import DATASETS, VAES
from sidactl.catalog.entries import Entry, Published
from sidactl.catalog.generators import COMPARISONS, GENERATORS
from sidactl.catalog.scoring import DETECTORS, REFERENCES
from sidactl.catalog.teachers import TEACHERS

_KINDS: Mapping[str, Mapping[str, Entry]] = {
    "teacher": TEACHERS,
    "generator": GENERATORS,
    "comparison": COMPARISONS,
    "dataset": DATASETS,
    "detector": DETECTORS,
    "reference": REFERENCES,
    "vae": VAES,
}


class Row(NamedTuple):
    """An entry as `sidactl ls --catalog` shows it."""

    name: str
    kind: str
    about: str
    size_bytes: int | None
    licence: str
    scores: Mapping[str, Published]
    url: str | None
    """of the file, or of the page to get it from; None for what ships with the package or has no published file"""


def rows() -> list[Row]:
    """Every entry, by kind."""
    return [
        Row(
            e.name,
            kind,
            e.about,
            e.source.size_bytes if e.source else None,
            e.licence,
            e.scores,
            e.source.url if e.source else getattr(e, "where", None),
        )
        for kind, group in _KINDS.items()
        for e in group.values()
    ]
