"""How often a rule promotes what is no better, and how often it finds what is.

`python -m benchmarks.promotion_rules [--data-dir FOLDER]`: on the bars of a folder, else on the packaged daily bars.

Every 30 bars back through history a search is played for every symbol that has the bars for it: it sees the bars up to
there, splits them as a study does (30 windows of validation before 20 of test, confirmation on the 250 before test),
picks among 20 aggregates and promotes or not. What it promoted is then judged on the 60 bars after. The default rule
pools the evidence of all symbols of one date; further rules pool without the windows of the search, or only its best.
The forecast is the last 100 returns, each divided by the volatility known before it (exponentially weighted, 0.94) and
multiplied by the one known now: the same samples for all, so that nothing here is sampling noise. Only choosing the
least of many numbers is.

The incumbent, in four worlds. In the first three it is the best already, as well as that can be said:
- `best elsewhere`: the aggregate with the least error over all of the symbol's windows but those that the search looks
  at or that judge it. Hard on a rule: leaving out what the rule looks at makes the rest look worse there, and in a
  short history the rest is too little to tell the best by.
- `best of others`: the aggregate with the least error, relative to the median's, over all windows of the other symbols.
- `best overall`: the aggregate with the least error over all of the symbol's windows. Kind to a rule: what the rule
  looks at was looked at before.
- `quantile_0.30`: truly worse. Its gap to the best overall is printed.

For the power curve the incumbent is the best overall, moved up and down in turns, by that multiple of the volatility
for which the unmoved gains 0.8, 1, 2, 3, 5 or 10 % over all windows. Of these 0.8 % is less than the rule asks for.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import recording
from benchmarks.recording import per_cent
from forecasters import Bars
from objectives import windows as windowing
from objectives.aggregation import Draw
from objectives.bars import DataError, read_bars
from objectives.metrics import Measurement
from objectives.windows import Windows
from studies.demo import INDICES, demo_bars
from studies.evidence import MeasuredConfiguration
from studies.pooling import Measured, Pool, SymbolErrors
from studies.promotion import Beliefs, Comparison, Decision, Rule, decide
from studies.series import list_symbols

AGGREGATES = (
    *("mean", "median", "trimmed_mean_5", "trimmed_mean_10", "trimmed_mean_20", "winsorized_mean_10"),
    *("lower_trimmed_mean_10", "lower_trimmed_mean_20", "upper_trimmed_mean_10", "upper_trimmed_mean_20"),
    *("quantile_0.30", "quantile_0.35", "quantile_0.40", "quantile_0.45"),
    *("quantile_0.55", "quantile_0.60", "quantile_0.65", "quantile_0.70"),
    *("mean_minus_std_0.1", "mean_plus_std_0.1"),
)
WORSE = "quantile_0.30"
VALIDATION, TEST, CONFIRMATION, REALISED = 30, 20, 250, 60  # windows
EVERY = 30  # bars between two searches
MIN_IMPROVEMENT = 0.01
TOP = 5  # configurations that are confirmed
POOL_DAYS = np.timedelta64(10, "D")  # that the last bars of pooled symbols may be apart
RETURNS = 100  # of which the forecast is made; with the volatility's first, the 128 bars that any study has
DECAY = 0.94  # of the volatility: RiskMetrics' for daily returns (1996)
GAPS = (0.008, 0.01, 0.02, 0.03, 0.05, 0.10)
OWN = "own trial"  # kind of a configuration that too few symbols have
REFERENCE = "mean"  # of pooling: the configuration that every symbol has
MOST_USELESS, LEAST_FOUND = 0.01, 0.85  # what the default rule is to keep to, where a dozen symbols pool


# --- forecasts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SymbolForecasts:
    """One symbol's windows, and what every aggregate would have said at each."""

    windows: Windows
    points: dict[str, np.ndarray]  # by aggregate, [W], price
    volatility: np.ndarray  # [W], price

    def errors(self, points: np.ndarray) -> np.ndarray:
        """Relative to the last close, [W], as a study's metric has them."""
        return np.abs(points - self.windows.actuals[:, 0]) / self.windows.last_closes


