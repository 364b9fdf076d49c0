"""How much each searched knob matters in a study: of its confirmed grid where there is one, else of its trials."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from forecasters.models import MODELS
from storage.progress import read_confirmations
from storage.retrying import RetryingStorage
from studies.candidates import shared_knobs
from studies.evidence import StudyEvidence, from_json
from studies.space import Space
from studies.study import DEFINITION

NEEDED = 20  # complete trials; the best of fewer are too few to tell one knob from another
BEST = 5  # trials, at least, that count as the best: what Optuna recommends for PED-ANOVA


def importances(storage: RetryingStorage, name: str) -> tuple[dict[str, float] | None, str | None]:
    """How much each knob matters, largest first, as shares of 1; None, and why, where there is too little to tell.

    Where a grid was confirmed, as `of_grid` says. Elsewhere how far each knob sets the best tenth of the complete
    trials apart, shares that add up to 1: by PED-ANOVA (Watanabe et al., IJCAI 2023) as Optuna computes it, conditional
    knobs among them.
    """
    study = optuna.load_study(study_name=name, storage=storage)
    definition = study.user_attrs.get(DEFINITION, {})
    confirmation = read_confirmations(storage, [study._study_id]).get(study._study_id)
    if "space" in definition and confirmation and confirmation.result:
        model = definition["model"]
        found = of_grid(Space.from_json(model, definition["space"]), from_json(model, confirmation.result))
        if found is not None:
            return found, None
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if complete < NEEDED:
        return None, f"{complete} complete trials; {NEEDED} are needed to tell"
    with warnings.catch_warnings():
        # That it is experimental, and that a conditional knob which few trials had may get too little.
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, BEST / complete))
        return get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[0]), None


def of_grid(space: Space, evidence: StudyEvidence) -> dict[str, float] | None:
    """The share of the variance of the log MAE over a confirmed grid that each knob explains alone, largest first.

    Main effects: exact where every combination was measured; what is left of 1 is of interactions. The number of
    samples, which only adds noise, has none; knobs that do not vary in the grid are left out. None without a grid.
    """
    count = MODELS[space.model].params.num_samples
    most = max(space.knobs.get(count, (None,)))  # type: ignore[type-var]
    free = shared_knobs(space)
    rows: dict[Any, list[tuple[Mapping[str, Any], float]]] = defaultdict(list)  # by the setting of the other knobs
    for one in evidence.candidates:
        if space.contains(one.params) and one.params.get(count) == most and (mae := one.mae("confirmation")):
            setting = frozenset((name, value) for name, value in one.params.items() if name not in free)
            rows[setting].append((one.params, math.log(mae)))
    whole = math.prod(len(space.knobs[name]) for name in free)  # type: ignore[arg-type]
    cells = [cell for row in rows.values() if len(row) == whole for cell in row]
    varied = [name for name in space.knobs if len({params.get(name) for params, _ in cells}) > 1]
    if not free or not varied:
        return None
    values = np.array([value for _, value in cells])
    total = float(values.var())
    found = dict.fromkeys(varied, 0.0)
    for name in varied if total else ():
        chosen = [params[name] for params, _ in cells]
        means = {value: values[[each == value for each in chosen]].mean() for value in set(chosen)}
        found[name] = float(np.var([means[value] for value in chosen])) / total
    found |= {count: 0.0} if count in space.knobs else {}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
