"""Samples to a point forecast: every named aggregate.

Owns the names, what each means, and the work that aggregates of one draw share. Knows nothing of windows, models
or metrics. Names and edge rules are those of the configurations that our users already have.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from forecasters import ForecastError

KEPT_COUNTS = 4  # sorted prefixes a draw keeps; at 4,096 samples each is as large as the draw


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """A parsed aggregate. Names that mean the same (`p10`, `quantile_10`, `quantile_0.1`) are equal."""

    kind: str
    numbers: tuple[float, ...] = ()  # fractions as 0..1, weights and multiples as they are

    @property
    def name(self) -> str:
        """The name that parses to this aggregate, fractions below 1 as 0.05 since a literal 1 is 100 %."""
        return "_".join([self.kind, *(str(number) for number in self.numbers)])


# --- names -------------------------------------------------------------------------------------------------


def parse(name: str) -> Aggregate:
    """The aggregate of this name, in any case, spaces around it ignored; an empty name is the mean.

    Forms: mean, median, p10, p90, trimmed_mean_F, lower_trimmed_mean_F, upper_trimmed_mean_F, winsorized_mean_F,
    quantile_Q, mean_minus_std_S, mean_plus_std_S, mean_quantile_mix_Q_W, quantile_plus_std_Q_S. F and Q are fractions:
    a number above 1 is a percentage, so 5 is 0.05 and a literal 1 is 100 %. Raises ValueError.
    """
    text = name.strip().lower() or "mean"
    text = _SYNONYMS.get(text, text)
    # The longest form first: quantile_plus_std_0.5_1 is no quantile_Q.
    for kind in sorted(_FORMS, key=len, reverse=True):
        form = _FORMS[kind]
        tokens = text.removeprefix(kind).split("_")[1:]
        if text == "_".join([kind, *tokens]):
            if len(tokens) != len(form.parsers):
                break
            numbers = (parser(token, name) for parser, token in zip(form.parsers, tokens, strict=True))
            return Aggregate(kind=kind, numbers=tuple(numbers))
    raise ValueError(f"unknown aggregate {name!r}; there are {', '.join(form.usage for form in _FORMS.values())}")


def _number(token: str, name: str) -> float:
    try:
        number = float(token)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"aggregate {name!r}: {token!r} is not a number")
    return number + 0.0  # -0.0 is 0.0


def _fraction(token: str, name: str) -> float:
    number = _number(token, name)
    fraction = number / 100 if number > 1 else number
    if not 0 <= fraction <= 1:
        raise ValueError(f"aggregate {name!r}: {token} is not a fraction of 0 to 1 or a percentage of up to 100")
    return fraction


def _half_fraction(token: str, name: str) -> float:
    fraction = _fraction(token, name)
    if fraction >= 0.5:
        raise ValueError(f"aggregate {name!r}: {fraction:.0%} of each end leaves nothing; it must be below 50 %")
    return fraction


def _weight(token: str, name: str) -> float:
    return min(max(_number(token, name), 0.0), 1.0)


def _multiple(token: str, name: str) -> float:
    number = _number(token, name)
    if number < 0:
        raise ValueError(f"aggregate {name!r}: {token} standard deviations is below 0")
    return number


# --- formulas: samples in any order and the same in ascending order, both [W, H, S], to points [W, H] --------


class _Samples(NamedTuple):
    drawn: np.ndarray  # [W, H, S]
    ascending: np.ndarray  # [W, H, S]

    @property
    def total(self) -> int:
        return self.drawn.shape[-1]


def _mean(samples: _Samples) -> np.ndarray:
    return samples.drawn.mean(axis=-1)


def _median(samples: _Samples) -> np.ndarray:
    upper = samples.total // 2
    lower = (samples.total - 1) // 2
    return samples.ascending[..., lower : upper + 1].mean(axis=-1)


def _quantile(samples: _Samples, q: float) -> np.ndarray:
    """Linear between the two nearest samples (Hyndman and Fan's type 7, numpy's default)."""
    place = q * (samples.total - 1)
    lower = min(math.floor(place), samples.total - 1)
    low = samples.ascending[..., lower]
    high = samples.ascending[..., min(lower + 1, samples.total - 1)]
    return low + (high - low) * (place - lower)


def _kept_mean(samples: _Samples, start: int, stop: int) -> np.ndarray:
    """Of the ascending samples [start, stop): summed themselves, as one heavy tail spoils a running sum for all."""
    if stop - start == samples.total:
        return _mean(samples)
    return samples.ascending[..., start:stop].mean(axis=-1)


def _trimmed_mean(samples: _Samples, f: float) -> np.ndarray:
    cut = math.floor(samples.total * f)
    return _kept_mean(samples, cut, samples.total - cut)


def _lower_trimmed_mean(samples: _Samples, f: float) -> np.ndarray:
    """Without the highest: the lower part stays, as the name has always meant."""
    return _kept_mean(samples, 0, max(1, math.floor(samples.total * (1 - f))))


def _upper_trimmed_mean(samples: _Samples, f: float) -> np.ndarray:
    """Without the lowest."""
    return _kept_mean(samples, min(math.floor(samples.total * f), samples.total - 1), samples.total)


def _winsorized_mean(samples: _Samples, f: float) -> np.ndarray:
    """Each end's samples pulled to the nearest one kept (Tukey and McLaughlin, 1963)."""
    cut = math.floor(samples.total * f)
    if cut == 0:
        return _mean(samples)
    inner = samples.ascending[..., cut : samples.total - cut]
    return (inner.sum(axis=-1) + cut * (inner[..., 0] + inner[..., -1])) / samples.total


