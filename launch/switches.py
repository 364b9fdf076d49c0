"""Environment variables of the scripts that this package replaces, where no option says otherwise.

Each that is honoured is said once. docs/coming-from-the-scripts.md lists them all, with those that are not, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.output import say
from studies.config import MAX_TRIALS, ConfigError

FAST_WINDOWS = 35  # what MARKETSIM_FAST_SIMULATE means by few
_TRUE = ("1", "true", "yes", "on")


def number(environment: Mapping[str, str], name: str, *, most: int = MAX_TRIALS) -> int | None:
    """A variable that is a whole number above 0; None where it is not set. Raises ConfigError."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ConfigError(f"{name}={text} in the environment: expected a whole number from 1 to {most}; unset it")
    return int(text)


def of_search(
    environment: Mapping[str, str],
    *,
    trials: int | None,
    cpus: int | None,
    models: Sequence[Sequence[str]],
    devices_given: bool,
) -> tuple[int | None, int | None, Sequence[Sequence[str]]]:
    """The options of launch-workers, with TRIALS, WORKERS and MODEL where they were not given. Raises ConfigError.

    devices_given: --gpus or --ray was, beside which WORKERS says nothing.
    """
    said = []
    if trials is None and (trials := number(environment, "TRIALS")) is not None:
        said.append(f"TRIALS: --trials {trials}")
    if cpus is None and not devices_given and (cpus := number(environment, "WORKERS")) is not None:
        said.append(f"WORKERS: --cpus {cpus}")
    if not models and (named := environment.get("MODEL", "").strip()):
        models = [tuple(part.strip() for part in named.split(","))]
        said.append(f"MODEL: --models {named}")
    if said:
        say(f"from the environment, {'; '.join(said)}")
    return trials, cpus, models


def of_comparison(
    environment: Mapping[str, str], *, horizon: int | None, windows: int, default: int
) -> tuple[int, int]:
    """Horizon and windows, with MARKETSIM_MAX_HORIZON and _FAST_SIMULATE. default: the horizon where nothing says it.

    None of them removes the evaluation, as they once did. Raises ConfigError.
    """
    if horizon is None and (horizon := number(environment, "MARKETSIM_MAX_HORIZON")) is not None:
        say(f"from the environment, MARKETSIM_MAX_HORIZON: --horizon {horizon}")
    fast = environment.get("MARKETSIM_FAST_SIMULATE", "").strip().lower() in _TRUE
    if fast and windows > FAST_WINDOWS:
        say(f"from the environment, MARKETSIM_FAST_SIMULATE: {FAST_WINDOWS} windows and not {windows}")
    return horizon or default, min(windows, FAST_WINDOWS) if fast else windows
