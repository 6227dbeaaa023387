"""What training steps are fed with: micro-batches by position and their draws, datasets, classes alone. No loss.

Every draw is a function of the seed and a position.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sidactl.data.codec import LatentCodec, PixelCodec
from sidactl.engine import devices as engine_devices
from sidactl.errors import SidaError
from sidactl.methods.base import Pairs
from sidactl.noise import Draws, JoinedDraws
from sidactl.recipes import NetSpec
from sidactl.sampling import SeededNoise
from sidactl.scopes import scope

STREAMS = {
    "latent": 0,
    "diffusion": 1,
    "augment": 2,
    "dropout": 3,
    "posterior": 4,
    "pairs": 5,
    "step": 6,
    "label_dropout": 7,
}


class SeededDraws:
    """Draws from one torch generator on the training device. Implements `Draws`."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device

    def normal(self, shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)

    def uniform(self, shape: Iterable[int]) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self._device)

    def integers(self, high: int, shape: Iterable[int]) -> Tensor:
        return torch.randint(high, tuple(shape), generator=self._generator, device=self._device)


def stream_seed(seed: int, stream: str, index: int) -> int:
    """The 64-bit seed of one micro-batch in one stream of randomness."""
    return int(np.random.SeedSequence((seed, STREAMS[stream], index)).generate_state(1, np.uint64)[0])


def _no_pairs() -> Pairs:
    raise AssertionError("this run has no pairs")


@dataclass(frozen=True)
class MicroBatch:
    """Labels, one-hot [b, K], where random numbers come from, and real images. Implements `methods.base.Batch`."""

    labels: Tensor
    latent: Draws
    diffusion: Draws
    augment: Draws
    dropout_seeds: Sequence[int]
    """of each micro-batch"""
    reals: Callable[[], Tensor]
    """fetches the images as networks see them, [b, C, H, W]"""
    pairs: Callable[[], Pairs] = _no_pairs
    chosen: Callable[[int], int] = lambda below: 0
    label_dropout: Draws | None = None
    """for the labels that the fake score does not see"""
    num_micro_batches: int = 1
    starts: Sequence[int] = (0,)
    """where in the batch of a step each micro-batch begins"""
    labels_of_reals: Tensor | None = None
    """where they are not `labels`"""

    @property
    def real_labels(self) -> Tensor:
        return self.labels if self.labels_of_reals is None else self.labels_of_reals

    @property
    def positions(self) -> Tensor:
        size = len(self.labels) // self.num_micro_batches
        return torch.cat([torch.arange(s, s + size, device=self.labels.device) for s in self.starts])

    @classmethod
    def joined(cls, parts: Sequence["MicroBatch"]) -> "MicroBatch":
        """Several as one."""
        if len(parts) == 1:
            return parts[0]
        latent, diffusion, augment = (
            JoinedDraws([getattr(part, stream) for part in parts]) for stream in ("latent", "diffusion", "augment")
        )
        return cls(
            torch.cat([p.labels for p in parts]),
            latent,
            diffusion,
            augment,
            [seed for part in parts for seed in part.dropout_seeds],
            cache(lambda: torch.cat([p.reals() for p in parts])),
            cache(lambda: Pairs(*map(torch.cat, zip(*(p.pairs() for p in parts), strict=True)))),
            parts[0].chosen,
            JoinedDraws([part.label_dropout for part in parts if part.label_dropout]),
            len(parts),
            [start for part in parts for start in part.starts],
            None if parts[0].labels_of_reals is None else torch.cat([p.real_labels for p in parts]),
        )


class MicroBatches(Protocol):
    """Training batches by position: batch number `batch` in all, micro-batch `round` of it."""

    def get(self, batch: int, round: int) -> MicroBatch: ...


class ImageSource(Protocol):
    """What training needs of a dataset; `data.Dataset` is one."""

    num_images: int
    is_latents: bool

    def images(self, indices: Any) -> Tensor: ...

    def one_hot(self, indices: Any) -> Tensor: ...


class PairSource(Protocol):
    """Pairs of noise and the teacher's images by index, on the training device."""

    num_pairs: int

    def pairs(self, indices: Tensor) -> Pairs: ...


class TeacherPairs:
    """A teacher's images of a range of seeds, each beside its noise and class. Implements `PairSource`.

    labels: the class of each image, or None of a teacher without classes.
    """

    def __init__(self, samples: ImageSource, labels: Any, first_seed: int, spec: NetSpec, device: torch.device) -> None:
        self._samples, self._first_seed, self._spec, self._device = samples, first_seed, spec, device
        self._labels = None if labels is None else torch.as_tensor(labels)
        self.num_pairs = samples.num_images

    def pairs(self, indices: Tensor) -> Pairs:
        """Those of these images, whose noise is drawn again from its seed."""
        spec, chosen = self._spec, indices.cpu()
        noise = SeededNoise([self._first_seed + index for index in chosen.tolist()], self._device)
        one_hot = torch.zeros(len(chosen), spec.label_dim, device=self._device)
        if self._labels is not None:
            one_hot[torch.arange(len(chosen)), self._labels[chosen]] = 1
        return Pairs(
            noise.normal((spec.img_channels, spec.img_resolution, spec.img_resolution)),
            one_hot,
            engine_devices.sent(self._samples.images(chosen), self._device) / 127.5 - 1,
        )


