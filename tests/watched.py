"""Forecasts served bar by bar, as a trading system asks for them: what the tests of settling and watching need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import sqlalchemy
from click.testing import Result
from places import RunPlace, last_bars

from launch import cli
from storage import history
from studies import config as configuration
from studies.forecasting import Forecast, Forecasts

GOOD = {"season": 1, "context_length": 256, "num_samples": 64, "aggregate": "median"}
BAD = {**GOOD, "aggregate": "quantile_0.90"}  # far too high
BARS = 420


class ServedPlace(RunPlace):
    """Promotions, and a replay of the bars."""

    BARS: ClassVar[Mapping[str, int]] = {"SP500": BARS, "NASDAQ": BARS}

    def put_in_use(
        self, config: Mapping[str, Any], *, symbol: str = "SP500", model: str = "naive", horizon: int = 1, **said: Any
    ) -> None:
        """Promote it, with a history."""
        metrics = {"price_mae": 1.0, "pct_return_mae": 0.01, "latency_s": 0.1}
        windows = {"forecast_horizon": horizon}
        payload = {"symbol": symbol, "model": model, "config": dict(config), "validation": metrics, "metadata": said}
        folders = (model, "optimized_compiled", "best")
        history.write(self.folder / "hyperparams", symbol, {**payload, "windows": windows}, folders)

    def show_bars(self, count: int, symbol: str = "SP500") -> None:
        """Let only the first of all bars have come."""
        self.write(f"{symbol}.csv", last_bars(symbol, BARS)[: count + 1])

    def replay(self, origins: Sequence[int], symbol: str = "SP500", **asked: Any) -> list[Forecast]:
        """Ask for a forecast before each of these bars came; then let all come."""
        found = []
        with Forecasts(configuration.load(self.settings), storage=self.storage, environment={}) as forecasts:
            for origin in origins:
                self.show_bars(origin, symbol)
                answers = forecasts.ask([symbol], **asked)
                assert not answers.refused, answers.refused
                found.append(answers.forecasts[symbol])
        self.show_bars(BARS, symbol)
        return found

    def studies(self, *words: str, code: int = 0) -> Result:
        ended = self.invoke(cli.studies, *words)
        assert ended.exit_code == code, ended.output
        return ended

    def settle(self, *words: str, code: int = 0) -> Result:
        return self.studies("settle", *words, code=code)

    def monitor(self, *words: str, code: int = 0) -> dict[str, Any]:
        """What it says of SP500."""
        (row,) = json.loads(self.studies("monitor", "SP500", "--json", *words, code=code).stdout)
        return {**row, "readings": {one["name"]: one for one in row["readings"]}}

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.storage.transaction(lambda c: c.execute(sqlalchemy.text(statement)).all())]

    def outcomes(self) -> list[tuple[Any, ...]]:
        """All of them, but for when they were settled."""
        return self.rows(
            "select digest, role, key, step, due, actual, error, signed_error, no_change_error, sigma, in_band "
            "from outcomes order by 1, 2, 3, 4"
        )
