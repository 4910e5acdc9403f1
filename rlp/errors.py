"""The one exception a user's mistake ends in."""


class UserError(Exception):
    """A wrong key, file, sample or setting; the message is one sentence that names it and what was expected.

    Scripts print it after ``error:`` and exit with status 2; library users catch it like any exception.
    """
