"""Feature statistics of a dataset as an artifact."""

import os

from sidactl.commands import reference
from sidactl.commands.features import stats_of
from sidactl.commands.fetch import detector_ref, fetch_detector
from sidactl.commands.inputs import Ref, optional_ref, ref_text, run_of
from sidactl.commands.moments import detector_name, is_detector_file
from sidactl.commands.question import name_artifact, rank0_first
from sidactl.commands.resolve import resolve
from sidactl.commands.scorers import load_detector
from sidactl.commands.words import OnCount, RunDir, require_images
from sidactl.store import Artifact, Store


def dataset_stats(
    ref: Ref,
    *,
    detector: str | os.PathLike[str] | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    tick: OnCount | None = None,
) -> Artifact:
    """The feature statistics of all images of a dataset, as scores compare with them; by default of its own detector.

    Latents have those of the pixels that they were made from. A name of the dataset gives them one, with the detector.
    """
    from sidactl.engine.devices import pick_device

    store, detector = Store.open(run_of(ref, run)), optional_ref(detector, "the detector")
    with rank0_first():
        data = resolve(store, ref_text(ref), ["dataset"], recheck=force)
        require_images(data)
        names = [name.partition("/")[2] for name in store.names_of(data.oid)]
        reference.refuse_latents(data := reference.pixels_of(store, data))
        called = detector or detector_name(data)
        if not is_detector_file(called):
            fetch_detector(called, run=store.root, recheck=force)
    chosen = load_detector(store, called, pick_device(device))
    store.check_writable()
    _, made = stats_of(store, data, chosen, tick, recheck=force)
    assert made
    return name_artifact(store, made, [f"{name}-{detector_ref(chosen.name)}" for name in names])
