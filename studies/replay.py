"""Play search and promotion through history: what would have been promoted at each date, and what came of it.

At every date a study is put together from windows that lie before it, as `launch-workers` and `promote` would have had
it, and each rule decides on it; what it then holds in use is judged on the bars that follow, and is what it compares
with at the next date. Pure: takes the errors that studies/history_errors.py measured once for all dates.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from objectives.bootstrap import mean_errors
from objectives.metrics import Measurement, measurement_of_errors
from studies import promotion
from studies.beliefs import Case, beliefs_of
from studies.config import Config
from studies.evidence import MeasuredConfiguration, Source
from studies.history_errors import Candidate, History
from studies.promotion import Decision, Rule
from studies.series import Series

TOP = 5  # configurations of a search that the rule "confirmation" confirms


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """Which dates are played, and with which rules."""

    dates: Sequence[np.datetime64]  # oldest first; a study of a date sees bars up to it
    after: int  # bars that a decision is judged on
    rules: Mapping[str, Rule]
    pool: str | Mapping[str, str] = "all"  # as studies/beliefs.py takes them
    pool_days: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Play:
    """One decision of one rule, and what came of it on the bars after. Gains are relative improvements of the MAE."""

    date: str
    symbol: str
    rule: str
    promoted: bool
    reason: str
    model: str  # of what the rule holds in use after it
    params: Mapping[str, Any]
    improvement: float | None  # as decided
    realised: float | None  # over what was in use before; None: nothing was promoted
    over_start: float  # of what is in use after it, over what was in use at first
    over_default: float
    skill: float


# --- which dates and origins --------------------------------------------------------------------------------


def replay_dates(
    series: Sequence[Series], *, every: int, after: int, count: int, since: np.datetime64 | None = None
) -> list[np.datetime64]:
    """Dates `every` bars of the densest symbol apart, the newest `after` bars before its end, oldest first.

    As many as `count`, or all from `since` on.
    """
    times = [each.bars.timestamps for each in series]
    densest = min(times, key=lambda one: ((one[-1] - one[0]) / max(len(one) - 1, 1), -len(one)))
    dates = densest[::-1][after::every]
    return list(dates[dates >= since] if since is not None else dates[:count])[::-1]


def origins_of(config: Config, series: Series, plan: ReplayPlan) -> range:
    """The origins that some date needs and the bars allow; empty where no date has all its windows."""
    counts = config.windows
    ends = [end for date in plan.dates if (end := end_at(series, date)) and _fits(config, series, plan, end)]
    if not ends:
        return range(0)
    return range(_first_origin(config, min(ends)), max(ends) + plan.after - counts.horizon + 1)


def end_at(series: Series, date: np.datetime64) -> int:
    """The number of bars up to a date."""
    return int(np.searchsorted(series.bars.timestamps, date, side="right"))


def _first_origin(config: Config, end: int) -> int:
    """Of the confirmation windows of a study whose bars end there."""
    counts = config.windows
    return end - 2 * (counts.horizon - 1) - counts.test - max(counts.confirmation, counts.validation)


def _fits(config: Config, series: Series, plan: ReplayPlan, end: int) -> bool:
    first = _first_origin(config, end)
    return first >= config.windows.min_context and end + plan.after <= len(series.bars)


# --- playing ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Held:
    """What one rule has in use at one symbol; at first what the replay begins with, else the first model's default."""

    place: tuple[int, int]  # history and candidate
    began: tuple[int, int]


