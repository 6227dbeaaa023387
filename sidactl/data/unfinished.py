"""A dataset on its way: written member by member, saved as it goes, gone on with after a kill."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sidactl.data.archive_writer import BLOCK_BYTES, UnfinishedZip
from sidactl.data.images import first_line
from sidactl.data.listing import OnLine
from sidactl.data.transforms import check_shape
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import sealed, unsealed

SAVE_EVERY_SEC = 5.0

FILES = ("images.zip", "members")

_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """What `prepare` wrote. `skipped`: name and reason of each image left out, in the order of the source.

    class_names: one for each class, or None where the source has no names for them.
    """

    num_images: int
    resolution: int
    num_channels: int
    label_dim: int
    class_counts: list[int]
    skipped: list[tuple[str, str]]
    kind: Literal["pixels", "latents"]
    class_names: list[str] | None = None
    width: int | None = None
    """where it is not the height, which is `resolution`"""
    contact_sheet: bytes | None = field(default=None, repr=False)
    """PNG of the images that latents were made of; None of all else, which shows itself"""


class NoRoomError(SidaError):
    """The disk is too small for what is to come; what has come is good all the same."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """How far a zip has come: the first `done` items of its source are these bytes of its two files."""

    done: int = 0
    num_images: int = 0
    num_skipped: int = 0
    image_bytes: int = 0
    member_bytes: int = 0


@dataclass
class _Saved:
    """What state.json says, and the hashes of the bytes that it counts."""

    state: _State = field(default_factory=_State)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    first: tuple[str, tuple[int, int, int]] | None = None
    sha256: "tuple[hashlib._Hash, hashlib._Hash]" = field(default_factory=lambda: (hashlib.sha256(), hashlib.sha256()))

    @classmethod
    def read(cls, folder: Path) -> "_Saved":
        """ValueError and its like where anything in the folder is not as it was saved."""
        said = unsealed((folder / _STATE).read_bytes())
        state = _State(**said["state"])
        saved = cls(state, [(name, reason) for name, reason in said["skipped"]])
        saved.first = said["first"] and (said["first"][0], tuple(said["first"][1]))
        sizes = (state.image_bytes, state.member_bytes)
        for name, size, sha256, known in zip(FILES, sizes, saved.sha256, said["sha256"], strict=True):
            with (folder / name).open("rb") as file:
                while size > 0 and (data := file.read(min(size, BLOCK_BYTES))):
                    sha256.update(data)
                    size -= len(data)
            if size or sha256.hexdigest() != known:
                raise ValueError(f"{name} is damaged")
        return saved


@dataclass
class Unfinished:
    """A dataset zip in the making; its folder, once saved, is what another process can go on from.

    sha256: of the bytes of the two files that `state` counts.
    """

    folder: Path
    zip: UnfinishedZip
    state: _State
    skipped: list[tuple[str, str]] = field(default_factory=list)
    first: tuple[str, tuple[int, int, int]] | None = None
    num_images: int = 0
    saved_sec: float = 0.0
    sha256: "Sequence[hashlib._Hash]" = ()
    any_size: bool = False
    is_for_latents: bool = False

    @classmethod
    def open(cls, folder: Path, say: OnLine) -> "Unfinished":
        """Goes on from what was saved in the folder, or begins; anew where not all of it is as it was saved."""
        saved = _Saved()
        if (folder / _STATE).exists():
            try:
                saved = _Saved.read(folder)
            except (OSError, ValueError, LookupError, TypeError) as error:
                say(
                    f"what an interrupted preparation left is not as it was saved ({first_line(error)}): beginning anew"
                )
        state, sizes = saved.state, (saved.state.image_bytes, saved.state.member_bytes)
        files = []
        for name, size in zip(FILES, sizes, strict=True):
            (folder / name).touch()
            file = (folder / name).open("r+b")
            file.truncate(size)
            file.seek(size)
            files.append(file)
        zipped = UnfinishedZip(*files)
        zipped.sha256 = saved.sha256
        now, copies = time.monotonic(), tuple(sha256.copy() for sha256 in saved.sha256)
        return cls(folder, zipped, state, saved.skipped, saved.first, state.num_images, now, copies)

    def check(self, source_name: str, shape: tuple[int, int, int]) -> None:
        """SidaError where an image's shape is not that of the first, or cannot be used at all."""
        self.first = self.first or (source_name, shape)
        check_shape(source_name, shape, *self.first, any_size=self.any_size, is_for_latents=self.is_for_latents)

    def add(self, name: str, data: bytes, label: int | None) -> None:
        self.zip.add(name, data, label)
        self.num_images += 1

    def skip(self, source_name: str, reason: str) -> None:
        self.skipped.append((source_name, reason))

    def commit(self, done: int) -> None:
        """What was added so far is the first `done` items of the source."""
        self.state = _State(
            done=done,
            num_images=self.num_images,
            num_skipped=len(self.skipped),
            image_bytes=self.zip.images.tell(),
            member_bytes=self.zip.members.tell(),
        )
        self.sha256 = tuple(sha256.copy() for sha256 in self.zip.sha256)
        if time.monotonic() - self.saved_sec > SAVE_EVERY_SEC:
            self.save()

    def save(self) -> None:
        """Flushes what was committed, then says so: a kill at any moment leaves one of two good states."""
        for file in (self.zip.images, self.zip.members):
            file.flush()
            os.fsync(file.fileno())
        skipped = self.skipped[: self.state.num_skipped]
        said = {
            "state": asdict(self.state),
            "skipped": skipped,
            "first": self.first,
            "sha256": [sha256.hexdigest() for sha256 in self.sha256],
        }
        temporary = self.folder / f".{_STATE}.tmp"
        with temporary.open("wb") as state_file:
            state_file.write(sealed(said))
            state_file.flush()
            os.fsync(state_file.fileno())
        temporary.replace(self.folder / _STATE)
        self.saved_sec = time.monotonic()

    def finish(self, source: str, class_names: Sequence[str] | None) -> PreparedDataset:
        """Completes the zip; SidaError where it holds no image."""
        if self.first is None:
            raise SidaError(
                f"{source} must hold an image that can be used, got none",
                "Mend the images or choose another transform.",
            )
        self.save()
        found = self.zip.finish(class_names)
        channels, size, width = self.first[1]
        if self.is_for_latents:
            channels, size, width = 8, size // 8, width // 8
        counts = [found[label] for label in range(max(max(found) + 1, len(class_names or ())))] if found else []
        return PreparedDataset(
            num_images=self.num_images,
            resolution=size,
            num_channels=channels,
            label_dim=len(counts),
            class_counts=counts,
            skipped=self.skipped,
            kind="latents" if channels == 8 else "pixels",
            width=None if width == size else width,
            class_names=list(class_names) if class_names else None,
        )