def forecast(symbol: str, bars: Bars) -> SymbolForecasts:
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
    return SymbolForecasts(
        windows=everything,
        points={name: draw.aggregate(name)[:, 0] for name in AGGREGATES},
        volatility=volatility,
    )


# --- searches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchWindows:
    """Where in a symbol's windows one search looks; each a slice of the window axis."""

    validation: slice
    earlier: slice  # confirmation without validation
    confirmation: slice
    test: slice
    realised: slice

    def measured(
        self, name: str, errors: np.ndarray, *, on: slice | None = None, of: slice | None = None
    ) -> MeasuredConfiguration:
        """As a confirmation has it. on: the confirmation windows, if any; of: those of the search."""
        return MeasuredConfiguration(
            model="toto",
            params={"aggregate": name},
            confirmation=_measurement(errors[on]) if on else None,
            validation=_measurement(errors[of or self.validation]),
            test=_measurement(errors[self.test]),
        )


def _measurement(errors: np.ndarray) -> Measurement:
    """As much of a measurement as the rule looks at."""
    return Measurement(
        mae=float(errors.mean()),
        price_mae=math.nan,
        mae_percent=math.nan,
        no_change_mae=math.nan,
        skill=math.nan,
        errors=tuple(errors.tolist()),
        sampling_error=None,
        windows=len(errors),
        seconds={},
        latency_s=None,
    )


def dates(all_series: Sequence[SymbolForecasts], *, every: int) -> np.ndarray:
    """When searches are played, the newest first: every so many bars of the symbol with the densest bars."""
    times = [series.windows.bars.timestamps for series in all_series]
    densest = min(times, key=lambda one: ((one[-1] - one[0]) / (len(one) - 1), -len(one)))
    return densest[::-1][REALISED::every]


def search_at(series: SymbolForecasts, date: np.datetime64, *, confirmation: int) -> SearchWindows | None:
    """The search that ends with the last bar at `date`; None where some of its windows are missing."""
    bars, symbol, first = series.windows.bars, series.windows.symbol, series.windows.origins[0]

    def places(windows: Windows) -> slice:
        return slice(windows.origins[0] - first, windows.origins[-1] + 1 - first)

    end = int(np.searchsorted(bars.timestamps, date, side="right"))
    if end < 1 or end + REALISED > len(bars) or date - bars.timestamps[end - 1] > POOL_DAYS:
        return None
    seen = bars.slice(0, end)
    try:
        split = windowing.split(seen, symbol=symbol, validation=VALIDATION, test=TEST)
        confirming = windowing.recent_origins(seen, confirmation, symbol=symbol, before=split.test.origins[0])
    except DataError:  # too early
        return None
    validation, confirmed = places(split.validation), places(confirming)
    return SearchWindows(
        validation=validation,
        earlier=slice(confirmed.start, validation.start),
        confirmation=confirmed,
        test=places(split.test),
        realised=slice(end - first, end - first + REALISED),
    )


# --- rules -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One search and the incumbent it meets."""

    search: SearchWindows
    errors: dict[str, np.ndarray]  # by aggregate, [W]
    incumbent: np.ndarray  # errors, [W]
    label: str  # the incumbent's name; an aggregate's where it is one

    def decide(
        self,
        names: Sequence[str],
        *,
        on: slice | None = None,
        of: slice | None = None,
        beliefs: Beliefs | None = None,
    ) -> tuple[Decision, str]:
        """The project's rule over these aggregates, and the one it chose. on, of: as `SearchWindows.measured`."""
        decision = decide(
            [self.search.measured(name, self.errors[name], on=on, of=of) for name in names],
            self.search.measured(self.label, self.incumbent, on=on, of=of),
            MeasuredConfiguration(model="no change", params={}),  # only a first promotion is compared with it
            Rule(
                min_improvement=MIN_IMPROVEMENT,
                on="pooled" if beliefs else "confirmation" if on else "validation",
            ),
            confirmed=True,
            stale=False,
            beliefs=beliefs,
        )
        assert decision.candidate is not None
        return decision, names[decision.candidate]

    @property
    def top(self) -> list[str]:
        """The best aggregates of the search, best first."""
        seen = self.search.validation
        return sorted(self.errors, key=lambda name: float(self.errors[name][seen].mean()))[:TOP]

    def symbol_errors(self, names: Sequence[str], seen: slice) -> SymbolErrors:
        """What a pool takes: these aggregates on the windows that are seen, and then the incumbent."""
        measured = [Measured(model="toto", family=name, kind=OWN, errors=self.errors[name][seen]) for name in names]
        in_use = Measured(model="toto", family=self.label, kind="in use", errors=self.incumbent[seen])
        return SymbolErrors(references={"toto": self.errors[REFERENCE][seen]}, measured=[*measured, in_use])