def play(config: Config, plan: ReplayPlan, histories: Sequence[History]) -> list[Play]:
    """Every decision, date by date. Dates that a symbol has too few bars for are left out for it."""
    by_symbol: dict[str, list[History]] = defaultdict(list)
    for history in histories:
        by_symbol[history.symbol].append(history)
    held: dict[tuple[str, str], _Held] = {}
    plays: list[Play] = []
    for date in plan.dates:
        studies = [
            _Study.at(config, plan, found, date)
            for found in by_symbol.values()
            if _fits(config, found[0].series, plan, end_at(found[0].series, date))
        ]
        for name, rule in plan.rules.items():
            states = [
                held.setdefault(
                    (name, study.symbol), _Held(place=(place := study.place_of("in use", "default")), began=place)
                )
                for study in studies
            ]
            asked = [study.candidates(rule) for study in studies]
            cases = [
                study.case(rule, [one for _, one in found], state)
                for study, found, state in zip(studies, asked, states, strict=True)
            ]
            believed = (
                beliefs_of(cases, pool=plan.pool, pool_days=plan.pool_days)
                if rule.on == "pooled"
                else [None] * len(cases)
            )
            for study, found, case, state, beliefs in zip(studies, asked, cases, states, believed, strict=True):
                [incumbent] = case.in_use
                decision = promotion.decide(
                    case.candidates,
                    incumbent,
                    case.no_change,
                    rule,
                    confirmed=True,
                    stale=False,
                    beliefs=beliefs and beliefs.on(case.candidates, incumbent),
                )
                before = state.place
                if decision.promote and decision.candidate is not None:
                    state.place = found[decision.candidate][0]
                plays.append(study.judged(name, date, decision, before, state))
    return plays


@dataclass(frozen=True, kw_only=True, eq=False)
class _Study:
    """What is known of one symbol at one date, and what came after."""

    symbol: str
    as_of: np.datetime64
    question: str
    histories: Sequence[History]
    validation: slice
    confirmation: slice
    test: slice
    after: slice
    end: int

    @classmethod
    def at(cls, config: Config, plan: ReplayPlan, histories: Sequence[History], date: np.datetime64) -> _Study:
        counts, first = config.windows, histories[0].first
        end = end_at(histories[0].series, date)
        test = end - counts.horizon + 1 - counts.test  # origins, as objectives/windows.py splits bars
        before = test - counts.horizon + 1
        confirmed = before - max(counts.confirmation, counts.validation)
        return cls(
            symbol=histories[0].symbol,
            as_of=histories[0].series.bars.timestamps[end - 1],
            question=json.dumps([counts.horizon, config.search.objective, counts.confirmation]),
            histories=histories,
            validation=slice(before - counts.validation - first, before - first),
            confirmation=slice(confirmed - first, before - first),
            test=slice(test - first, test + counts.test - first),
            after=slice(end - first, end + plan.after - counts.horizon + 1 - first),
            end=end,
        )

    def place_of(self, *sources: Source) -> tuple[int, int]:
        """The place of the first configuration of the first of these sources that there is."""
        found = {one.source: (h, c) for h, c, one in reversed(list(self._everything()))}
        return next(found[source] for source in sources if source in found)

    def _everything(self) -> Iterator[tuple[int, int, Candidate]]:
        for h, history in enumerate(self.histories):
            for c, one in enumerate(history.candidates):
                yield h, c, one

    def candidates(self, rule: Rule) -> list[tuple[tuple[int, int], MeasuredConfiguration]]:
        """What the rule may choose from, and its places: all, or for "confirmation" each model's best of the search."""
        found = []
        for h, history in enumerate(self.histories):
            ranked = np.argsort(history.search[:, self.validation].mean(axis=1), kind="stable")
            places = [c for c in ranked if history.candidates[c].source != "in use"]
            found += [
                ((h, int(c)), self.measured((h, int(c))))
                for c in (places[:TOP] if rule.on == "confirmation" else places)
            ]
        return found

    def measured(self, place: tuple[int, int]) -> MeasuredConfiguration:
        history, one = self.histories[place[0]], self.histories[place[0]].candidates[place[1]]
        search, fresh = history.search[place[1]], history.fresh[place[1]]
        return MeasuredConfiguration(
            model=history.model,
            params=one.params,
            source=one.source,
            clipped=history.clipped(place[1], self.end),
            validation=_measurement(search[self.validation], history.no_change[self.validation]),
            confirmation=_measurement(fresh[self.confirmation], history.no_change[self.confirmation]),
            test=_measurement(fresh[self.test], history.no_change[self.test]),
        )

    def case(self, rule: Rule, candidates: Sequence[MeasuredConfiguration], state: _Held) -> Case:
        no_change = self.histories[0].no_change
        confirmation, test = no_change[self.confirmation], no_change[self.test]
        return Case(
            symbol=self.symbol,
            as_of=self.as_of,
            question=self.question,
            checkpoints={history.model: history.checkpoint for history in self.histories},
            candidates=candidates,
            in_use=[self.measured(state.place)],
            no_change=MeasuredConfiguration(
                model="no change",
                params={},
                confirmation=_measurement(confirmation, confirmation),
                test=_measurement(test, test),
            ),
        )

    def judged(self, rule: str, date: np.datetime64, decision: Decision, before: tuple[int, int], state: _Held) -> Play:
        def error(place: tuple[int, int]) -> float:
            return float(self.histories[place[0]].fresh[place[1], self.after].mean())

        history, one = self.histories[state.place[0]], self.histories[state.place[0]].candidates[state.place[1]]
        now = error(state.place)
        return Play(
            date=str(date.astype("datetime64[D]")),
            symbol=self.symbol,
            rule=rule,
            promoted=decision.promote,
            reason=decision.reason,
            model=history.model,
            params=dict(one.params),
            improvement=decision.improvement,
            realised=1 - now / error(before) if decision.promote else None,
            over_start=1 - now / error(state.began),
            over_default=1 - now / error(self.place_of("default")),
            skill=1 - now / float(self.histories[0].no_change[self.after].mean()),
        )


