"""How often a rule promotes what is no better, and how often it finds what is.

`python -m benchmarks.promotion_rules [--data-dir FOLDER] [--json FILE]`: on the bars of a folder, else on the packaged
daily index bars; about two minutes on one core.

Everywhere in each symbol's history that allows it, every 60 bars, a search is played: it sees the bars up to there,
splits them as a study does (30 windows of validation before 20 of test, confirmation on the 250 before test), picks
among 20 aggregates and promotes or not. What it promoted is then judged on the 60 bars after. The forecast is the
last 100 returns, each divided by the volatility known before it (exponentially weighted, 0.94) and multiplied by the
one known now: exact samples, so nothing here is sampling noise. Only the choosing of the least of many numbers is.

The incumbent, in three worlds:
- `best elsewhere`: the aggregate with the least error over all of the symbol's windows but those that the search looks
  at or that judge it. The world that says how often a rule promotes without cause.
- `best overall`: the same over all windows, those included. It knows more than anyone could, and so is kinder to a
  rule.
- `quantile_0.30`: truly worse. Its measured gap to the best over all windows is printed.

For the power curve the incumbent is the best aggregate overall, moved up or down by that multiple of the volatility
which makes the best better by 1, 2, 5 or 10 % over all windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from forecasters import Bars
from objectives import windows as windowing
from objectives.aggregation import Draw
from objectives.windows import DataError, Windows
from studies.promotion import Decision, Measured, decide

AGGREGATES = (
    *("mean", "median", "trimmed_mean_5", "trimmed_mean_10", "trimmed_mean_20", "winsorized_mean_10"),
    *("lower_trimmed_mean_10", "lower_trimmed_mean_20", "upper_trimmed_mean_10", "upper_trimmed_mean_20"),
    *("quantile_0.30", "quantile_0.35", "quantile_0.40", "quantile_0.45"),
    *("quantile_0.55", "quantile_0.60", "quantile_0.65", "quantile_0.70"),
    *("mean_minus_std_0.1", "mean_plus_std_0.1"),
)
WORSE = "quantile_0.30"
VALIDATION, TEST, CONFIRMATION, REALISED = 30, 20, 250, 60  # windows
MIN_IMPROVEMENT = 0.01
TOP = 5  # configurations that are confirmed
RETURNS = 100  # of which the forecast is made; with the volatility's first, the 128 bars that any study has
DECAY = 0.94  # of the volatility: RiskMetrics' for daily returns (1996)
GAPS = (0.01, 0.02, 0.05, 0.10)
MOST_USELESS, LEAST_FOUND = 0.05, 0.90  # what the default rule is to keep to


# --- forecasts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Series:
    """One symbol's windows, and what every aggregate would have said at each."""

    windows: Windows
    points: dict[str, np.ndarray]  # by aggregate, [W], price
    volatility: np.ndarray  # [W], price

    def errors(self, points: np.ndarray) -> np.ndarray:
        """Relative to the last close, [W], as a study's metric has them."""
        return np.abs(points - self.windows.actuals[:, 0]) / self.windows.last_closes


def forecast(symbol: str, bars: Bars) -> Series:
    """Every aggregate of the plain distribution at every origin; at each from the bars before it alone."""
    everything = windowing.recent_origins(bars, len(bars), symbol=symbol, at_least=1)
    returns = np.diff(bars.close) / bars.close[:-1]  # [T - 1]; number i is of bar i + 1
    warm_up = windowing.MIN_CONTEXT - 1 - RETURNS
    known = np.empty(len(bars))  # [T]: number i from the returns before number i
    known[:warm_up] = np.nan
    variance = np.mean(returns[:warm_up] ** 2)
    for i in range(warm_up, len(bars)):
        known[i] = np.sqrt(variance)
        if i < len(returns):
            variance = DECAY * variance + (1 - DECAY) * returns[i] ** 2
    scaled = returns / known[:-1]
    now = np.array(everything.origins) - 1  # the return that is to be forecast
    seen = scaled[now[:, None] + np.arange(-RETURNS, 0)]  # [W, RETURNS]
    volatility = known[now] * everything.last_closes
    draw = Draw(everything.last_closes[:, None, None] + (volatility[:, None] * seen)[:, :, None])
    return Series(
        windows=everything,
        points={name: draw.aggregate(name)[:, 0] for name in AGGREGATES},
        volatility=volatility,
    )


# --- searches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where in a symbol's windows one search looks; each a slice of the window axis."""

    validation: slice
    earlier: slice  # confirmation without validation
    confirmation: slice
    test: slice
    realised: slice

    def measured(self, name: str, errors: np.ndarray, *, on: slice | None = None, of: slice | None = None) -> Measured:
        """As a confirmation has it. on: the windows of the errors kept; of: those of `validation_mae`."""
        return Measured(
            model="toto",
            config={"aggregate": name},
            errors=tuple(errors[on].tolist()) if on else None,
            validation_mae=float(errors[of or self.validation].mean()),
            test_mae=float(errors[self.test].mean()),
        )


