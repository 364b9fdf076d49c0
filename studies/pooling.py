"""Evidence pooled over symbols: what a configuration gains, given what it gains elsewhere.

Partial pooling (empirical Bayes). At every symbol a configuration's gain over one common reference is measured on the
same windows, on a log scale, with the standard error that the stationary bootstrap gives it. The gains of one
configuration scatter around their mean over symbols by these errors and by what truly differs between symbols, which
DerSimonian and Laird (1986) estimate. Each gain is then shrunk towards that mean, the more the less it is known.
Pure: errors in, posteriors out; knows nothing of studies, files or decisions.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from objectives.bootstrap import ERRORS_95, mean_errors

SHARED_BY = 3  # symbols that measured a configuration, from which on it is pooled by itself and not with its kind
LEAST_ERROR = 1e-9  # of a gain on the log scale: what rounding leaves of one that is certain


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One configuration's errors at one symbol, and what it is pooled with."""

    model: str
    family: Hashable  # equal for the same configuration at other symbols
    kind: str  # what it is pooled with where too few symbols measured its family; the first of a kind stands for it
    errors: np.ndarray  # [W], above 0 on average
    samples: int = 0  # that with the most stands for its family: a number of samples only adds noise


@dataclass(frozen=True, kw_only=True, eq=False)
class SymbolErrors:
    """What was measured at one symbol, all on the same windows.

    references: by model, the errors [W] of the configuration that every symbol measured. The first of them ties the
    models together: the others' gains over it are pooled as well.
    """

    references: Mapping[str, np.ndarray]
    measured: Sequence[Measured]


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """What is believed of one configuration against another at a symbol, relative to the other's MAE."""

    value: float
    interval: tuple[float, float]  # 95 %
    p_value: float  # chance that it is not above 0
    own: float  # measured there alone
    symbols: int  # whose evidence it rests on


class Pool:
    """The posterior of every configuration at every symbol. With one symbol each is what was measured there.

    Configurations are named by their symbol's place in `symbols` and their own in its `measured`.
    Raises ValueError for errors of different lengths, or that are not finite and above 0 on average.
    """

    def __init__(self, symbols: Sequence[SymbolErrors]) -> None:
        enough = min(SHARED_BY, max(len(symbols), 2))
        shared = Counter(key for symbol in symbols for key in {(one.model, one.family) for one in symbol.measured})
        standing: dict[Hashable, dict[int, _Gain]] = defaultdict(dict)  # by class and symbol, which stands for it there
        self._own: list[list[_Gain]] = []
        self._stands: list[list[_Gain]] = []
        self._classes: list[list[Hashable]] = []
        self._ties: list[dict[str, tuple[Hashable, _Gain]]] = []  # of the other models' references to the first
        for k, symbol in enumerate(symbols):
            own, ties = _gains(symbol)
            self._own.append(own)
            self._stands.append([own[place] for place in _standing_for_families(symbol.measured)])
            self._classes.append(
                [
                    (one.model, one.family) if shared[one.model, one.family] >= enough else (one.model, None, one.kind)
                    for one in symbol.measured
                ]
            )
            self._ties.append(
                {model: ((next(iter(symbol.references)), model, "tie"), tie) for model, tie in ties.items()}
            )
            for name, stands in (*zip(self._classes[k], self._stands[k], strict=True), *self._ties[k].values()):
                standing[name].setdefault(k, stands)
        self._models = [[one.model for one in symbol.measured] for symbol in symbols]
        self._means = {name: _Mean.of(gains) for name, gains in standing.items()}
        self._covariances: dict[tuple[Hashable, Hashable], _Covariances] = {}  # by two classes

    def gain(self, symbol: int, place: int) -> float:
        """What is believed of a gain over the first model's reference: log(MAE of the reference / MAE)."""
        return sum(term.gain for term in self._terms(symbol, place))

    def improvement(self, symbol: int, new: int, old: int | None) -> Improvement:
        """Of one configuration over another, None being the first model's reference: the difference of two posteriors.

        The interval allows for errors that both share, on the windows of a symbol and between symbols, and for the
        share of shrinking being estimated itself (the last term of Morris, 1983, equation 4.3).
        """
        terms = [*self._terms(symbol, new), *(self._terms(symbol, old, sign=-1) if old is not None else ())]
        sampling = (
            float(
                mean_errors(
                    np.sum([term.sign * term.kept * term.stands.series for term in terms], axis=0, keepdims=True)
                )[0]
            )
            ** 2
        )
        differing = 0.0
        for one in terms:
            for other in terms:
                both = self._together(one, other)
                differing += one.sign * other.sign * (1 - one.kept) * (1 - other.kept) * (both.between + both.mean)
        shrunk = sum(term.sign * (1 - term.kept) * (term.stands.value - term.mean.value) for term in terms)
        symbols = min(len(term.mean.gains) for term in terms)
        estimated = 2 / max(symbols - 1, 1) * shrunk**2
        extra = sum(_extra(term.own, term.stands) for term in terms)
        error = max(math.sqrt(max(sampling + differing + extra, 0.0) + estimated), LEAST_ERROR)
        gain = sum(term.sign * term.gain for term in terms)
        return Improvement(
            value=_relative(gain),
            interval=(_relative(gain - ERRORS_95 * error), _relative(gain + ERRORS_95 * error)),
            p_value=math.erfc(gain / error / math.sqrt(2)) / 2,
            own=_relative(sum(term.sign * term.own.value for term in terms)),
            symbols=symbols,
        )

    def _terms(self, symbol: int, place: int, sign: int = 1) -> list[_Term]:
        """A configuration's gain over its model's reference, and of that over the first model's."""
        name, own, stands = self._classes[symbol][place], self._own[symbol][place], self._stands[symbol][place]
        terms = [_Term(sign=sign, name=name, own=own, stands=stands, mean=self._means[name])]
        if tied := self._ties[symbol].get(self._models[symbol][place]):
            terms.append(_Term(sign=sign, name=tied[0], own=tied[1], stands=tied[1], mean=self._means[tied[0]]))
        return terms

    def _together(self, one: _Term, other: _Term) -> _Covariances:
        if one.name == other.name:
            return _Covariances(between=one.mean.between, mean=one.mean.variance)
        names = one.name, other.name
        if names not in self._covariances:
            self._covariances[names] = self._covariances[other.name, one.name] = one.mean.covariances(other.mean)
        return self._covariances[names]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Term:
    """One gain of a sum of gains, and the class that it is shrunk towards."""

    sign: int
    name: Hashable  # of the class
    own: _Gain
    stands: _Gain  # for the family of `own`
    mean: _Mean

    @property
    def kept(self) -> float:
        """The share of a symbol's own evidence; all where there is no other."""
        known = self.stands.error**2
        return 1.0 if len(self.mean.gains) < 2 else self.mean.between / (self.mean.between + known)

    @property
    def gain(self) -> float:
        return self.kept * self.stands.value + (1 - self.kept) * self.mean.value + self.own.value - self.stands.value


