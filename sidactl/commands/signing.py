"""Signatures of exported files and folders, by the package model-signing: who made them, not what is in them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.text import shell_word

_BUNDLE = b'{"mediaType":"application/vnd.dev.sigstore.bundle'

_KEYS = "Make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem "

_KEYS += "-pubout -out key.pub"


def signature_of(path: Path) -> Path:
    """Where the signature of an exported file or folder lies."""
    return path.with_name(f"{path.name}.sig")


def problem_of(path: Path) -> str:
    """Empty for a file that is a signature."""
    with path.open("rb") as file:
        return "" if file.read(len(_BUNDLE)) == _BUNDLE else "a file that is no signature"


def signer(key: Path) -> Callable[[Path, Path], None]:
    """What signs (path, to where) with a private key on an elliptic curve, in a PEM file without a password.

    Raises SidaError for a file that is no such key, and without the package.
    """
    with _loading(key, "private"):
        from model_signing.signing import Config

        config: Any = Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_everything())
    return lambda path, to: config.sign(path, to)


def check(path: Path, key: Path) -> None:
    """Raises SidaError unless the signature beside `path` is that of its content, by the owner of this public key."""
    with _loading(key, "public"):
        from model_signing.verifying import Config

        config: Any = Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_everything())
    signature = signature_of(path)
    for needed in (path, signature):
        if not needed.exists():
            raise SidaError(f"{needed} is not there", "Name an export that has its signature beside it.")
    try:
        config.verify(path, signature)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SidaError(f"{path} is not what was signed by this key: {reason}", exit_code=EXIT_FAILED) from error


def _everything() -> Any:
    """All files count: by default the package leaves out those of git, and whoever adds some could have them run."""
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[], ignore_git_paths=False)


@contextmanager
def _loading(key: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SidaError(
            f"signatures need the package model-signing ({error})", "Install it with: pip install 'sidactl[sign]'."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0].rstrip(". ")
        reason = "it is of another kind" if isinstance(error, AttributeError) else reason
        if "assword" in reason:
            remedy = f"openssl ec -in {shell_word(key)} -out {shell_word(key.with_suffix('.plain.pem'))}"
            raise SidaError(f"{key} needs a password, which cannot be given", f"Write it without: {remedy}") from error
        raise SidaError(f"{key} is no {kind} key of an elliptic curve in PEM ({reason})", _KEYS) from error