def searches(series: Series, *, every: int) -> list[Search]:
    """Every search that has all its windows, the newest first."""
    bars, symbol, first = series.windows.bars, series.windows.symbol, series.windows.origins[0]

    def places(windows: Windows) -> slice:
        return slice(windows.origins[0] - first, windows.origins[-1] + 1 - first)

    found = []
    for end in range(len(bars) - REALISED, 0, -every):
        seen = bars.slice(0, end)
        try:
            split = windowing.split(seen, symbol=symbol, validation=VALIDATION, test=TEST)
            confirmation = windowing.recent_origins(seen, CONFIRMATION, symbol=symbol, before=split.test.origins[0])
        except DataError:  # too early
            break
        validation, confirmed = places(split.validation), places(confirmation)
        found.append(
            Search(
                validation=validation,
                earlier=slice(confirmed.start, validation.start),
                confirmation=confirmed,
                test=places(split.test),
                realised=slice(end - first, end - first + REALISED),
            )
        )
    return found


# --- rules -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One search and the incumbent it meets."""

    search: Search
    errors: dict[str, np.ndarray]  # by aggregate, [W]
    incumbent: np.ndarray  # errors, [W]
    label: str  # the incumbent's name; an aggregate's where it is one

    def ranked(self, on: slice) -> list[str]:
        """All aggregates, the best there first."""
        return sorted(self.errors, key=lambda name: float(self.errors[name][on].mean()))

    def decide(
        self, names: Sequence[str], *, on: slice | None = None, of: slice | None = None, **options: Any
    ) -> tuple[Decision, str]:
        """The project's rule over these aggregates, and the one it chose. As `Search.measured`."""
        candidates = [self.search.measured(name, self.errors[name], on=on, of=of) for name in names]
        decision = decide(
            candidates,
            self.search.measured(self.label, self.incumbent, on=on, of=of),
            confirmed=True,
            stale=False,
            min_improvement=options.pop("min_improvement", MIN_IMPROVEMENT),
            on="confirmation" if on else "validation",
            **options,
        )
        assert decision.candidate is not None
        return decision, names[decision.candidate]

    @property
    def top(self) -> list[str]:
        return self.ranked(self.search.validation)[:TOP]


Rule = Callable[[Case], tuple[bool, str]]


def best_of_30(case: Case) -> tuple[bool, str]:
    decision, name = case.decide(case.ranked(case.search.validation))
    return decision.promote, name


def best_of_30_and_220_earlier(case: Case) -> tuple[bool, str]:
    promote, name = best_of_30(case)
    return promote and case.decide([name], of=case.search.earlier)[0].promote, name


def confirmed(**options: Any) -> Rule:
    """The best of the top five on the confirmation windows."""

    def rule(case: Case) -> tuple[bool, str]:
        decision, name = case.decide(case.top, on=case.search.confirmation, **options)
        return decision.promote, name

    return rule


def search_on_250(case: Case) -> tuple[bool, str]:
    decision, name = case.decide(case.ranked(case.search.confirmation), of=case.search.confirmation)
    return decision.promote, name


def bounded(least: float) -> Rule:
    """The default, and the interval's lower end above `least`."""

    def rule(case: Case) -> tuple[bool, str]:
        decision, name = case.decide(case.top, on=case.search.confirmation)
        interval = decision.evidence.interval
        return decision.promote and interval is not None and interval[0] > least, name

    return rule


DEFAULT = "best of the top five on 250 windows, > 1 % there"
RULES: dict[str, Rule] = {
    "best of 30 windows, > 1 % on the same 30": best_of_30,
    "the same and > 1 % on 220 earlier windows": best_of_30_and_220_earlier,
    DEFAULT: confirmed(),
    "search on 250 windows, > 1 % there": search_on_250,
    "default, --require-test": confirmed(require_test=True),
    "default, --max-p 0.05": confirmed(max_p=0.05),
    "default, --min-improvement 0.02": confirmed(min_improvement=0.02),
    "default, interval above 0": bounded(0.0),
}


# --- figures -----------------------------------------------------------------------------------------------


def improvement(old: np.ndarray, new: np.ndarray) -> float:
    return float(1 - new.mean() / old.mean())


def judge(rule: Rule, cases: Sequence[Case]) -> dict[str, float | None]:
    """What a rule did over all searches; improvements are realised ones, relative."""
    gains = []
    for case in cases:
        promote, name = rule(case)
        if promote:
            after = case.search.realised
            gains.append(improvement(case.incumbent[after], case.errors[name][after]))
    return {
        "promoted": len(gains) / len(cases),
        "worse": sum(gain < 0 for gain in gains) / len(gains) if gains else None,
        "realised": float(np.mean(gains)) if gains else None,
        "realised, of all searches": sum(gains) / len(cases),
    }


