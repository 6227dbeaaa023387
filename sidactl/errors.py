"""The one exception that users see; bugs of ours are plain assertions."""

import errno

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""what flock fails with where a file system has no locks"""


class SidaError(Exception):
    """A problem the user can mend, told in one line.

    `message` says what must hold and what we got; `hint` says what to do about it. `exit_code` is 2 for
    wrong usage or input (the default), 1 for work that failed, 130 for an interruption.
    """

    def __init__(self, message: str, hint: str = "", *, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class MissingError(SidaError):
    """Nothing of the name that was given is here; every other way of failing is a plain SidaError."""
