"""Class labels: dataset.json, what its labels must be, and how often each class is there."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidactl.data.images import first_line, printable
from sidactl.errors import SidaError

MAX_LABEL = 999_999

LABEL_FILE = "dataset.json"

_LABELS = re.compile(rb'\s*\{\s*"labels"\s*:\s*\[')

_PAIR = re.compile(rb'\["([^"\\\x00-\x1f]*)", ?(0|[1-9]\d{0,5})\](, ?|\])')


class LabelFile(NamedTuple):
    """What a dataset.json says: the class index of each image by its name, and the names of the classes.

    None where it says `"labels": null`, or has no names.
    """

    labels: dict[str, int] | None
    class_names: list[str] | None = None

    @property
    def label_dim(self) -> int:
        """Number of classes: one more than the highest, or as many as have names."""
        return max(max((self.labels or {}).values(), default=-1) + 1, len(self.class_names or ()))


def parse_labels(text: bytes, where: str) -> LabelFile:
    """The labels of a dataset.json, where `where` names the file in errors.

    Raises SidaError for anything that is neither null nor a list of [name, integer >= 0], for an empty list, and for a
    name with two labels.
    """
    hint = 'Write {"labels": [["name.png", 0], ...]} with integer classes from 0.'

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]:
            raise ValueError(f"the key {json.dumps(twice[0])[:60]} twice")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise SidaError(f"{where} must be JSON, got {first_line(error)}", hint) from error
    if isinstance(document, dict) and "labels" not in document:
        got = ", ".join(json.dumps(key)[:60] for key in list(document)[:5]) or "nothing"
        raise SidaError(f'{where} must hold "labels", got {got}', hint)
    entries = document["labels"] if isinstance(document, dict) else document
    if isinstance(document, dict) and entries is None:
        return LabelFile(None)
    if isinstance(document, dict) and entries == []:
        raise SidaError(
            f"{where} must label images, got an empty list", 'Label them, or write {"labels": null} for none.'
        )
    labels: dict[str, int] = {}
    for entry in entries if isinstance(document, dict) and isinstance(entries, list) else [entries]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise SidaError(f"{where} must hold pairs of name and class, got {json.dumps(entry)[:60]}", hint)
        name, label = entry[0], check_label(entry[1], f"{printable(entry[0])} in {where}")
        if labels.setdefault(name, label) != label:
            raise SidaError(
                f"{where} must give each image one class, got {labels[name]} and {label} for {printable(name)}",
                "Correct it.",
            )
    names = document.get("class_names")
    if names is not None and not (
        isinstance(names, list)
        and len(names) > max(labels.values())
        and all(isinstance(name, str) and name.isprintable() for name in names)
    ):
        raise SidaError(f"class_names in {where} must be a list with a name for each class", "Correct it, or drop it.")
    return LabelFile(labels, names)


def labels_in_order(text: bytes, names: Iterable[str], count: int) -> tuple[NDArray[np.int64], bytes] | None:
    """The labels of a dataset.json that lists just these `count` names, in this order, as tools write it.

    With them the text that is left when one pair, of the highest class, stands for all. None for any other text:
    `parse_labels` takes all, but as objects the labels of a million images would take half a gigabyte.
    """
    head = _LABELS.match(text)
    if head is None:
        return None
    labels, position = np.empty(count, np.int64), head.end()
    for index, name in enumerate(names):
        pair = _PAIR.match(text, position)
        if pair is None or pair[1] != name.encode() or (pair[3] == b"]") != (index == count - 1):
            return None
        labels[index], position = int(pair[2]), pair.end()
    return labels, b'%s["", %d]]%s' % (text[: head.end()], labels.max(), text[position:])


def read_labels(path: Path) -> LabelFile:
    """The labels of a dataset.json on its own, by image name. Raises SidaError where it has none."""
    hint = "Give a dataset.json with labels."
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SidaError(f"{path} cannot be read: {error.strerror}", "Check the path.") from error
    found = parse_labels(text, str(path))
    if found.labels is None:
        raise SidaError(f"{path} must hold labels, got none", hint)
    return found


def class_counts(labels: Sequence[int] | NDArray[np.int64], label_dim: int = 0) -> list[int]:
    """How many of each class there are, from class 0 to the highest, of `label_dim` at least; empty without labels."""
    return [int(count) for count in np.bincount(labels, minlength=label_dim)] if len(labels) else []


def check_label(label: object, where: str) -> int:
    """The class index itself, an integer from 0 to 999999; raises SidaError naming `where` for all else."""
    if type(label) is not int or not 0 <= label <= MAX_LABEL:
        raise SidaError(f"label of {where} must be an integer from 0 to {MAX_LABEL}, got {label!r}", "Correct it.")
    return label


def labels_of(
    labels: Mapping[str, int], names: Sequence[str], where: str, *, allow_more: bool = False
) -> NDArray[np.int64]:
    """The label of each image in `names`; `where` names the dataset.json.

    Raises SidaError where an image has none, instead of dropping all labels without a word, and where one is named that
    is not there.
    """
    hint = f'or set "labels" to null in {LABEL_FILE} to go without.'
    missing = next((name for name in names if name not in labels), None)
    if missing is not None:
        raise SidaError(f"{where} must label every image, got none for {printable(missing)}", f"Add its label, {hint}")
    if len(labels) > len(names) and not allow_more:
        unknown = set(labels) - set(names)
        raise SidaError(
            f"{where} names {len(unknown):,} images that are not there, the first {printable(min(unknown))}",
            f"Put them there, remove their labels, {hint}",
        )
    return np.fromiter((labels[name] for name in names), np.int64, len(names))
