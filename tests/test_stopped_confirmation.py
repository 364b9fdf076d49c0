"""A confirmation that a signal ends: real workers, real signals, and a later run that goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from places import RunPlace as Place

from forecasters import naive
from storage import shares
from storage.progress import read_confirmations
from studies import config as configuration
from studies import evaluators
from studies import study as studying
from studies.evidence import from_json
from studies.series import read_series
from studies.study import Study

CALLS = 40
SEARCH = ("launch-workers", "--cpus", "1", "--trials", "4", "--symbols", "SP500")


def measured(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def stop_midway(place: Place, number: signal.Signals) -> tuple[Study, list[str]]:
    """A run whose confirmation, which no longer gets on, is stopped: its study, and what was measured."""
    place.settings.write_text(place.SETTINGS.replace("[naive]", "[naive]\nseason = 1"))
    log = place.get_stuck(CALLS)
    run = subprocess.Popen(place.command(*SEARCH), env=place.environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(measured(log)) < CALLS:
            assert time.monotonic() < deadline, "the confirmation does not get on"
            time.sleep(0.02)
        run.send_signal(number)
        assert run.wait(timeout=10) == 130
    finally:
        if run.poll() is None:
            run.kill()  # its workers end with it
            run.wait()
    (study,) = studying.list_studies(place.storage)
    kept = read_confirmations(place.storage, [study.study_id])[study.study_id]
    assert (kept.state, kept.result) == ("free", None)
    return study, measured(log)


def test_ctrl_c_ends_a_confirmation_within_ten_seconds(place: Place) -> None:
    study, _ = stop_midway(place, signal.SIGINT)
    assert shares.read(place.storage, study.study_id).results


@pytest.mark.slow
def test_a_stopped_confirmation_is_gone_on_with(place: Place) -> None:
    study, before = stop_midway(place, signal.SIGTERM)
    log = place.get_stuck(10**6)
    again = place.run(*SEARCH)
    assert "Traceback" not in again.stderr
    first, second = (path.read_text() for path in sorted((place.folder / "logs").glob("*/worker-0.log")))
    assert f"{study.name} confirmation: " in first
    assert " configurations on 90 windows: 90 x 1 = 90 encodings" in first
    assert " 13 of 13 of the confirmation" in second

    # The batch that was under way is measured again, and no other.
    counts = Counter([*before, *measured(log)])
    repeated = {json.dumps(json.loads(line)[1:]) for line, count in counts.items() if count > 1}
    assert len(repeated) <= 1
    assert 0 < len(measured(log)) < counts.total() - CALLS // 2
    # And the numbers are those of measuring each configuration in one go.
    config = configuration.load(place.settings)
    series = read_series(config, ["SP500"])[0][0]
    started = studying.start(place.storage, config, study, series, naive.Naive.fingerprint)
    forecaster = evaluators.load_forecaster(config, "naive", device="cpu")
    evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=1 << 24)
    result = read_confirmations(place.storage, [study.study_id])[study.study_id].result
    evidence = from_json("naive", result or {})
    for one in evidence.candidates[::2]:
        expected = evaluator.measure(started.confirmation, one.params, passes=range(1, 1 + evidence.passes))
        assert one.mae("confirmation") == expected.mae
    known = shares.read(place.storage, study.study_id)
    assert (known.plan, known.results) == (None, {})  # it is done
