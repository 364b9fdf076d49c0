"""The contract that every forecaster keeps, and the lazy loader that makes one.

Imports no torch: the modules behind `load` do. Knows nothing of windows, studies, databases or commands.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


class ExpectedError(Exception):
    """Base class of every error that a person can mend.

    Its message is one line that names the file, option, setting or row and what to do; commands print it and exit 1.
    """


class ForecastError(ExpectedError):
    """The forecaster could not answer for these inputs (non-finite samples, out of memory, horizon too long)."""


def halved(count: int, device: object, what: str, error: Exception) -> int:
    """The number to run together from now on, after `count` of them ran out of memory.

    what: describes one of them. error: torch's, which may say how much memory it wanted.
    Raises ForecastError where even one does not fit.
    """
    if count > 1:
        return -(-count // 2)
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    more = f", wanting {wanted[1]} more" if wanted else ""
    raise ForecastError(f"out of memory on {device} with {what}{more}") from error


class CheckpointError(ExpectedError, ValueError):
    """A checkpoint cannot be found, read, or does not fit the network it is for."""


class SettingError(ExpectedError, ValueError):
    """A forecaster cannot run as the settings or the environment ask."""


COMPILE_MODES = ("auto", "off", "default", "reduce-overhead", "max-autotune")
KEYS = ("open", "high", "low", "close")  # the prices of a bar, each of which can be asked for
CLOSE = "close"  # what is asked for unless said otherwise
DTYPES = ("float32", "bfloat16", "int8")  # of the network; statistics and Kronos' tokenizer are always float32


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a forecaster runs, whatever its checkpoint is. See compilation.py for mode, backend and folder."""

    compile_mode: str = "auto"
    compile_backend: str = "inductor"
    compile_dir: str = "compiled_models"
    dtype: str = "float32"
    chunk: int = 10  # windows in a compiled graph; fewer are padded


BY_DEFAULT = Running()


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """Consecutive bars of one symbol, oldest first. All arrays have one entry a bar, [T]."""

    timestamps: np.ndarray  # datetime64[ns], UTC, strictly ascending
    open: np.ndarray  # float64, price
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    volume: np.ndarray | None  # float64; None where the file has none

    def __len__(self) -> int:
        return len(self.close)

    def slice(self, start: int, stop: int) -> Bars:
        """The bars [start, stop) as views."""
        return Bars(
            timestamps=self.timestamps[start:stop],
            open=self.open[start:stop],
            high=self.high[start:stop],
            low=self.low[start:stop],
            close=self.close[start:stop],
            volume=None if self.volume is None else self.volume[start:stop],
        )


class Encoded(Protocol):
    """What a network computes for some windows that does not depend on how they are sampled."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Expectation:
    """The exact answer of a model that knows the mean only: the limit of the samples' mean."""

    points: np.ndarray  # float64 [W, H]
    mass: np.ndarray  # float64 [W], probability that was summed over; the rest was sampled
    bound: np.ndarray  # float64 [W, H], four standard errors of the sampled rest; 0 where nothing was left


@dataclass(frozen=True, kw_only=True, eq=False)
class StudentMixture:
    """The exact answer of a model that samples from mixtures of K Student's t a step, in price. All [W, H, K]."""

    probs: np.ndarray  # float64, summing to 1 over K
    df: np.ndarray
    loc: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantiles:
    """The answer of a model without samples: quantiles of every step, in price."""

    levels: np.ndarray  # float64 [Q], ascending, within (0, 1)
    values: np.ndarray  # float64 [W, H, Q], ascending along Q


@dataclass(frozen=True, kw_only=True)
class StageParams:
    """Which params of a model belong to which stage."""

    encode: tuple[str, ...]
    draw: tuple[str, ...] = ()
    num_samples: str = ""  # the one of `draw` that is the number of samples; empty: the model draws none