Outcome = tuple[bool, str]  # whether it was promoted, and which
Cases = Sequence[Case]  # of one date, a case a symbol


def best_of_30(case: Case) -> Outcome:
    decision, name = case.decide(list(case.errors))
    return decision.promote, name


def best_of_30_and_earlier(case: Case) -> Outcome:
    promote, name = best_of_30(case)
    return promote and case.decide([name], of=case.search.earlier)[0].promote, name


def top_five(case: Case) -> Outcome:
    decision, name = case.decide(case.top, on=case.search.confirmation)
    return decision.promote, name


def all_on_confirmation(case: Case) -> Outcome:
    decision, name = case.decide(list(case.errors), on=case.search.confirmation)
    return decision.promote, name


def pooled(cases: Cases, *, top: bool = False, apart: bool = False) -> list[tuple[Decision, str]]:
    """The best of all, or of the search's best and the default, by the evidence of all symbols.

    apart: without the windows of the search, which are among those of confirmation.
    """
    names = [[*case.top, *({REFERENCE} - {*case.top})] if top else list(case.errors) for case in cases]
    seen = [case.search.earlier if apart else case.search.confirmation for case in cases]
    pool = Pool([case.symbol_errors(of, where) for case, of, where in zip(cases, names, seen, strict=True)])

    def decide_at(place: int) -> tuple[Decision, str]:
        count = len(names[place])
        beliefs = Beliefs(
            gains=[pool.gain(place, number) for number in range(count)],
            over_incumbent=lambda candidate: pool.improvement(place, candidate, count),
            over_no_change=lambda candidate: pool.improvement(place, candidate, None),
        )
        return cases[place].decide(names[place], on=seen[place], beliefs=beliefs)

    return [decide_at(place) for place in range(len(cases))]


def outcomes(cases: Cases) -> dict[str, list[Outcome]]:
    """What every rule does in the cases of one date."""
    found = {name: [rule(case) for case in cases] for name, rule in ALONE.items()}
    decided = pooled(cases)
    for name, holds in GATES.items():
        found[name] = [(decision.promote and holds(decision.comparison), chosen) for decision, chosen in decided]
    for name, how in POOLED.items():
        found[name] = [(decision.promote, chosen) for decision, chosen in pooled(cases, **how)]
    return found


DEFAULT = "default: best of all, > 1 %, pooled"
ALONE: dict[str, Callable[[Case], Outcome]] = {
    "best of 30, > 1 % on the same 30": best_of_30,
    "the same and > 1 % on the rest of confirmation": best_of_30_and_earlier,
    "best of the top five, > 1 % on confirmation": top_five,
    "best of all, > 1 % on confirmation": all_on_confirmation,
}
GATES: dict[str, Callable[[Comparison], bool]] = {
    DEFAULT: lambda found: True,
    "default, --require-test": lambda found: (found.improvement_test or 0.0) >= 0,
    "default, --max-p 0.05": lambda found: (found.p_value or 0.0) <= 0.05,
    "default, interval above 0": lambda found: (found.interval or (0.0,))[0] > 0,
}
POOLED: dict[str, dict[str, bool]] = {
    "pooled, without the windows of the search": {"apart": True},
    "best of the top five and the default, pooled": {"top": True},
    "the same, without the windows of the search": {"top": True, "apart": True},
}


