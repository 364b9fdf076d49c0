"""A folder with configurations in use and bars, and a database: what tests of served forecasts begin with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

from places import Place as BasePlace

from storage import forecasts
from studies.forecasting import Forecasts

NAIVE = {"season": 1, "context_length": 256, "num_samples": 64, "aggregate": "mean"}
TOTO = {"context_length": 256, "num_samples": 64, "aggregate": "trimmed_mean_10"}
KRONOS = {"temperature": 0.4, "top_k": 0, "top_p": 0.9, "sample_count": 32, "max_context": 128, "clip": 5.0}
ALL_KEYS = ("open", "high", "low", "close")


class Place(BasePlace):
    """Two symbols with a configuration of naive in use, and a folder for others."""

    SETTINGS: ClassVar[str] = """
data.dir = "bars"
hyperparams.dir = "hyperparams"
windows.min_context = 64
[toto]
checkpoint = "toto-tiny"
context_length = 256
[kronos]
checkpoint = "kronos-tiny"
"""
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 300, "NASDAQ": 300}

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        self.opened: list[Forecasts] = []
        self.notes: list[str] = []
        for symbol in self.BARS:
            self.put_promoted(
                symbol, NAIVE, model="naive", metadata={"study": f"{symbol}/naive@2026-03-19", "trial": 7}
            )

    def open(self, *, database: bool = True, **environment: str) -> Forecasts:
        storage = self.storage if database else None
        found = Forecasts(self.settings, storage=storage, environment=environment, note=self.notes.append)
        self.opened.append(found)
        return found

    def close(self) -> None:
        for one in self.opened:
            one.close()
        super().close()

    def bars(self, symbol: str, lines: list[str]) -> None:
        self.write(f"{symbol}.csv", lines)

    def counts(self) -> dict[str, int]:
        """Requests by kind, as all processes wrote them."""
        found: dict[str, int] = {}
        for (_, _, kind), count in forecasts.request_counts(self.storage).items():
            found[kind] = found.get(kind, 0) + count
        return found

    def rows(self) -> int:
        return len([row for symbol in ("SP500", "NASDAQ") for row in forecasts.forecasts_of(self.storage, symbol)])


def daily(last: datetime, count: int = 100) -> list[str]:
    """Bars of every day up to one."""
    days = [last - timedelta(days=count - 1 - number) for number in range(count)]
    return ["timestamp,close", *(f"{day:%Y-%m-%d %H:%M:%S},{100 + number % 7}" for number, day in enumerate(days))]
