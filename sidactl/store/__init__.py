"""The run directory: immutable objects named by their SHA-256, refs, answers, live directories; not what they mean."""

from sidactl.store.artifact import KINDS, Artifact, BrokenError, canonical_json, digest
from sidactl.store.collect import COLLECTED, GcReport, collect_garbage, rehash
from sidactl.store.files import FileEntry, UnwritableError, sealed, unsealed
from sidactl.store.live import QUESTION, LiveDir
from sidactl.store.objects import SETTLED_NS, Store

__all__ = [
    "COLLECTED",
    "KINDS",
    "QUESTION",
    "SETTLED_NS",
    "Artifact",
    "BrokenError",
    "FileEntry",
    "GcReport",
    "LiveDir",
    "Store",
    "UnwritableError",
    "canonical_json",
    "collect_garbage",
    "digest",
    "rehash",
    "sealed",
    "unsealed",
]
