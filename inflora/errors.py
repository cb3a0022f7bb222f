"""What a user can mend, and how it is said."""

LONGEST_LINE = 2000


class UserError(ValueError):
    """A mistake that a user can mend: the message is one line with the rule, the value and what is allowed."""


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """The text on one line, its middle left out where it is very long."""
    line = " ".join(text.split())
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} [...] {line[-half:]}"