def _measurement(errors: np.ndarray, no_change: np.ndarray) -> Measurement:
    return measurement_of_errors(errors.tolist(), mae=float(errors.mean()), no_change_mae=float(no_change.mean()))


# --- what came of it ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RuleOutcome:
    """One rule over all dates and symbols. Gains are means over its decisions, with 95 % intervals over the dates."""

    rule: str
    decisions: int
    promoted: float  # share
    worse: float | None  # share of the promotions that were worse afterwards than what they replaced
    realised: float | None  # gain a promotion, over what it replaced
    a_decision: float  # the same, 0 where nothing was promoted
    a_decision_interval: tuple[float, float]
    over_start: float  # of what was in use after each decision, over keeping what was in use at first
    over_start_interval: tuple[float, float]
    over_default: float
    over_default_interval: tuple[float, float]
    skill: float
    curve: Sequence[tuple[str, float]] = field(default=())  # by date, mean gain over the start of what is in use


def summarise(plays: Sequence[Play], *, overlap: float) -> list[RuleOutcome]:
    """What each rule did, in the order in which they were played. overlap: dates whose bars after them are shared."""
    by_rule: dict[str, list[Play]] = defaultdict(list)
    for one in plays:
        by_rule[one.rule].append(one)
    return [_outcome(rule, found, overlap) for rule, found in by_rule.items()]


def _outcome(rule: str, plays: Sequence[Play], overlap: float) -> RuleOutcome:
    gains = [one.realised for one in plays if one.realised is not None]
    a_decision = _by_date(plays, lambda one: one.realised or 0.0)
    over_start = _by_date(plays, lambda one: one.over_start)
    over_default = _by_date(plays, lambda one: one.over_default)
    return RuleOutcome(
        rule=rule,
        decisions=len(plays),
        promoted=len(gains) / len(plays),
        worse=sum(gain < 0 for gain in gains) / len(gains) if gains else None,
        realised=float(np.mean(gains)) if gains else None,
        a_decision=float(np.mean([one.realised or 0.0 for one in plays])),
        a_decision_interval=_interval(a_decision, overlap),
        over_start=float(np.mean([one.over_start for one in plays])),
        over_start_interval=_interval(over_start, overlap),
        over_default=float(np.mean([one.over_default for one in plays])),
        over_default_interval=_interval(over_default, overlap),
        skill=float(np.mean([one.skill for one in plays])),
        curve=tuple(over_start.items()),
    )


def _by_date(plays: Sequence[Play], value: Callable[[Play], float]) -> dict[str, float]:
    """The mean over the symbols of a date, oldest first: symbols of one date share its news."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in plays:
        found[one.date].append(value(one))
    return {date: float(np.mean(values)) for date, values in sorted(found.items())}


def _interval(by_date: Mapping[str, float], overlap: float) -> tuple[float, float]:
    """95 % of the mean over dates, by the stationary bootstrap over blocks of dates that share bars."""
    values = np.array(list(by_date.values()))
    width = 1.96 * float(mean_errors(values[None], max(overlap, 1.0))[0]) if len(values) > 1 else math.inf
    return float(values.mean()) - width, float(values.mean()) + width
