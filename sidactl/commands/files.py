"""Files from outside on their way in: fetched, hashed, read without being executed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sidactl import catalog
from sidactl.commands.identity import file_digest
from sidactl.commands.words import NET_FILES, plain_name, suffix_of
from sidactl.digests import file_sha256
from sidactl.errors import SidaError
from sidactl.foreign import download, http
from sidactl.store import Store

if TYPE_CHECKING:
    from torch import Tensor


MAX_NAME = 64
"""characters of a name from outside that go into that of a temporary file: file systems take 255 bytes"""


def locate(source: str) -> tuple[catalog.Teacher | catalog.Generator | None, str | None]:
    """The catalog's entry of a name or URL, and the URL; neither for a local file. SidaError for anything else."""
    nets: dict[str, catalog.Teacher | catalog.Generator] = {**catalog.TEACHERS, **catalog.GENERATORS}
    entry = nets.get(source) or next((e for e in nets.values() if e.source and e.source.url == source), None)
    if source in catalog.COMPARISONS:
        check_has_file(catalog.COMPARISONS[source])
    if entry:
        check_has_file(entry)
        return entry, entry.source.url if entry.source else None
    if is_url := "://" in source:
        http.check_url(source)
    if suffix_of(source) not in NET_FILES:
        if is_url or Path(source).exists():
            raise SidaError(f"a network file must be {' or '.join(NET_FILES)}, got {source}", "Convert it to one.")
        if source in catalog.DATASETS:
            data = catalog.DATASETS[source]
            way = f"Use sidactl prepare-data {source}."
            if not (data.builtin or data.source):
                way = f"Get it from {data.where}, then use sidactl prepare-data."
            raise SidaError(f"{source} is a dataset, not a network", way)
        if source in catalog.REFERENCES:
            hint = f"A score fetches it: sidactl fid REF --ref {source}"
            raise SidaError(f"{source} is a reference, not a network", hint)
        raise SidaError(f"unknown teacher {source!r}", catalog.did_you_mean(source, nets, "See sidactl ls --catalog."))
    if not is_url and not Path(source).is_file():
        raise SidaError(f"{source}: no such file", "Check the path.")
    return None, source if is_url else None


def check_has_file(entry: catalog.Entry) -> None:
    """Raises SidaError for a generator of which the catalog knows no file."""
    if isinstance(entry, catalog.Comparison):
        what = f"no file of {entry.name} is in the catalog, its published scores alone are"
        raise SidaError(what, f"To compare with them: sidactl show {entry.name}")
    if isinstance(entry, catalog.Generator) and entry.source is None:
        how = f"sidactl distill --teacher {entry.teacher} --mode {entry.mode} --alpha {entry.alpha:g}"
        raise SidaError(f"no file of {entry.name} is published, its scores alone are", f"Distill it: {how}")


def name_of_file(source: str) -> str:
    """What to call a network by its file or URL; that in an exported folder is called as the folder is."""
    path = Path(source.partition("?")[0])
    is_exported = path.name == "model.safetensors" and "://" not in source
    return plain_name(path.absolute().parent.name if is_exported else path.stem)


def downloaded(
    entry: catalog.Entry | None,
    url: str,
    path: Path,
    what: str,
    offline: bool,
    mirror: str | None,
    max_bytes: int | None,
    progress: download.OnCount | None,
    say: download.OnLine,
) -> str:
    file = entry.source if entry and entry.source else catalog.Download(url=url)
    sha256 = download.fetch(
        url,
        path,
        what=what,
        licence=entry.licence if entry else None,
        sha256=file.sha256 if file.sha256_from_publisher else None,
        size_bytes=file.size_bytes,
        max_bytes=max_bytes,
        offline=offline,
        mirror=mirror,
        progress=progress,
        say=say,
    )
    if file.sha256 not in (None, sha256):
        say(f"warning: {what} has SHA-256 {sha256}, a third party saw it with {file.sha256}")
    return sha256


def read_state_dict(path: Path | str) -> "dict[str, Tensor]":
    """The tensors by name of a .safetensors or .pth file. Raises SidaError for any other, and for a damaged one."""
    import safetensors.torch

    from sidactl.foreign import pickles

    if Path(path).suffix.lower() != ".safetensors":
        return pickles.read_weights(path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SidaError(f"{path} is damaged or no safetensors file ({reason})", "Download it again.") from error


@contextmanager
def fetched_file(
    store: Store,
    source: str,
    what: str,
    entry: catalog.Entry | None = None,
    progress: download.OnCount | None = None,
    offline: bool = False,
    mirror: str | None = None,
    max_bytes: int | None = None,
) -> Iterator[tuple[Path, str]]:
    """Within the block: the local path of a file or URL, and its SHA-256; what was downloaded is removed afterwards.

    An interruption leaves it for the next time.
    """
    if "://" not in source:
        yield Path(source), file_digest(Path(source))
        return
    name = Path(urlsplit(http.check_url(source)).path).name[-MAX_NAME:]
    path = store.root / "tmp" / f"file-{store.key('download', {'source': source}, {})[:16]}-{name}"
    say = download.to_stderr
    with download.exclusive(path.with_suffix(".lock"), lambda: say(f"waiting for another process: {what}")):
        try:
            yield path, downloaded(entry, source, path, what, offline, mirror, max_bytes, progress, say)
        except SidaError:
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def asset_digest(name: str) -> str | None:
    """SHA-256 of a file that ships with the package; None where there is no such file."""
    path = catalog.ASSETS / name
    return file_sha256(path) if path.exists() else None
