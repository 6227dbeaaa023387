"""Features of images by detectors, collected batch by batch: shared by processes, saved as they come, gone on with."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sidactl.commands.question import Question, on_every_rank
from sidactl.commands.resolve import load_dataset
from sidactl.commands.tasks import Task
from sidactl.commands.words import OnCount
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.store import COLLECTED, Artifact, LiveDir, Store, UnwritableError, sealed, unsealed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sidactl.data.dataset import Dataset
    from sidactl.detectors import Detector
    from sidactl.metrics import FeatureStats


MAX_BATCH_SIZE, BATCH_VALUES = 250, 1 << 20
"""images per batch: few enough that all their pixels are at most BATCH_VALUES values"""

MAX_REAL_IMAGES = 200_000
"""so many images of a dataset, drawn by a fixed seed, stand for it in precision, recall and KID, as in SiD"""

SAVE_EVERY_SEC = 20.0
"""so much work an interruption may cost; a save with Inception's moments takes some 0.1 s"""


@dataclass(frozen=True)
class Features:
    """Features [N, F] of images, and for each image a number that stands for its pixels, int64 [N]."""

    rows: "Tensor"
    digests: "Tensor"

    def by_content(self) -> "Tensor":
        """The rows in an order as good as drawn, which is the same in whatever order the images come."""
        return self.rows[self.digests.argsort(stable=True)]


@dataclass
class Work:
    """What `collect` is to go through: batches of uint8 images [B, C, H, W], and by which detectors.

    shared: this process's share of the batches from the given one on. keeps: the detectors whose features are kept one
    by one, beside their moments. name_of: what an image is called in errors, by its position.
    """

    num_batches: int
    shared: "Callable[[int], Iterator[Tensor]]"
    detectors: "Mapping[str, Detector]"
    keeps: Collection[str] = ()
    name_of: Callable[[int], str] = "image {}".format


@dataclass
class Collected:
    """By detector, the moments of all images; and the features of those detectors whose features are kept.

    Of several processes the first has them, the others none.
    """

    stats: "Mapping[str, FeatureStats]"
    features: Mapping[str, Features]


def collect(
    work: Work,
    place: LiveDir | None = None,
    *,
    name: str = "features",
    before: int = 0,
    tick: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    refuse: Callable[[str], None] | None = None,
) -> Collected:
    """Computes features of all batches, every process a share of them; the result depends on the batches alone.

    place: where what was computed is saved under `name` from time to time, and gone on from. before: images of other
    work in the same place, for who looks how far it is. tick: called with the images done so far. should_stop: ends it
    early. refuse: takes what is wrong with features that are not finite, which are left out then.
    Raises SidaError, naming the image, for such features where nobody takes it.
    """
    from sidactl.engine import ranks

    state = _State.begin(work, place, name, before)
    first = int(ranks.broadcast_from_rank0(lambda: str(state.num_batches)))
    if tick:
        tick(state.num_images)

    def computed() -> "Iterator[tuple[dict[str, Tensor], Tensor | None]]":
        for images in work.shared(first):
            rows = {detector: by(images) for detector, by in work.detectors.items()}
            yield rows, _digests(images) if work.keeps else None

    for rows, digests in ranks.gather_in_order(computed(), work.num_batches - first, should_stop=should_stop):
        if (wrong := state.wrong_in(rows)) and refuse:
            refuse(wrong)
            continue
        if wrong:
            raise SidaError(wrong, "Look at that image.")
        state.add(rows, digests)
        if tick:
            tick(state.num_images)
        if time.monotonic() - state.saved_sec > SAVE_EVERY_SEC:
            state.try_to_save(before)
    if time.monotonic() - state.saved_sec > SAVE_EVERY_SEC / 4:  # what else is to be done may take long
        state.try_to_save(before)
    return state.collected()


