"""What an entry of the catalog says: of a teacher, generator, dataset, detector or reference."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from sidactl.recipes import HeunSpec, Mode, NetSpec, OneStepSpec, SidRecipe

CC_BY_NC_SA = "CC BY-NC-SA 4.0"

SEE_PUBLISHER = "see the publisher's page"


@dataclass(frozen=True, kw_only=True)
class Download:
    """Where a file is published; a digest or size that is not known beforehand is None."""

    url: str
    sha256: str | None = None
    size_bytes: int | None = None
    sha256_from_publisher: bool = True
    """False: the digest comes from one third party, so that a file with another one is not refused"""


class Published(NamedTuple):
    """A published number: its mean, and its standard deviation where it is given."""

    value: float
    std: float | None = None
    source: Literal["paper", "page"] = "paper"
    """the paper, or the publisher's page, whose numbers came later"""


ASSETS = Path(__file__).parents[1] / "assets"
"""where the files of the built-in entries are"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What all entries have. `source`: None for what ships with the package or what everybody must get themselves."""

    name: str
    about: str
    licence: str
    source: Download | None = None
    scores: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    """published ones of 50,000 images, by the name of the number: FID, IS, FD-DINOv2, precision, recall"""


@dataclass(frozen=True, kw_only=True)
class Dataset(Entry):
    """A dataset that prepare-data knows by name, or has a preset for, and the detector that scores against it."""

    detector: str = "inception"
    builtin: bool = False
    shape: tuple[int | None, int | None, int] | None = None
    """resolution, channels and classes of one that is built in or downloaded"""
    labels_of: str | None = None
    """the dataset whose classes these are, without images"""
    is_latent: bool = False
    """whether its networks see latents"""
    num_images: int | None = None
    """what a source of it holds, as far as it is known"""
    where: str | None = None
    """the page to get it from"""


@dataclass(frozen=True, kw_only=True)
class Teacher(Entry):
    """A pretrained diffusion model: where it comes from, what it is, how it is sampled and distilled."""

    dataset: str
    net: NetSpec
    sampler: HeunSpec
    recipes: Mapping[Mode, SidRecipe]
    """of the SiD family; none for a net that guides the sampling of another, or is guided"""
    asset: str | None = None
    """file of the package that holds its weights, for a built-in one"""


@dataclass(frozen=True, kw_only=True)
class Generator(Entry):
    """A one-step generator of the paper: the teacher it was distilled from, by which mode, and its network.

    Without a `source` its scores alone are published.
    """

    teacher: str
    dataset: str
    mode: Mode
    alpha: float
    net: NetSpec
    sampler: OneStepSpec


@dataclass(frozen=True, kw_only=True)
class Comparison(Entry):
    """A generator by a method that is not ours: its published scores alone, in one step where they say nothing else."""

    dataset: str


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A file in another Python package, which an extra of ours installs and of which nothing is imported."""

    distribution: str
    extra: str
    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Detector(Entry):
    """The weights of a feature detector."""

    asset: str | None = None
    """file of this package, for a built-in one; without a file of any kind the weights are drawn from a seed"""
    shipped: Shipped | None = None
    where: str | None = None
    """the page of whoever ships it"""


@dataclass(frozen=True, kw_only=True)
class Reference(Entry):
    """Published statistics, or images, of a dataset, and the detectors that it has features of."""

    dataset: str
    detectors: Sequence[str]
    holds: Literal["statistics", "images"] = "statistics"


Numbers: TypeAlias = Mapping[str, float | tuple[float, float | None] | Published]


def published(numbers: Numbers) -> Mapping[str, Published]:
    return {k: Published(*v) if isinstance(v, tuple) else Published(v) for k, v in numbers.items()}


def on_page(value: float) -> Published:
    return Published(value, source="page")


def did_you_mean(name: str, known: Mapping[str, object], otherwise: str) -> str:
    """A hint with the known name that is nearest to `name`, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise
