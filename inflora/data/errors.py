"""The one error of bad data, and how foreign words become part of a line."""

from inflora.errors import UserError, one_line

_LONGEST = 700  # characters of a message: names from outside may have thousands


class DataError(UserError):
    """A store, a source or an image is missing, damaged or of another kind; one line that says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, _LONGEST))


def brief(error: object) -> str:
    """The words of a library in one short line; the kind of a failure that has none."""
    return one_line(str(error), 200) or type(error).__name__
