"""Which detectors had a part in how a generator came to be: a number is a claim under the others alone."""

from collections.abc import Sequence

from sidactl import catalog
from sidactl.commands import reference
from sidactl.errors import MissingError
from sidactl.store import Artifact, Store

_ANCESTORS = ("net", "generator", "teacher")


def seen_by(store: Store, artifact: Artifact) -> frozenset[str]:
    """Detectors, as `scores.detector_label` calls them, by which an artifact was trained, chosen or stopped.

    Those of what it was made from count, too: samples are chosen as their generator was, and what is started from a
    generator inherits its eyes.
    """
    own = {str(artifact.results["detector"])} if artifact.results.get("selection_score") is not None else set()
    own |= set(artifact.results.get("trained_by", ()))
    parents = [store.get(oid) for role, oid in artifact.inputs.items() if role in _ANCESTORS]
    return frozenset(own).union(*(seen_by(store, parent) for parent in parents))


def trained_by(store: Store, artifact: Artifact) -> frozenset[str]:
    """Detectors on whose features a generator, or what it was started from, was trained."""
    own = frozenset(map(str, artifact.results.get("trained_by", ())))
    parents = [store.get(oid) for role, oid in artifact.inputs.items() if role == "generator"]
    return own.union(*(trained_by(store, parent) for parent in parents))


def blind_detector(store: Store, subject: Artifact, asked: str | None, seen: Sequence[str]) -> str | None:
    """A built-in detector that did not see the subject, where those that score it did; None where none is needed.

    Nor where there are no images to compare with, as its own statistics are needed.
    """
    eyes = seen_by(store, subject)
    if not eyes or not set(seen) <= eyes:
        return None
    return next((name for name in built_in_eyes(store, subject, asked) if name not in eyes), None)


def built_in_eyes(store: Store, subject: Artifact, asked: str | None) -> tuple[str, ...]:
    """The built-in detectors for the images that a subject is compared with; none where those are not there."""
    try:
        compared = reference.find(store, asked, subject, "images")
    except MissingError:
        return ()
    return catalog.EYES.get(reference.dataset_name(store, compared), catalog.EYES[None])
