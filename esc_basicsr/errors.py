"""The error that a user can mend."""


class UserError(Exception):
    """A mistake in what the user gave: an option, a path, a file.

    The message says what is wrong, where, and what to do. Commands print it alone, without a traceback.
    """