def _relative(gain: float) -> float:
    return -math.expm1(-gain)


# --- at one symbol ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gain:
    value: float
    error: float
    series: np.ndarray  # [W], how each window moves it


def _gains(symbol: SymbolErrors) -> tuple[list[_Gain], dict[str, _Gain]]:
    """Of every configuration over its model's reference, and of the other models' references over the first."""
    first, *others = symbol.references
    pairs = [(symbol.references[one.model], one.errors) for one in symbol.measured]
    pairs += [(symbol.references[first], symbol.references[other]) for other in others]
    old, new = (np.array(errors, dtype=float).reshape(len(pairs), -1) for errors in zip(*pairs, strict=True))
    old_means, new_means = old.mean(axis=1), new.mean(axis=1)
    if not (np.isfinite(old).all() and np.isfinite(new).all() and (old_means > 0).all() and (new_means > 0).all()):
        raise ValueError("errors must be finite, and above 0 on average")
    series = old / old_means[:, None] - new / new_means[:, None]
    gains = [
        _Gain(value=math.log(before / after), error=max(float(error), LEAST_ERROR), series=row)
        for before, after, error, row in zip(old_means, new_means, mean_errors(series), series, strict=True)
    ]
    return gains[: len(symbol.measured)], dict(zip(others, gains[len(symbol.measured) :], strict=True))


def _extra(own: _Gain, stands: _Gain) -> float:
    """The variance of a gain's difference to that which stands for its family, which is known from this symbol."""
    return 0.0 if own is stands else float(mean_errors((own.series - stands.series)[None])[0]) ** 2


def _standing_for_families(measured: Sequence[Measured]) -> list[int]:
    """For every configuration the place of the one with the most samples of its family."""
    most: dict[Hashable, int] = {}
    for place, one in enumerate(measured):
        key = (one.model, one.family)
        if key not in most or one.samples > measured[most[key]].samples:
            most[key] = place
    return [most[one.model, one.family] for one in measured]


# --- over symbols -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Covariances:
    """Of two means: of what truly differs between symbols, and of the errors of the means."""

    between: float
    mean: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mean:
    """The gains of one class over symbols, by symbol; their mean and their variance between symbols."""

    gains: Mapping[int, _Gain]
    value: float
    variance: float  # of `value`
    between: float

    @classmethod
    def of(cls, gains: Mapping[int, _Gain]) -> _Mean:
        """By DerSimonian and Laird (1986)."""
        values = np.array([gain.value for gain in gains.values()])
        errors = np.array([gain.error for gain in gains.values()])
        between = _between(values, errors**2)
        weights = 1 / (errors**2 + between)
        return cls(
            gains=gains,
            value=float((weights * values).sum() / weights.sum()),
            variance=float(1 / weights.sum()),
            between=between,
        )

    def covariances(self, other: _Mean) -> _Covariances:
        """The covariances of two classes' means, from the symbols that both have."""
        shared = [k for k in self.gains if k in other.gains]
        if not shared:
            return _Covariances(between=0.0, mean=0.0)
        apart = np.array([self.gains[k].series - other.gains[k].series for k in shared])  # [K, W]
        differences = np.array([self.gains[k].value - other.gains[k].value for k in shared])
        errors = np.maximum(mean_errors(apart), LEAST_ERROR)
        variances = np.array([[self.gains[k].error ** 2, other.gains[k].error ** 2] for k in shared])
        sampling = (variances.sum(axis=1) - errors**2) / 2
        most = math.sqrt(self.between * other.between)
        between = min(max((self.between + other.between - _between(differences, errors**2)) / 2, -most), most)
        weights = self.variance / (variances[:, 0] + self.between) * other.variance / (variances[:, 1] + other.between)
        return _Covariances(between=between, mean=float((weights * (sampling + between)).sum()))


def _between(values: np.ndarray, variances: np.ndarray) -> float:
    """The variance of what is measured beyond that of the measuring, both [K]."""
    if len(values) < 2:
        return 0.0
    weights = 1 / variances
    mean = (weights * values).sum() / weights.sum()
    excess = (weights * (values - mean) ** 2).sum() - (len(values) - 1)
    return max(float(excess / (weights.sum() - (weights**2).sum() / weights.sum())), 0.0)