def _std(samples: _Samples) -> np.ndarray:
    return samples.drawn.std(axis=-1, ddof=0)


class _Form(NamedTuple):
    usage: str
    formula: Callable[..., np.ndarray]
    parsers: tuple[Callable[[str, str], float], ...] = ()
    ordered: bool = True  # whether the formula needs the samples in order


_SYNONYMS = {"p10": "quantile_0.1", "p90": "quantile_0.9"}
_FORMS = {
    "mean": _Form("mean", _mean, ordered=False),
    "median": _Form("median, p10, p90", _median),
    "trimmed_mean": _Form("trimmed_mean_F", _trimmed_mean, (_half_fraction,)),
    "lower_trimmed_mean": _Form("lower_trimmed_mean_F", _lower_trimmed_mean, (_fraction,)),
    "upper_trimmed_mean": _Form("upper_trimmed_mean_F", _upper_trimmed_mean, (_fraction,)),
    "winsorized_mean": _Form("winsorized_mean_F", _winsorized_mean, (_half_fraction,)),
    "quantile": _Form("quantile_Q", _quantile, (_fraction,)),
    "mean_minus_std": _Form(
        "mean_minus_std_S", lambda drawn, s: _mean(drawn) - s * _std(drawn), (_multiple,), ordered=False
    ),
    "mean_plus_std": _Form(
        "mean_plus_std_S", lambda drawn, s: _mean(drawn) + s * _std(drawn), (_multiple,), ordered=False
    ),
    "mean_quantile_mix": _Form(
        "mean_quantile_mix_Q_W",
        lambda drawn, q, w: w * _mean(drawn) + (1 - w) * _quantile(drawn, q),
        (_fraction, _weight),
    ),
    "quantile_plus_std": _Form(
        "quantile_plus_std_Q_S", lambda drawn, q, s: _quantile(drawn, q) + s * _std(drawn), (_fraction, _multiple)
    ),
}


# --- draws -------------------------------------------------------------------------------------------------


class Draw:
    """The samples of one draw, and what every aggregate of it shares.

    samples: [windows, samples, horizon], never transposed by guess. Raises ValueError for any other shape.
    """

    def __init__(self, samples: np.ndarray) -> None:
        samples = np.asarray(samples, dtype=np.float64)
        if samples.ndim != 3 or 0 in samples.shape:
            raise ValueError(f"samples are [windows, samples, horizon], not {list(samples.shape)}")
        # A copy, so that a forecaster may reuse its buffer; every sum runs along memory.
        self._drawn = np.array(samples.swapaxes(1, 2), order="C")  # [W, H, S]
        self._ascending: OrderedDict[int, np.ndarray] = OrderedDict()  # by count, [W, H, count]
        bad = np.any(~np.isfinite(self._drawn), axis=1)  # [W, S]
        # A sample beyond the count asked for is not used and must not matter.
        self._finite = np.where(np.any(bad, axis=1), np.argmax(bad, axis=1), self.count)  # [W]

    @property
    def count(self) -> int:
        """Samples there are."""
        return self._drawn.shape[-1]

    @property
    def nbytes(self) -> int:
        """Memory held now; it grows with the sample counts asked for, up to `KEPT_COUNTS` of them."""
        return self._drawn.nbytes + sum(prefix.nbytes for prefix in self._ascending.values())

    def samples(self, num_samples: int | None = None) -> np.ndarray:
        """The first `num_samples` (default: all) as they were drawn, float64 [W, S, H]; not to be written to.

        Raises ValueError for more samples than there are.
        """
        return self._drawn[..., : self._checked(num_samples)].swapaxes(1, 2)

    def non_finite_window(self, num_samples: int | None = None) -> int | None:
        """The first window with a NaN or an infinity among its first samples."""
        bad = self._finite < self._checked(num_samples)
        return int(bad.argmax()) if bad.any() else None

    def aggregate(self, name: str | Aggregate, num_samples: int | None = None) -> np.ndarray:
        """Points, float64 [W, H], from the first `num_samples` (default: all) samples.

        Equal for a draw and for a larger one that begins with it, whatever was asked before.
        Raises ValueError for an unknown name or more samples than there are, ForecastError for non-finite samples.
        """
        aggregate = parse(name) if isinstance(name, str) else name
        count = self._checked(num_samples)
        if (window := self.non_finite_window(count)) is not None:
            raise ForecastError(f"window {window} has NaN or infinite samples")
        form = _FORMS[aggregate.kind]
        ascending = self._prefix(count) if form.ordered else self._drawn[..., :0]
        return form.formula(_Samples(self._drawn[..., :count], ascending), *aggregate.numbers)

    def _checked(self, num_samples: int | None) -> int:
        count = self.count if num_samples is None else num_samples
        if not 1 <= count <= self.count:
            raise ValueError(f"{count} of {self.count} samples were asked for")
        return count

    def _prefix(self, count: int) -> np.ndarray:
        """The first `count` samples in ascending order, [W, H, count]."""
        if count not in self._ascending:
            self._ascending[count] = np.sort(self._drawn[..., :count], axis=-1)
            if len(self._ascending) > KEPT_COUNTS:
                self._ascending.popitem(last=False)
        self._ascending.move_to_end(count)
        return self._ascending[count]
