"""The one exception a user's mistake ends in."""

from collections.abc import Iterator
from contextlib import contextmanager
import sys


class UserError(Exception):
    """A wrong key, file, sample or setting; the message is one sentence that names it and what was expected.

    Scripts print it after ``error:`` and exit with status 2; library users catch it like any exception.
    """

    exit_status = 2


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around the main function of a script: a UserError ends it with ``error: <sentence>`` and its exit status."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_status) from None