@dataclass
class _State:
    """What was collected so far, and how it lies in a live directory: NAME-collected.json says which files count."""

    work: Work
    place: LiveDir | None
    name: str
    stats: "dict[str, FeatureStats]"
    rows: "dict[str, list[Tensor]]"
    digests: "list[Tensor]" = field(default_factory=list)
    num_batches: int = 0
    num_images: int = 0
    saved_sec: float = field(default_factory=time.monotonic)
    num_saved: int = 0
    """of `digests`, those that lie in files, with the features beside them"""
    files: dict[str, str] = field(default_factory=dict)
    """by name, the SHA-256 of those that hold features"""

    @classmethod
    def begin(cls, work: Work, place: LiveDir | None, name: str, before: int) -> "_State":
        from sidactl.metrics import FeatureStats

        def new() -> "_State":
            stats = {detector: FeatureStats() for detector in sorted(work.detectors)}
            return cls(work, place, name, stats, {detector: [] for detector in sorted(work.keeps)})

        if place is None or not place.is_writer or not (place.path / f"{name}{COLLECTED}").exists():
            return new()
        state = new()
        try:
            state._read()
        except (OSError, ValueError, LookupError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            download.to_stderr(f"what an interrupted score left is not as it was saved ({reason}): beginning anew")
            for path in place.path.glob(f"{name}-*"):
                place.remove(path.name)
            return new()
        download.to_stderr(f"going on after {before + state.num_images:,} images, which were measured before")
        return state

    def wrong_in(self, rows: "Mapping[str, Tensor]") -> str | None:
        """The first image whose features are not finite, in words."""
        for detector, features in rows.items():
            bad = (~features.isfinite().all(1)).nonzero()
            if len(bad):
                by, which = self.work.detectors[detector].name, self.work.name_of(self.num_images + int(bad[0]))
                return f"features by {by} must be finite, those of {which} are not"
        return None

    def add(self, rows: "Mapping[str, Tensor]", digests: "Tensor | None") -> None:
        for detector, features in rows.items():
            self.stats[detector].add(features.to(self.work.detectors[detector].device))
            if detector in self.rows:
                self.rows[detector].append(features)
        if digests is not None:
            self.digests.append(digests)
        self.num_batches += 1
        self.num_images += len(next(iter(rows.values())))

    def collected(self) -> Collected:
        import torch

        kept = {d: Features(torch.cat(rows), torch.cat(self.digests)) for d, rows in self.rows.items() if rows}
        return Collected(self.stats, kept)

    def try_to_save(self, before: int) -> None:
        """Saves, or says once why not, and goes on without: it only spares time."""
        try:
            self._save(before)
        except UnwritableError as error:
            download.to_stderr(f"warning: {error.message}: an interruption would lose what is measured from here on")
            self.place = None

    def _save(self, before: int) -> None:
        """A kill at any moment leaves the state before or this one: NAME-collected.json comes last, in one step."""
        import safetensors.numpy
        import safetensors.torch
        import torch

        if self.place is None or not self.place.is_writer:
            return
        moments, old = f"{self.name}-moments-{self.num_batches}.safetensors", dict(self.files)
        self.files = {file: sha256 for file, sha256 in old.items() if "-moments-" not in file}
        if len(self.digests) > self.num_saved:
            held = {f"rows {i}": torch.cat(rows[self.num_saved :]) for i, rows in enumerate(self.rows.values())}
            held["digests"] = torch.cat(self.digests[self.num_saved :])
            self._write(f"{self.name}-rows-{self.num_batches}.safetensors", safetensors.torch.save(held))
        arrays = {f"{i} {k}": v for i, s in enumerate(self.stats.values()) for k, v in s.arrays().items()}
        self._write(moments, safetensors.numpy.save({key: a.copy(order="C") for key, a in arrays.items()}))
        said = {"of": self._identity(), "batches": self.num_batches, "images": self.num_images, "files": self.files}
        self.place.write(f"{self.name}{COLLECTED}", sealed(said))
        self.place.write("state.json", json.dumps({"state": {"done": before + self.num_images}}).encode())
        for file in set(old) - set(self.files):
            self.place.remove(file)
        self.num_saved, self.saved_sec = len(self.digests), time.monotonic()

    def _write(self, file: str, data: bytes) -> None:
        assert self.place
        self.place.write(file, data)
        self.files[file] = hashlib.sha256(data).hexdigest()

    def _identity(self) -> list[Any]:
        """What must be the same in whoever goes on; a GPU's images are not those of a CPU."""
        detectors = [self.work.detectors[name] for name in self.stats]
        by = [[detector.identity, detector.device.type] for detector in detectors]
        return [self.work.num_batches, by, [list(self.stats).index(name) for name in self.rows]]

    def _read(self) -> None:
        import safetensors.numpy
        import safetensors.torch

        from sidactl.metrics import FeatureStats

        assert self.place
        said = unsealed((self.place.path / f"{self.name}{COLLECTED}").read_bytes())
        if said["of"] != self._identity():
            raise ValueError("other images, detectors or devices")
        for file, sha256 in said["files"].items():
            data = (self.place.path / os.path.basename(file)).read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError(f"{file} is damaged")
            self.files[file] = sha256
            if "-moments-" in file:
                arrays = safetensors.numpy.load(data)
                for i, detector in enumerate(self.stats):
                    self.stats[detector] = FeatureStats.from_arrays(
                        {key: arrays[f"{i} {key}"] for key in FeatureStats().arrays()}
                    )
                continue
            held = safetensors.torch.load(data)
            for i, rows in enumerate(self.rows.values()):
                rows.append(held[f"rows {i}"])
            self.digests.append(held["digests"])
        self.num_batches, self.num_images = int(said["batches"]), int(said["images"])
        self.num_saved = len(self.digests)
        kept = [sum(map(len, rows)) for rows in (*self.rows.values(), *([self.digests] if self.rows else []))]
        if {stats.num_items for stats in self.stats.values()} | set(kept) != {self.num_images}:
            raise ValueError("some are missing")


def _digests(images: "Tensor") -> "Tensor":
    """Int64 [N] for uint8 images [N, C, H, W]; grey images have those of their RGB copies."""
    import torch

    rgb = images.expand(-1, 3, -1, -1)
    size = str(list(rgb.shape[1:])).encode()
    found = [hashlib.sha256(size + image.contiguous().numpy().tobytes()).digest()[:8] for image in rgb]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in found])