# --- figures -----------------------------------------------------------------------------------------------


def improvement(old: np.ndarray, new: np.ndarray) -> float:
    return float(1 - new.mean() / old.mean())


def judge(cases: Sequence[Case], decided: Sequence[Outcome]) -> dict[str, float | None]:
    """What a rule did over all searches; improvements are realised ones, relative."""
    gains, realised = [], []
    for case, (promote, name) in zip(cases, decided, strict=True):
        after = case.search.realised
        gain = improvement(case.incumbent[after], case.errors[name][after])
        gains += [gain] if promote else []
        realised.append(gain if promote else 0.0)
    return {
        "promoted": len(gains) / len(cases),
        "worse": sum(gain < 0 for gain in gains) / len(gains) if gains else None,
        "realised": float(np.mean(gains)) if gains else None,
        "realised, of all searches": float(np.mean(realised)),
        "its standard error": float(np.std(realised) / math.sqrt(len(realised))),
    }


def moved_to(series: SymbolForecasts, base: str, gap: float, way: int) -> np.ndarray:
    """Errors [W] of `base` moved up (1) or down (-1) by that multiple of the volatility where `base` gains `gap`."""
    right = series.errors(series.points[base])

    def moved(multiple: float) -> np.ndarray:
        return series.errors(series.points[base] + way * multiple * series.volatility)

    # A mean absolute error is convex: past the last multiple with less than the gap there is only more.
    multiples = np.linspace(0, 2, 101)
    below = [multiple for multiple in multiples if improvement(moved(multiple), right) < gap]
    low, high = float(max(below)), float(multiples[-1])
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if improvement(moved(middle), right) < gap else (low, middle)
    return moved(high)


def measure(all_series: Sequence[SymbolForecasts], *, every: int, confirmation: int) -> dict[str, Any]:
    """All figures."""
    all_errors = [{name: series.errors(points) for name, points in series.points.items()} for series in all_series]
    relative = np.array(
        [[errors[name].mean() / errors["median"].mean() for name in AGGREGATES] for errors in all_errors]
    )
    best = [best_over(errors, np.ones(len(errors["mean"]), dtype=bool)) for errors in all_errors]
    moved = [
        {(gap, way): moved_to(series, name, gap, way) for gap in GAPS for way in (1, -1)}
        for series, name in zip(all_series, best, strict=True)
    ]
    counts = dict.fromkeys((series.windows.symbol for series in all_series), 0)
    worlds: dict[str | float, _World] = defaultdict(_World)
    for turn, date in enumerate(dates(all_series, every=every)):
        now: dict[str | float, list[Case]] = defaultdict(list)
        for number, (series, errors) in enumerate(zip(all_series, all_errors, strict=True)):
            search = search_at(series, date, confirmation=confirmation)
            if search is None:
                continue
            counts[series.windows.symbol] += 1
            incumbents = {"best overall": best[number], WORSE: WORSE}
            if len(all_series) > 1:
                others = np.delete(relative, number, axis=0).mean(axis=0)
                incumbents["best of others"] = AGGREGATES[int(others.argmin())]
            elsewhere = np.ones(len(series.windows), dtype=bool)
            for part in (search.confirmation, search.test, search.realised):
                elsewhere[part] = False
            if elsewhere.any():
                incumbents["best elsewhere"] = best_over(errors, elsewhere)
            for world, name in incumbents.items():
                now[world].append(Case(search=search, errors=errors, incumbent=errors[name], label=name))
            for gap in GAPS:
                worse = moved[number][gap, (1, -1)[turn % 2]]
                label = f"{series.windows.symbol}'s, moved"
                now[gap].append(Case(search=search, errors=errors, incumbent=worse, label=label))
        for world, cases in now.items():
            worlds[world].add(cases)
    if not any(counts.values()):
        needed = windowing.MIN_CONTEXT + confirmation + TEST + REALISED
        raise DataError(f"no symbol has the {needed} bars that one search needs; add older bars")
    judged = {world: found.judged() for world, found in worlds.items()}
    return {
        "searches": counts,
        "confirmation": confirmation,
        "every": every,
        f"true gain over {WORSE}": {
            series.windows.symbol: improvement(errors[WORSE], errors[name])
            for series, errors, name in zip(all_series, all_errors, best, strict=True)
        },
        "worlds": {world: by_rule for world, by_rule in judged.items() if isinstance(world, str)},
        "true gains": {name: {str(gap): judged[gap][name] for gap in GAPS} for name in judged[GAPS[0]]},
    }


