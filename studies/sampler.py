"""What to try next, and what to stop early: the sampler and pruner of every study.

Knows Optuna only. Equal params give equal numbers here (common random numbers), which both rely on.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

DRAWS = 30  # of random cells, before all untried ones are listed: a space may have millions
FRESH_S = 1.0  # how old the trials may be that a rung is compared with
STARTUP_TRIALS = 10  # before TPE and the pruner have something to compare with


Cell = tuple[Any, ...]  # a configuration of a space that has choices only


class DistinctTPESampler(TPESampler):
    """TPE that proposes no configuration twice while there are untried ones: its number is known already.

    Measured on a space of 240 cells: plain TPE spends 25 to 30 of 100 trials on repeats.
    """

    _choices: Mapping[str, Sequence[Any]] = {}  # by name, of the trial at hand
    _tried: Collection[Cell] = ()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._choices = {n: d.choices for n, d in search_space.items() if isinstance(d, CategoricalDistribution)}
        if len(self._choices) < len(search_space):  # a number hardly comes twice
            self._tried = ()
            return super().sample_relative(study, trial, search_space)
        self._tried = _tried(study, self._choices)
        params = super().sample_relative(study, trial, search_space)
        # None: the first trials, which are random.
        if not params or tuple([params[name] for name in self._choices]) not in self._tried:
            return params
        return _untried(self._choices, self._tried) or params

    def _compute_acquisition_func(self, samples: dict[str, np.ndarray], mpe_below: Any, mpe_above: Any) -> np.ndarray:
        """Of the candidates that TPE draws and ranks, the tried ones come last."""
        values = super()._compute_acquisition_func(samples, mpe_below, mpe_above)
        if self._tried and samples.keys() == self._choices.keys():
            names = self._choices
            cells = zip(*([names[n][int(i)] for i in samples[n]] for n in names), strict=True)
            values[[cell in self._tried for cell in cells]] = -np.inf
        return values


def _tried(study: optuna.Study, names: Collection[str]) -> set[Cell]:
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    # As read when this trial's sampling began.
    trials = study._get_trials(deepcopy=False, states=states, use_cache=True)
    wanted = set(names)
    return {tuple([trial.params[name] for name in names]) for trial in trials if wanted <= trial.params.keys()}


def _untried(choices: Mapping[str, Sequence[Any]], tried: Collection[Cell]) -> dict[str, Any] | None:
    """A random cell that nobody tried; None where there is none."""
    if len(tried) >= math.prod(map(len, choices.values())):
        return None
    for _ in range(DRAWS):
        cell = tuple(map(random.choice, choices.values()))
        if cell not in tried:
            break
    else:
        cell = random.choice([cell for cell in itertools.product(*choices.values()) if cell not in tried])
    return dict(zip(choices, cell, strict=True))


class RungPruner(PercentilePruner):
    """PercentilePruner that reads the other trials once a trial, and again when what it read is FRESH_S old.

    Reading them at each of ten rungs was 42 % of what a trial cost.
    """

    _trial_id: int | None = None
    _read_at = 0.0
    _complete: Sequence[FrozenTrial] = ()

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        now = time.monotonic()
        if trial._trial_id != self._trial_id or now - self._read_at > FRESH_S:
            self._complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            self._trial_id, self._read_at = trial._trial_id, now
        return super().prune(cast(Any, _AsRead(direction=study.direction, complete=self._complete)), trial)


@dataclass(frozen=True, kw_only=True)
class _AsRead:
    """As much of a study as PercentilePruner looks at."""

    direction: StudyDirection
    complete: Sequence[FrozenTrial]

    def get_trials(self, *, deepcopy: bool, states: Sequence[TrialState]) -> Sequence[FrozenTrial]:
        assert (deepcopy, states) == (False, (TrialState.COMPLETE,))
        return self.complete


def make_sampler(*, conditional: bool, seed: int | None = None) -> optuna.samplers.BaseSampler:
    """Unseeded unless a benchmark asks: two workers with one seed would propose the same trials (measured).

    conditional: some knob is not in every trial.
    """
    return DistinctTPESampler(
        multivariate=True, constant_liar=True, group=conditional, n_startup_trials=STARTUP_TRIALS, seed=seed
    )


def make_pruner(prune_worst: float) -> optuna.pruners.BasePruner:
    """Stops this share, the worst, at each rung; 0: none."""
    if prune_worst == 0:
        return optuna.pruners.NopPruner()
    return RungPruner(100 * (1 - prune_worst), n_startup_trials=STARTUP_TRIALS)