class IndexOrder(Protocol):
    """The order in which a dataset is read; `data.DataOrder` is one."""

    def indices(self, start: int, count: int) -> Any: ...


class ClassesAlone:
    """Classes without images: all that a method without real images needs of a dataset. Implements `ImageSource`.

    labels: the class of each image that is not there, as many of each as the data have; every class once by default.
    """

    is_latents = False

    def __init__(self, label_dim: int, labels: Sequence[int] | None = None) -> None:
        self._one_hot = torch.eye(label_dim) if label_dim else torch.zeros(1, 0)
        self._labels = torch.arange(len(self._one_hot)) if labels is None else torch.tensor(labels)
        self.num_images = len(self._labels)

    def images(self, indices: Any) -> Tensor:
        raise SidaError("this mode needs real images, got classes alone", "Pass --dataset REF.")

    def one_hot(self, indices: Any) -> Tensor:
        return self._one_hot[self._labels[torch.as_tensor(indices)]]


_AHEAD_BYTES = 1 << 26
"""of images that are read before they are asked for: a pass or several"""
_MOST_AHEAD = 64

Place = tuple[int, int]
"""batch and round"""


class ReadAhead:
    """Reads images in a thread before they are asked for, in the order of the step before.

    What follows a micro-batch is learned: its batch, counted from there, and its round. What comes in another order is
    read when it is asked for. An error of the thread is raised where its images are asked for, and nowhere else.
    """

    def __init__(self, read: Callable[[int, int], Tensor]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._lock = threading.Lock()  # passes may go side by side
        self._next: dict[Place, Place] = {}
        self._last: Place | None = None
        self._begun: dict[Place, Future[Tensor]] = {}

    def get(self, batch: int, round: int) -> Tensor:
        """The images of a micro-batch; begins with those that come after it."""
        with self._lock:
            mine = self._begun.pop((batch, round), None)
        images = self._read(batch, round) if mine is None else mine.result()
        with self._lock:
            if self._last is not None:
                self._next[self._kind(*self._last)] = batch - self._last[0], round
            self._last = batch, round
            expected = list(self._expected(batch, round, max(1, _AHEAD_BYTES // max(images.nbytes, 1))))
            for place in self._begun.keys() - set(expected):
                self._begun.pop(place).cancel()
            for place in expected:
                if place not in self._begun:
                    self._begun[place] = self._pool.submit(self._read, *place)
        return images

    @staticmethod
    def _kind(batch: int, round: int) -> Place:
        return batch % 2, round  # a step of a distillation has two batches

    def _expected(self, batch: int, round: int, num_ahead: int) -> Iterator[Place]:
        for _ in range(min(num_ahead, _MOST_AHEAD)):
            if (step := self._next.get(self._kind(batch, round))) is None:
                return
            batch, round = batch + step[0], step[1]
            yield batch, round


class DatasetBatches:
    """Micro-batches of a dataset in a position-addressed order, read ahead in a thread. Implements `MicroBatches`."""

    def __init__(
        self,
        dataset: ImageSource,
        order: IndexOrder,
        *,
        batch_size: int,
        num_rounds: int,
        seed: int,
        device: torch.device,
        pairs: PairSource | None = None,
    ) -> None:
        self._pairs = pairs
        self._dataset, self._order, self._seed, self._device = dataset, order, seed, device
        self._num_rounds, self._size = num_rounds, batch_size // num_rounds
        self._codec = LatentCodec() if dataset.is_latents else PixelCodec()
        self._ahead = ReadAhead(lambda batch, round: dataset.images(self._chosen(batch, round)))

    @scope("data")
    def get(self, batch: int, round: int) -> MicroBatch:
        return MicroBatch(
            engine_devices.sent(self._dataset.one_hot(self._chosen(batch, round)), self._device),
            self._draws("latent", batch, round),
            self._draws("diffusion", batch, round),
            self._draws("augment", batch, round),
            [stream_seed(self._seed, "dropout", batch * self._num_rounds + round)],
            cache(partial(self.images, batch, round)),  # some methods ask twice in a pass
            cache(partial(self.pairs, batch, round)),
            partial(self._of_step, batch // 2),  # a step of a distillation has two batches
            self._draws("label_dropout", batch, round),
            starts=(round * self._size,),
        )

    @scope("data")
    def images(self, batch: int, round: int) -> Tensor:
        """Real images in [-1, 1]; of a dataset of latents, samples of their posterior that every visit draws anew."""
        items = engine_devices.sent(self._ahead.get(batch, round), self._device)
        return self._codec.encode(items, self._draws("posterior", batch, round))

    @scope("data")
    def pairs(self, batch: int, round: int) -> Pairs:
        """Pairs drawn with replacement, by the place of the micro-batch alone."""
        if self._pairs is None:
            return _no_pairs()
        chosen = self._draws("pairs", batch, round).integers(self._pairs.num_pairs, (self._size,))
        return self._pairs.pairs(chosen)

    def _of_step(self, step: int, below: int) -> int:
        return stream_seed(self._seed, "step", step) % below

    def _chosen(self, batch: int, round: int) -> Any:
        return self._order.indices((batch * self._num_rounds + round) * self._size, self._size)

    def _draws(self, stream: str, batch: int, round: int) -> Draws:
        return SeededDraws(stream_seed(self._seed, stream, batch * self._num_rounds + round), self._device)
