"""Everything that outlives a process: the database of the studies and the promoted files.

Knows nothing of forecasters, objectives or commands.
"""


class DatabaseUnavailable(RuntimeError):
    """The database cannot be started or reached."""

    def __init__(self, message: str | None = None) -> None:
        """`message` is one line that says what to do; without one the class's own sentence stands."""
        super().__init__(message or type(self).__doc__)
