"""The one rule of what a symbol is: safe as the name of a file and as a part of a study's name."""

from __future__ import annotations

import re

from forecasters import ExpectedError

PATTERN = r"(?!.*\.\.)[A-Z0-9][A-Z0-9.-]*"  # no "..", which names a parent folder


class SymbolError(ExpectedError, ValueError):
    """A text is not a symbol."""


def is_symbol(text: str) -> bool:
    """Whether a text is a symbol."""
    return re.fullmatch(PATTERN, text) is not None


def check_symbol(text: str) -> str:
    """The symbol itself. Raises SymbolError."""
    if not is_symbol(text):
        raise SymbolError(
            f"{text!r} is not a symbol: capital letters, digits, single dots and hyphens, such as BTCUSD or BRK-B"
        )
    return text
