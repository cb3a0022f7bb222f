"""The one error of bad data, and how foreign words become part of a line."""

_LONGEST = 700  # characters of a message: names from outside may have thousands


class DataError(ValueError):
    """A store, a source or an image is missing, damaged or of another kind; one line that says what to do."""

    def __init__(self, message: str) -> None:
        # Names may hold line breaks, or bytes that are no text and that no terminal takes.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        half = _LONGEST // 2
        super().__init__(line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}")


def brief(error: object) -> str:
    """The words of a library in one short line; the kind of a failure that has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
