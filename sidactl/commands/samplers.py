"""The sampler of a network, and the settings of it that a command may change."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sidactl.commands.scores import HEUN_FIELDS
from sidactl.errors import SidaError
from sidactl.recipes import HeunSpec, OneStepSpec, flag_of
from sidactl.store import Artifact

_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""there where a driver of NVIDIA, of AMD, or Windows' is; without any of them torch need not be asked"""


def drawn_on(device: str | None) -> dict[str, str]:
    """The kind of random generator, as part of a question: a seed's images on a GPU are not those of a CPU.

    {} for a CPU's, the Mersenne Twister; {"rng": "cuda"} for a GPU's, Philox. device: as in `devices.pick_device`.
    """
    kind = "cpu" if device is None else device.partition(":")[0]
    if device is None and any(map(os.path.exists, _GPU_FILES)):
        import torch

        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return {} if kind == "cpu" else {"rng": kind}


def sampler_of(subject: Artifact) -> OneStepSpec | HeunSpec:
    """The sampler that a teacher or generator artifact names as its own."""
    return sampler_from(subject.params["sampler"])


def sampler_from(settings: Mapping[str, Any]) -> OneStepSpec | HeunSpec:
    """The sampler of either kind that its `to_json` wrote."""
    return HeunSpec.from_json(settings) if "S_churn" in settings else OneStepSpec.from_json(settings)


def note_of_steps(subject: Artifact, chosen: OneStepSpec | HeunSpec) -> str | None:
    """What is to be said of a generator that is sampled in another number of steps than it was trained for."""
    own = sampler_of(subject)
    if not isinstance(own, OneStepSpec) or not isinstance(chosen, OneStepSpec) or chosen.num_steps == own.num_steps:
        return None
    if own.levels and own.num_steps == 1:  # trained at each of them for itself
        return None
    trained = "one step" if own.num_steps == 1 else f"{own.num_steps} steps"
    called = subject.params.get("name") or subject.oid[:12]
    said = f"{called} was trained for {trained}, not for {chosen.num_steps}"
    return said if chosen.num_steps < own.num_steps else f"{said}: nothing says that more of them are better"


def chosen_sampler(
    subject: Artifact, kind: str | None = None, steps: int | None = None, heun: Mapping[str, float] | None = None
) -> OneStepSpec | HeunSpec:
    """A net's own sampler, or the one of this kind, with so many steps and these fields of HeunSpec.

    Raises SidaError for what does not fit the net, is out of its bounds, or would count for nothing.
    """
    own, heun = sampler_of(subject), dict(heun or {})
    if kind not in (None, "one-step", "heun"):
        way = "Pass --sampler heun." if isinstance(own, HeunSpec) else "Leave out --sampler."
        raise SidaError(f"the sampler must be one-step or heun, got {kind!r}", way)
    chosen: OneStepSpec | HeunSpec = own
    if kind == "heun" and isinstance(own, OneStepSpec):
        raise SidaError(
            "the heun sampler needs a teacher, got a one-step generator",
            "Leave out --sampler: --steps takes more than one.",
        )
    if kind == "one-step" and isinstance(own, HeunSpec):
        chosen = OneStepSpec()
    if steps is not None and steps < 1:
        raise SidaError(f"the number of steps must be >= 1, got {steps}", "Pass --steps 1 or more.")
    if unknown := sorted(set(heun) - set(HEUN_FIELDS)):
        raise SidaError(f"unknown setting {unknown[0]!r} of Heun's sampler", f"It has {', '.join(HEUN_FIELDS)}.")
    if heun and isinstance(chosen, OneStepSpec):
        flag = flag_of(next(iter(heun)))
        raise SidaError(f"{flag} is of the heun sampler of a teacher, got one-step", f"Leave out {flag}.")
    changes = heun if steps is None else {**heun, "num_steps": steps}
    chosen = replace(chosen, **changes)  # type: ignore[arg-type]  # checked by the class
    idle = next((name for name in ("S_min", "S_max", "S_noise") if name in heun), None)
    if idle and isinstance(chosen, HeunSpec) and chosen.S_churn == 0:
        raise SidaError(f"{flag_of(idle)} counts with churn alone, got --s-churn 0", "Pass --s-churn, such as 40.")
    return chosen
