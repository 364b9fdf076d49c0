"""How often a rule promotes what is no better, and how often it finds what is.

`python -m benchmarks.promotion_rules [--data-dir FOLDER]`: on the bars of a folder, else on the packaged daily bars.

Every 30 bars back through history a search is played for every symbol that has the bars for it: it sees the bars up to
there, splits them as a study does (30 windows of validation before 20 of test, confirmation on the 250 before test),
picks among 20 aggregates and promotes or not. What it promoted is then judged on the 60 bars after. The default rule
pools the evidence of all symbols of one date; further rules pool without the windows of the search, or only its best.
Forecasts are those of `plain_searches`, whose samples are the same for all: there is no sampling noise. Only choosing
the least of many numbers is noise.

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
from benchmarks.plain_searches import (
    AGGREGATES,
    REALISED,
    REFERENCE,
    TEST,
    VALIDATION,
    SearchWindows,
    SymbolForecasts,
    dates,
    forecast,
    search_at,
)
from benchmarks.recording import per_cent
from objectives import windows as windowing
from objectives.bars import DataError, read_bars
from studies.demo import INDICES, demo_bars
from studies.evidence import MeasuredConfiguration
from studies.pooling import Measured, Pool, SymbolErrors
from studies.promotion import Beliefs, Comparison, Decision, Rule, decide
from studies.series import list_symbols

WORSE = "quantile_0.30"
CONFIRMATION = 250  # windows
EVERY = 30  # bars between two searches
MIN_IMPROVEMENT = 0.01
TOP = 5  # configurations that are confirmed
GAPS = (0.008, 0.01, 0.02, 0.03, 0.05, 0.10)
OWN = "own trial"  # kind of a configuration that too few symbols have
MOST_USELESS, LEAST_FOUND = 0.01, 0.85  # what the default rule is to keep to, where a dozen symbols pool


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