def of_images(
    dataset: "Dataset",
    detectors: "Mapping[str, Detector]",
    positions: "Sequence[int] | NDArray[np.int64] | None" = None,
    keeps: Collection[str] = (),
) -> Work:
    """The images of a dataset at these positions, all by default, in order."""
    from sidactl.engine import ranks

    chosen = range(dataset.num_images) if positions is None else positions
    size = images_per_batch(dataset.num_channels, dataset.resolution, dataset.width)
    starts = range(0, len(chosen), size)

    def shared(first: int) -> "Iterator[Tensor]":
        return (dataset.images(chosen[start : start + size]) for start in ranks.rank_share(starts[first:]))

    return Work(len(starts), shared, detectors, keeps)


def images_per_batch(num_channels: int, resolution: int, width: int | None = None) -> int:
    """How many images of this height (and width, where it is another) are held at once."""
    return max(1, min(MAX_BATCH_SIZE, BATCH_VALUES // (num_channels * resolution * (width or resolution))))


def stats_of(
    store: Store, data: Artifact, detector: "Detector", tick: OnCount | None = None, *, recheck: bool = False
) -> "tuple[FeatureStats, Artifact | None]":
    """Moments of all images of a dataset, and the stats artifact that holds them: computed once, by all processes.

    Where the run directory takes nothing there is no artifact, and the first of several processes alone has the
    moments. recheck: as in `resolve.resolve`.
    """
    import numpy as np

    from sidactl.engine import ranks

    params: dict[str, Any] = {"detector": detector.identity}
    question = _question(store, "stats", "dataset", data, detector, params, recheck)
    with question.known_or_working_together() as place:
        if isinstance(place, Artifact):
            return read_stats(store, place), place
        dataset = load_dataset(store, data)
        work = of_images(dataset, {detector.name: detector})
        stats = collect(work, place, tick=out_of(tick, dataset.num_images)).stats[detector.name]
        kept, buffer = None, io.BytesIO()
        if ranks.rank_and_size()[0] == 0:
            np.savez(buffer, allow_pickle=False, **stats.arrays())
            files = {"stats.npz": buffer.getvalue()}
            with suppress(UnwritableError):  # whoever asks is told by what becomes of the score
                kept = store.put("stats", files, inputs={"dataset": data.oid}, params=params)
                question.record(kept)
        kept = on_every_rank(store, kept)
        return (read_stats(store, kept) if kept else stats), kept


def read_stats(store: Store, artifact: Artifact) -> "FeatureStats":
    """The moments that a stats artifact of ours holds."""
    import numpy as np

    from sidactl.metrics import FeatureStats

    with np.load(io.BytesIO(store.read(artifact, "stats.npz")), allow_pickle=False) as held:
        return FeatureStats.from_arrays(dict(held))


def real_features(
    store: Store, data: Artifact, detector: "Detector", tick: OnCount | None = None, *, recheck: bool = False
) -> Features | None:
    """Features of a dataset's images, at most MAX_REAL_IMAGES of them: computed once, by all processes.

    The first of several processes has them, the others None. recheck: as in `stats_of`.
    """
    import numpy as np

    from sidactl.data.dataset import drawn_subset

    params: dict[str, Any] = {"detector": detector.identity, "at_most": MAX_REAL_IMAGES}
    question = _question(store, "features", "subject", data, detector, params, recheck)
    with question.known_or_working_together() as place:
        name = detector.name
        if isinstance(place, Artifact) and (known := read(store, {name: place})) is not None:
            return known.get(name)
        dataset = load_dataset(store, data)
        chosen = np.arange(dataset.num_images)
        if len(chosen) > MAX_REAL_IMAGES:
            chosen = drawn_subset(dataset.num_images, MAX_REAL_IMAGES, seed=0)
        work = of_images(dataset, {name: detector}, chosen, keeps=[name])
        live = None if isinstance(place, Artifact) else place
        found = collect(work, live, tick=out_of(tick, len(chosen))).features.get(name)
        if found:
            keep(question, found)
        return found


def _question(
    store: Store,
    command: str,
    role: str,
    data: Artifact,
    detector: "Detector",
    params: Mapping[str, Any],
    recheck: bool,
) -> Question:
    title = f"of {data.params.get('name') or data.oid[:12]} by {detector.name}"
    task = Task("moments" if command == "stats" else command, title, [], params, {"dataset": data.oid})
    return Question(store=store, command=command, params=params, inputs={role: data}, recheck=recheck, task=task)


def out_of(tick: OnCount | None, total: int) -> Callable[[int], None] | None:
    """What `collect` tells the images done so far, where somebody is told them out of so many."""
    return None if tick is None else lambda done: tick(done, total)


def keep(question: Question, features: Features) -> None:
    """Keeps features as the answer to their question, where the run directory takes them: they only save time."""
    import safetensors.torch

    tensors = {"features": features.rows.contiguous(), "digests": features.digests}
    with suppress(UnwritableError):  # what becomes of the score is told
        files, inputs = (
            {"features.safetensors": safetensors.torch.save(tensors)},
            {"subject": question.inputs["subject"].oid},
        )
        question.record(question.store.put("features", files, inputs=inputs, params=question.params))


def read(store: Store, artifacts: Mapping[str, Artifact | None]) -> Mapping[str, Features] | None:
    """The features that these artifacts hold, by the same names; None where one is not there.

    Nor where an older version kept one, without digests. The first of several processes has them, the others nothing.
    """
    import safetensors.torch

    from sidactl.engine import ranks

    found: dict[str, Features] = {}
    for name, artifact in artifacts.items() if ranks.rank_and_size()[0] == 0 else ():
        held = safetensors.torch.load(store.read(artifact, "features.safetensors")) if artifact else {}
        if "digests" in held:
            found[name] = Features(held["features"], held["digests"])
    return found if ranks.broadcast_from_rank0(lambda: "all" if len(found) == len(artifacts) else "") else None
