"""Finished studies whose evidence is given, in a folder with settings, for tests of promotion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import places
from click.testing import Result
from evidence_builder import evidence, measured_configuration

from launch import cli
from storage import slots, study_rows
from studies import config as configuration
from studies import space
from studies.evidence import Came, MeasuredConfiguration, Part, to_json

AS_OF = "2026-03-19"
COUNTS: Mapping[Part, int] = {"validation": 30, "confirmation": 250, "test": 20}
OLD = {"context_length": 4096, "aggregate": "mean", "num_samples": 64}
NEW = {"context_length": 4096, "aggregate": "median", "num_samples": 128}
KRONOS = {"temperature": 0.15, "top_p": 1.0, "top_k": 16, "sample_count": 208, "max_context": 224, "clip": 1.8}


def measured(
    mae: float,
    *,
    test: float | None = None,
    wobble: float = 0.0,
    search: float | None = None,
    confirmation: int = 250,
    seed: int = 5,
) -> MeasuredConfiguration:
    """A configuration with these errors; wobble: how they differ window by window from those of others."""
    return measured_configuration(
        mae,
        validation=search,
        test=test,
        counts={**COUNTS, "confirmation": confirmation},
        seed=seed,
        wobble=wobble,
        no_change_mae=0.01,
    )


class PromotionPlace(places.Place):
    """For promotion over studies whose evidence is given."""

    SETTINGS = places.FOLDERS + '[toto]\ncheckpoint = "toto-tiny"\n[kronos]\ncheckpoint = "kronos-tiny"\n'

    def study(
        self,
        candidates: Sequence[tuple[Mapping[str, Any], MeasuredConfiguration]],
        *,
        symbol: str = "BTCUSD",
        model: str = "toto",
        baselines: Mapping[str, tuple[Mapping[str, Any], MeasuredConfiguration]] | None = None,
        as_of: str = AS_OF,
        bars: str = "bars",
        confirmation: int = 250,
        came: Mapping[Part, Came] | None = None,
    ) -> int:
        """A finished and confirmed study."""
        config = configuration.load(self.folder / "studies.toml")
        definition = {
            "symbol": symbol, "model": model, "as_of": as_of, "metric": "pct_return_mae", "objective": "sampled",
            "bars": bars, "windows": {"horizon": 1, "validation": 30, "test": 20, "min_context": 128, "rung": 10},
            "space": space.make(model, config).to_json(), "checkpoint": "c", "no_change_mae": 0.01,
        }  # fmt: skip
        result = evidence(
            *(replace(one, params=params, trial=number) for number, (params, one) in enumerate(candidates)),
            in_use={label: replace(one, params=params) for label, (params, one) in (baselines or {}).items()},
            counts={**COUNTS, "confirmation": confirmation},
            no_change_mae=0.01,
            last=as_of,
            came=came or {},
        )

        def fill(connection: Any, study_id: int) -> None:
            slots.add(connection, study_id, slots.CONFIRMATION, 0, label="confirmation", params={})

        name = f"{symbol}/{model}@{as_of}"
        study_id = study_rows.create_study(self.storage, name, {"definition": definition}, "pct_return_mae", fill)
        slot = slots.claim(self.storage, study_id, worker="w:1", lease_s=60)
        assert slot is not None
        assert slots.finish(self.storage, slot, result=to_json(result))
        return study_id

    def put(self, config: Mapping[str, Any], *, symbol: str = "BTCUSD", **more: Any) -> Path:
        return self.put_promoted(symbol, config, **more)

    def promote(self, *words: str) -> Result:
        return self.invoke(cli.promote, *words)

    def row(self, *words: str) -> dict[str, Any]:
        (row,) = json.loads(self.promote("--json", *words).stdout)
        return row

    def rows(self, *words: str) -> list[dict[str, Any]]:
        return json.loads(self.promote("--json", *words).stdout)

    def promoted(self, folder: str = "best", symbol: str = "BTCUSD") -> dict[str, Any]:
        return json.loads(self.promoted_file(symbol, folder).read_text())

    def summaries(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "results").glob("*.json"))]
