"""How much each searched knob matters in a study, as far as its trials tell."""

from __future__ import annotations

import warnings

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from storage.retrying import RetryingStorage

NEEDED = 20  # complete trials; the best of fewer are too few to tell one knob from another
BEST = 5  # trials, at least, that count as the best: what Optuna recommends for PED-ANOVA


def importances(storage: RetryingStorage, name: str) -> tuple[dict[str, float] | None, str | None]:
    """How far each knob sets the best tenth of a study's complete trials apart: shares that add up to 1, largest first.

    By PED-ANOVA (Watanabe et al., IJCAI 2023) as Optuna computes it, conditional knobs among them. None, and why, where
    too few trials are complete.
    """
    study = optuna.load_study(study_name=name, storage=storage)
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if complete < NEEDED:
        return None, f"{complete} complete trials; {NEEDED} are needed to tell"
    with warnings.catch_warnings():
        # That it is experimental, and that a conditional knob which few trials had may get too little.
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, BEST / complete))
        return get_param_importances(study, evaluator=evaluator), None