def shifted(series: Series, base: str, gap: float, direction: int) -> np.ndarray:
    """Errors [W] of a forecast moved by that multiple of the volatility which makes `base` better by `gap`."""

    def moved(multiple: float) -> np.ndarray:
        return series.errors(series.points[base] + direction * multiple * series.volatility)

    right = series.errors(series.points[base])
    # The least error of all multiples need not be at 0: start from where it is.
    multiples = np.linspace(0, 2, 2001)
    gaps = np.array([improvement(moved(multiple), right) for multiple in multiples])
    low, high = float(multiples[np.flatnonzero(gaps < gap)[-1]]), 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if improvement(moved(middle), right) < gap else (low, middle)
    return moved(high)


def measure(all_series: Sequence[Series], *, every: int) -> dict[str, Any]:
    """All figures."""
    worlds: dict[str, list[Case]] = {"best elsewhere": [], "best overall": [], WORSE: []}
    power: dict[float, list[Case]] = {gap: [] for gap in GAPS}
    gaps, counts, found_gaps = [], {}, {gap: [] for gap in GAPS}
    for series in all_series:
        errors = {name: series.errors(points) for name, points in series.points.items()}
        best = min(errors, key=lambda name: float(errors[name].mean()))
        gaps.append(improvement(errors[WORSE], errors[best]))
        moved = {(gap, sign): shifted(series, best, gap, sign) for gap in GAPS for sign in (1, -1)}
        for (gap, _), worse in moved.items():
            found_gaps[gap].append(improvement(worse, errors[best]))
        played = searches(series, every=every)
        counts[series.windows.symbol] = len(played)
        for search in played:
            elsewhere = np.ones(len(series.windows), dtype=bool)
            for part in (search.confirmation, search.test, search.realised):
                elsewhere[part] = False
            else_best = min(errors, key=lambda name: float(errors[name][elsewhere].mean()))
            for world, name in (("best elsewhere", else_best), ("best overall", best), (WORSE, WORSE)):
                worlds[world].append(Case(search=search, errors=errors, incumbent=errors[name], label=name))
            for (gap, sign), worse in moved.items():
                power[gap].append(Case(search=search, errors=errors, incumbent=worse, label=f"moved {sign * gap}"))
    if not any(worlds.values()):
        raise DataError(f"no symbol has the {128 + CONFIRMATION + TEST + REALISED} bars that one search needs")
    rules = {name: {world: judge(rule, cases) for world, cases in worlds.items()} for name, rule in RULES.items()}
    curve_rules = [DEFAULT, "default, --max-p 0.05", "default, interval above 0"]
    curve = {name: {str(gap): judge(RULES[name], cases) for gap, cases in power.items()} for name in curve_rules}
    return {
        "searches": counts,
        "true gap of " + WORSE: {"least": min(gaps), "mean": float(np.mean(gaps)), "largest": max(gaps)},
        "rules": rules,
        "true gaps of the moved": {str(gap): float(np.mean(found)) for gap, found in found_gaps.items()},
        "power": curve,
    }


def per_cent(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.1f} %"


def show(figures: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{sum(figures['searches'].values())} searches, {len(figures['searches'])} symbols")
    worlds = list(next(iter(figures["rules"].values())))
    for heading in ("rule", *(f"{world}: promoted / worse of those / realised" for world in worlds)):
        table.add_column(heading)
    for name, by_world in figures["rules"].items():
        cells = [
            f"{per_cent(each['promoted'])} / {per_cent(each['worse'])} / {per_cent(each['realised'], sign=True)}"
            for each in by_world.values()
        ]
        table.add_row(name, *cells)
    console.print(table)
    gap = figures["true gap of " + WORSE]
    console.print(f"true gap of {WORSE}: {per_cent(gap['least'])} to {per_cent(gap['largest'])} by symbol")
    power = Table(title="searches in which a gain was found, by the true gain")
    for heading in ("rule", *(per_cent(true) for true in figures["true gaps of the moved"].values())):
        power.add_column(heading)
    for name, by_gap in figures["power"].items():
        power.add_row(name, *(per_cent(each["promoted"]) for each in by_gap.values()))
    console.print(power)
    default = figures["rules"][DEFAULT]
    useless, found = default["best elsewhere"]["promoted"], figures["power"][DEFAULT]["0.05"]["promoted"]
    console.print(f"default rule: {per_cent(useless)} useless (at most {per_cent(MOST_USELESS)} wanted), ", end="")
    console.print(f"{per_cent(found)} of 5 % gains found (at least {per_cent(LEAST_FOUND)} wanted)")


def main() -> None:
    parser = argparse.ArgumentParser(description="How often each rule promotes without cause, and with.")
    parser.add_argument("--data-dir", type=Path, help="bars, a file a symbol (default: the packaged index bars)")
    parser.add_argument("--every", type=int, default=REALISED, help="bars between two searches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir is None:
            windowing.demo_bars(folder)
        try:
            symbols, _ = windowing.list_symbols(args.data_dir or folder)
            series = [forecast(symbol, windowing.read_bars(path)[0]) for symbol, path in symbols.items()]
            figures = measure(series, every=args.every)
        except DataError as error:
            raise SystemExit(str(error)) from error
    figures["seconds"] = round(time.perf_counter() - began, 1)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
