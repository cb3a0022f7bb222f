"""Mistakes that a user can mend, each told in one line."""

import re

LONGEST_LINE = 2000


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """The text on one line, its middle left out where it is very long; nothing in it that a terminal obeys.

    Names from outside may hold line breaks, escape sequences, and bytes that are no text.
    """
    letters = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in letters)
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} [...] {line[-half:]}"


def without_password(text: str) -> str:
    """A URI, or a text that names some, as it may be shown.

    Any value of its query may be a secret, or hold one: drivers take passwords there by names of their own.
    """
    masked = re.sub(r"((?:^|//)[^/\s:@]*:(?!//))\S+@", r"\1***@", text)
    return re.sub(r"([?&;][^\s=?&;]*=)[^\s&;]+", r"\1***", masked)


class UserError(ValueError):
    """A mistake that a user can mend: the message is one line with the rule, the value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
