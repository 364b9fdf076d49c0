"""Everything that outlives a process: the database of the studies and the promoted files.

Knows nothing of objectives or commands, and of forecasters the base class of errors alone.
"""

from __future__ import annotations

from forecasters import ExpectedError


class DatabaseUnavailable(ExpectedError):
    """The database cannot be started or reached."""

    def __init__(self, message: str | None = None) -> None:
        """`message` is one line that says what to do; without one the class's own sentence stands."""
        super().__init__(message or type(self).__doc__)
