"""How a setting is declared: a dataclass field, typed as in TOML, with the rule that its value must keep.

Knows nothing of files, tables or models; studies/config.py reads and checks, each model's descriptor declares its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, field
from typing import Any

Rule = Callable[[Any], str | None]  # what is wrong with a value, or None

CHECKPOINT = "checkpoint"  # an option of the model's loader that may be a local folder
LOADING = "loading"  # another option of the model's loader; empty text: none
AGGREGATES = "aggregates"  # names of aggregates, which whoever knows them checks
PATTERNS = "patterns"  # text, or patterns of symbols by the name of a group


def setting(rule: Rule | None = None, *, kind: str = "", one_or_list: bool = False) -> Any:
    """Declare a setting.

    rule: says what is wrong with a value of the right type. kind: CHECKPOINT, LOADING, AGGREGATES, PATTERNS or nothing.
    one_or_list: a list of one may be written as its only value.
    """
    return field(metadata={"rule": rule, "kind": kind, "one_or_list": one_or_list})


def kind_of(declared: Field[Any]) -> str:
    return declared.metadata.get("kind", "")


def at_least(minimum: float) -> Rule:
    return lambda value: None if value >= minimum else f"must be at least {minimum}"


def choices(*names: str) -> Rule:
    """Different ones of these names, at least one."""

    def check(values: tuple[str, ...]) -> str | None:
        good = values and len(set(values)) == len(values) and set(values) <= set(names)
        return None if good else f"must be different ones of {', '.join(names)}"

    return check


def one_of(*names: str) -> Rule:
    return lambda value: None if value in names else f"must be one of {', '.join(names)}"


def interval(lowest: float, highest: float) -> Rule:
    """[low, high] within these bounds."""

    def check(values: tuple[float, ...]) -> str | None:
        good = len(values) == 2 and lowest <= values[0] < values[1] <= highest
        return None if good else f"must be [lowest, highest] between {lowest} and {highest}"

    return check


def counts(values: tuple[int, ...]) -> str | None:
    if not values or min(values) < 1 or len(set(values)) != len(values):
        return "must be different whole numbers of at least 1"
    return None