@contextmanager
def open_unfinished(
    destination: Path, work: Path | None, say: OnLine, *, any_size: bool, is_for_latents: bool
) -> Iterator[Unfinished]:
    """A zip to write in the block, and to complete there; becomes `destination` after it.

    An interruption leaves it in `work`, where there is one; bad input leaves nothing.
    """
    folder = work or destination.with_name(f"{destination.name}.tmp")
    try:
        folder.mkdir(exist_ok=work is not None)
        zipped = Unfinished.open(folder, say)
        zipped.any_size, zipped.is_for_latents = any_size, is_for_latents
        with zipped.zip.images, zipped.zip.members:
            try:
                yield zipped
            except SidaError as error:
                if not (isinstance(error, NoRoomError) and zipped.state.done):
                    for name in (*FILES, _STATE):
                        (folder / name).unlink(missing_ok=True)
                raise
            except BaseException:
                if work:
                    zipped.save()
                raise
        if destination != folder / FILES[0]:  # else the caller has yet to take it, and may fail to
            (folder / FILES[0]).replace(destination)
            for name in (FILES[1], _STATE):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot prepare {destination} ({error.strerror or error}: {error.filename or destination})"
        raise SidaError(message, "Mend that, then repeat.", exit_code=EXIT_FAILED) from error
    finally:
        if not work:
            shutil.rmtree(folder, ignore_errors=True)
