"""The rule of what a symbol is: every place that takes one agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest

from launch.options import checked_symbols
from storage import configs, history
from storage.symbols import SymbolError, check_symbol, is_symbol

PLACES: dict[str, Callable[[Path, str], object]] = {
    "check_symbol": lambda root, text: check_symbol(text),
    "configs.read": lambda root, text: configs.read(root, "best", text),
    "history.write": lambda root, text: history.write(
        root, text, {"symbol": text, "model": "toto", "config": {}, "validation": {}}, ["best"]
    ),
    "command line": lambda root, text: checked_symbols([[text]]),
}
GOOD = ["A", "NVDA", "BRK.B", "BRK-B", "7203.T", "A-.B"]
BAD = ["", "nvda", "../NVDA", "../x", "A..B", "A/B", ".A", "-A", "A\n", "A B", "Ä", "A\0"]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_takes_and_refuses_the_same(tmp_path: Path, place: str) -> None:
    for text in GOOD:
        assert is_symbol(text)
        PLACES[place](tmp_path, text)
    before = sorted(tmp_path.rglob("*"))
    for text in BAD:
        assert not is_symbol(text)
        with pytest.raises((SymbolError, click.UsageError)):
            PLACES[place](tmp_path, text)
    assert sorted(tmp_path.rglob("*")) == before


def test_rollback_refuses_what_is_no_symbol(tmp_path: Path) -> None:
    for text in BAD:
        with pytest.raises(SymbolError):
            history.rollback(tmp_path, text)
