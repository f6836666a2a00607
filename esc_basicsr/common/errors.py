"""The error that a user can put right."""

import re

# What moves a terminal's cursor, or the order of letters, when a message repeats a name from a file.
_STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake in what the user gave: an option, a path, a file.

    The message says what is wrong, where, and what to do. Commands print it alone, without a traceback.
    As text, control characters in it are written out, as hexadecimal numbers.
    """

    def __str__(self) -> str:
        """Return the message, fit for a terminal."""
        return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), super().__str__())