class Forecaster(Protocol):
    """A loaded model. Stage by stage: encode runs the network, draw only samples from what it left."""

    model: str
    params: StageParams
    fingerprint: str  # of the weights, the network's configuration and the dtype
    forwards: int  # calls of the network so far
    free_draw_horizon: int  # up to it, a draw with other seeds runs no network

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> Encoded:
        """Compute everything about these contexts that does not depend on how we sample.

        contexts: one a window, W of them; their lengths may differ.
        params: those of `params.encode`. horizon: steps ahead that will be drawn.
        Raises ForecastError where a context is too short or holds a number that is not finite, where a param or the
        horizon is out of range, and where not even one window fits the device's memory.
        """
        ...

    def draw(self, encoded: Encoded, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Draw samples of the close, float64 [W, S, H], in price.

        params: those of `params.draw`. seeds: one a window, each below 2**64. Equal seeds and params give equal
        samples; a smaller number of samples gives a prefix of a larger one.
        Raises ForecastError where the number of seeds is not that of the windows, where a param is out of range,
        where a sample is not finite, and where not even one path fits the device's memory.
        """
        ...


@runtime_checkable
class KeyedForecaster(Forecaster, Protocol):
    """A forecaster of every price of a bar (`KEYS`). Of the close it answers what a `Forecaster` does, bit for bit."""

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        """Whether one encoding with these params answers all keys; else each key needs an encoding of its own."""
        ...

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE) -> Encoded:
        """As `Forecaster.encode`, to be drawn for this key, or for all where they are answered together."""
        ...

    def draw_keys(
        self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> np.ndarray:
        """Draw samples of keys that this encoding answers, float64 [K, W, S, H], in price; else as `Forecaster.draw`.

        What a key answers depends on no other key that is asked for.
        """
        ...


@runtime_checkable
class StackingForecaster(Protocol):
    """A forecaster that can encode the keys of a bar, each for itself, as rows of one forward."""

    def encode_stacked(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> dict[str, Encoded]:
        """As `KeyedForecaster.encode`, of every key. The last bits may differ, as forwards of other sizes do."""
        ...


def seed_of_key(seed: int, key: str) -> int:
    """A number below 2**66 that keys a key's own draws; of the close it is the seed of the window."""
    return seed + ((KEYS.index(key) + 1) % len(KEYS) << 64)


class ExactForecaster(Forecaster, Protocol):
    """A forecaster that also answers without samples."""

    def exact(self, encoded: Encoded, params: Mapping[str, Any], seeds: Sequence[int]) -> Expectation | StudentMixture:
        """Answer with the distribution that samples are drawn from, or with the limit of their mean.

        params: as for `draw`; the number of samples is not looked at. seeds: as for `draw`, for what is too wide
        to sum over. objectives/exact.py makes points of it. Raises ForecastError where there is no such answer:
        beyond Toto's first patch, beyond Kronos' first step.
        """
        ...


class ExactKeyedForecaster(KeyedForecaster, Protocol):
    """A forecaster that also answers every price of a bar without samples."""

    def exact_keys(
        self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> Sequence[Expectation | StudentMixture]:
        """The exact answer of each of these keys, which the encoding answers; as `ExactForecaster.exact`."""
        ...


@runtime_checkable
class QuantileForecaster(Protocol):
    """A forecaster without samples, whose answer nothing random is in: equal encodings have equal answers."""

    model: str
    params: StageParams
    fingerprint: str
    forwards: int

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        """As `KeyedForecaster.answers_together`."""
        ...

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE) -> Encoded:
        """As `KeyedForecaster.encode`."""
        ...

    def quantiles(self, encoded: Any, params: Mapping[str, Any]) -> Quantiles:
        """The quantiles of the close. params: those of `params.draw`."""
        ...

    def quantiles_keys(self, encoded: Any, params: Mapping[str, Any], keys: Sequence[str]) -> Sequence[Quantiles]:
        """The quantiles of each of these keys, which the encoding answers."""
        ...


@dataclass(eq=False)
class GraphCounts:
    """What compiling has cost a forecaster so far."""

    count: int = 0  # graphs, one a shape
    recompilations: int = 0  # of shapes that had been compiled; 0 unless something is wrong
    warmup_s: float = 0.0  # in first calls of a shape, waiting for others included


class LoadedForecaster(Forecaster, Protocol):
    """A forecaster as `load` returns it; `Model.exact_horizon` says whether it is an ExactForecaster too."""

    @property
    def compilation(self) -> str:
        """How the network runs: "off", a mode of torch.compile, or "MODE failed: why", which runs as "off" does."""
        ...

    @property
    def graphs(self) -> GraphCounts: ...


@runtime_checkable
class SharingForecaster(Forecaster, Protocol):
    """A causal forecaster: a forward over a series answers contexts that end earlier in it as well.

    The contexts of a series that begin at its first bar make groups. What a group's forward says of a context depends
    on the bars up to there and on how long the series is, and not on which contexts are asked for.
    """

    def groups_of(
        self, bars: Bars, lengths: Sequence[int], params: Mapping[str, Any], horizon: int
    ) -> list[int] | None:
        """The group of each of these lengths; None where contexts are encoded each for itself. bars: the series."""
        ...

    def reach(self, group: int, series_length: int) -> tuple[int, ...]:
        """The contexts, bars, that a group's forward runs over: they decide its shape."""
        ...

    def encode_group(self, bars: Bars, group: int, params: Mapping[str, Any], horizon: int, key: str) -> Encoded:
        """As `KeyedForecaster.encode`, of all contexts of a group. bars: the whole series."""
        ...

    def gathered(self, groups: Mapping[int, Any], lengths: Sequence[int], series_length: int) -> Encoded:
        """The encoding of the contexts of these lengths, from the groups that have them."""
        ...


@runtime_checkable
class KeepableForecaster(KeyedForecaster, Protocol):
    """A forecaster of whose encodings that is kept between runs which later stages need: bytes, window by window."""

    @property
    def surroundings(self) -> str:
        """Everything but weights, params and contexts that decides the bits of an encoding: code, machine, threads."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether anything is kept as it runs here."""
        ...

    @property
    def one_by_one(self) -> bool:
        """Whether `company` is always "" as it runs here."""
        ...

    @property
    def drawn_by(self) -> str:
        """Everything that decides the bits of a draw beside encoding, params and seed: code, as `surroundings`."""
        ...

    def company(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> str | None:
        """What decides a window's bits beside itself: the shape of the forward that it shares, "" where it is alone.

        None: these are not kept.
        """
        ...

    def read(self, bars: Bars, params: Mapping[str, Any]) -> Bars:
        """The part of a context that encoding looks at."""
        ...

    def known(self, encoded: Any) -> Sequence[int]:
        """For each window how much there is to keep; more once a draw has asked the network for more."""
        ...

    def records(self, encoded: Any, places: Sequence[int]) -> list[bytes]:
        """What is kept of the windows at these places."""
        ...

    def restored(
        self,
        records: Sequence[bytes | None],
        contexts: Sequence[Bars],
        params: Mapping[str, Any],
        horizon: int,
        key: str,
    ) -> Any | None:
        """What `encode` answers, of whose windows these are known; None where all have to be encoded."""
        ...


def load(model: str, *, device: str = "cpu", running: Running = BY_DEFAULT, **options: Any) -> LoadedForecaster:
    """Load a model onto a device ("cpu", "cuda:0").

    options: what the model's loader takes (`Model.loading_options`): toto its checkpoint (a bundled name, a local
    folder or a hub id, see checkpoints.py) and revision; kronos also its tokenizer, tokenizer_revision and
    network_context; naive nothing.
    Raises CheckpointError and SettingError.
    """
    return _module(model).load(device=device, running=running, **options)


def inspect(model: str, *, running: Running = BY_DEFAULT, **options: Any) -> str:
    """The fingerprint that `load` would give its forecaster, without loading the weights.

    options: as for `load`. Raises CheckpointError where the checkpoint does not fit the network.
    """
    return _module(model).inspect(running=running, **options)


def count_flop(work: Callable[[], object]) -> int:
    """Do this work and count the operations of its networks; 0, and nothing done, where no network was loaded."""
    if "torch" not in sys.modules:
        return 0
    return importlib.import_module("forecasters.work").count_flop(work)


def measure_matrix_product(device: str, dtype: str = "float32") -> float | None:
    """Operations a second of a large matrix product on "cpu" or "cuda:0"; None where no network was loaded."""
    if "torch" not in sys.modules:
        return None
    return importlib.import_module("forecasters.work").measure_matrix_product(device, dtype)


def _module(model: str) -> Any:
    from forecasters.models import MODELS  # late: the descriptors import this module

    return importlib.import_module(MODELS[model].module)