class _World:
    """All cases of one kind of incumbent, and what every rule did in them."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.decided: dict[str, list[Outcome]] = defaultdict(list)

    def add(self, cases: Cases) -> None:
        self.cases += cases
        for name, found in outcomes(cases).items():
            self.decided[name] += found

    def judged(self) -> dict[str, dict[str, float | None]]:
        return {name: judge(self.cases, found) for name, found in self.decided.items()}


def best_over(errors: dict[str, np.ndarray], where: np.ndarray) -> str:
    """The aggregate with the least error on these windows, bool [W]."""
    return min(errors, key=lambda name: float(errors[name][where].mean()))


def show(figures: dict[str, Any]) -> None:
    searched = f"{sum(figures['searches'].values())} searches, {len(figures['searches'])} symbols"
    print(f"{searched}, confirmation on {figures['confirmation']} windows, {figures['seconds']} s")
    header = ("rule", "promoted", "worse of those", "realised a promotion", "a search")
    for world, by_rule in figures["worlds"].items():
        rows = [
            (
                name,
                per_cent(each["promoted"]),
                per_cent(each["worse"]),
                per_cent(each["realised"], sign=True),
                f"{100 * each['realised, of all searches']:+.2f} ± {100 * each['its standard error']:.2f} %",
            )
            for name, each in by_rule.items()
        ]
        recording.table(f"incumbent: {world}", header, rows)
    gains = figures[f"true gain over {WORSE}"].values()
    print(f"true gain over {WORSE}: {per_cent(min(gains))} to {per_cent(max(gains))}, by symbol\n")
    for title, shown in (("promoted", "promoted"), ("realised a search", "realised, of all searches")):
        rows = [
            (name, *(per_cent(each[shown], sign=shown != "promoted") for each in by_gap.values()))
            for name, by_gap in figures["true gains"].items()
        ]
        recording.table(f"{title}, by the true gain over all windows", ("rule", *map(per_cent, GAPS)), rows)
    useless = figures["worlds"]["best overall"][DEFAULT]["promoted"]
    found = figures["true gains"][DEFAULT]["0.03"]["promoted"]
    print(
        f"default rule: {per_cent(useless)} useless where the incumbent is the best overall (wanted with a dozen "
        f"symbols: at most {per_cent(MOST_USELESS)}); {per_cent(found)} of true 3 % gains found "
        f"(wanted: at least {per_cent(LEAST_FOUND)})"
    )


def main() -> None:
    parser = recording.parser("promotion_rules", __doc__)
    parser.add_argument("--data-dir", type=Path, help="bars, a file a symbol (default: the packaged index bars)")
    number = recording.at_least_one
    parser.add_argument("--confirmation", type=number, default=CONFIRMATION, help="windows (default: %(default)s)")
    parser.add_argument("--every", type=number, default=EVERY, help="bars between searches (default: %(default)s)")
    args = parser.parse_args()
    if args.confirmation <= VALIDATION:
        parser.error(f"--confirmation is more than the {VALIDATION} windows of validation, which are among them")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir is None:
            demo_bars(folder, INDICES)
        try:
            symbols, _, _ = list_symbols(args.data_dir or folder)
            series = [forecast(symbol, read_bars(path)[0]) for symbol, path in symbols.items()]
            figures = measure(series, every=args.every, confirmation=args.confirmation)
        except DataError as error:
            raise SystemExit(str(error)) from error
    figures["seconds"] = round(time.perf_counter() - began)
    show(figures)
    recording.write(args, figures)


if __name__ == "__main__":
    main()
