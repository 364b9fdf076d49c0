"""`studies verify-compile`: what it measures, what it refuses, and what it says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from forecasters import Bars
from launch import verify
from launch.cli import studies
from launch.views.tables import terminal
from objectives.evaluation import Evaluator
from objectives.windows import split
from studies import config as configuration
from studies import space as spaces
from studies.space import random_params


def bars(count: int = 300) -> Bars:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, count)))
    days = np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    return Bars(timestamps=days, open=close, high=close, low=close, close=close, volume=None)


@pytest.fixture
def job(tmp_path: Path, no_graphs: None) -> verify.VerifyJob:
    compiling = {"backend": "eager", "dir": tmp_path / "compiled"}
    config = configuration.load(
        overrides={"toto": {"checkpoint": "toto-tiny"}, "compile": compiling, "search": {"batch": 8}}
    )
    return verify.VerifyJob(
        config=config,
        model="toto",
        device="cpu",
        windows=split(bars(), symbol="X", horizon=1, validation=10, test=1).validation,
        trials=[{"context_length": 256, "num_samples": n, "aggregate": "median"} for n in (16, 40)],
        repeats=2,
    )


def test_a_mode_stands_beside_eager(job: verify.VerifyJob):
    eager, compiled = verify.compare(job, ["default"], run=verify.measure)
    assert (eager.mode, eager.graphs, eager.speedup, eager.passed) == ("off", 0, 1.0, True)
    assert (compiled.mode, compiled.compilation, compiled.graphs) == ("default", "default", 1)
    assert compiled.warmup_s > 0
    assert compiled.difference < 1e-5
    assert compiled.moved == compiled.recompilations == compiled.breaks == 0
    assert abs(compiled.mae_change) < 1e-4
    assert compiled.passed
    assert list(verify.table([compiled]).columns[2].cells) == ["default"]


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"recompilations": 1}, {"recompilations": 1}),
        ({"breaks": 2}, {"breaks": 2}),
        ({"skips": 1}, {"skips": 1}),
        ({"compilation": "default failed: no compiler"}, {"compilation": "default failed: no compiler"}),
        ({"points": 1.001}, {}),
        ({"samples": 1.001}, {"moved": 1.0, "passed": True}),
    ],
)
def test_what_is_not_the_same_does_not_pass(job: verify.VerifyJob, change: dict[str, Any], seen: dict[str, Any]):
    def run(job: verify.VerifyJob, mode: str) -> verify.ModeMeasurement:
        measured = verify.measure(job, mode)
        if mode == "off":
            return measured
        factor = next((value for name, value in change.items() if name in ("points", "samples")), None)
        if "points" in change:
            return replace(measured, points=[factor * points for points in measured.points])
        return replace(measured, **({"samples": factor * measured.samples} if factor else change))

    rows = verify.compare(job, ["default"], run=run)
    assert {"passed": False} | seen == {name: getattr(rows[1], name) for name in ({"passed": False} | seen)}


def test_a_dtype_stands_beside_float32(job: verify.VerifyJob):
    rows = verify.compare(job, [], ["bfloat16", "int8"], run=verify.measure)
    assert [(row.dtype, row.mode) for row in rows] == [("float32", "off"), ("bfloat16", "off"), ("int8", "off")]
    exact, half, whole = rows
    assert exact.difference == exact.rms == exact.mae_low == exact.mae_high == 0
    assert exact.passed
    assert all(0 < row.rms < row.difference and row.mae_low < row.mae_change < row.mae_high for row in rows[1:])
    assert half.weight_mib == pytest.approx(exact.weight_mib / 2)
    assert half.weight_mib < whole.weight_mib < exact.weight_mib  # int8 is of the transformer only
    assert all(row.products > 0 for row in rows)
    assert verify.table(rows).columns[3].cells == ["float32", "bfloat16", "int8"]


@pytest.mark.parametrize(("factors", "passed"), [((1, 1), True), ((1.0002, 1.0002), True), ((1.02, 0.98), False)])
def test_a_dtype_passes_where_its_whole_interval_does(
    job: verify.VerifyJob, factors: tuple[float, float], passed: bool
):
    """In the last case the errors of every other window rise by 2 % and those of the rest fall by as much."""
    eager = verify.measure(job, "off")
    actuals = job.windows.actuals

    def run(job: verify.VerifyJob, mode: str) -> verify.ModeMeasurement:
        if job.dtype == "float32":
            return eager
        factor = np.resize(factors, len(actuals))[:, None]
        return replace(
            eager, dtype=job.dtype, points=[actuals + factor * (points - actuals) for points in eager.points]
        )

    row = verify.compare(job, [], ["int8"], run=run)[1]
    assert row.passed == passed
    assert abs(row.mae_change) < 3e-3
    assert row.mae_low <= row.mae_change <= row.mae_high


def test_what_a_cpu_makes_of_a_dtype_is_said(job: verify.VerifyJob):
    eager = verify.compare(job, [], run=verify.measure)[0]
    rows = [
        replace(eager, dtype=dtype, products=rate, instructions=has)
        for dtype, rate, has in (("float32", 1e11, None), ("bfloat16", 4e11, ("amx_bf16",)), ("int8", 2e10, ()))
    ]
    assert list(verify.rates(rows)) == [
        "a matrix product in bfloat16 has 4.0 times the rate of one in float32, with amx_bf16",
        "a matrix product in int8 has 0.2 times the rate of one in float32: "
        "this CPU has no instructions for it (AMX, AVX-512)",
    ]
    assert list(verify.rates(rows[1:])) == []


def test_the_largest_difference_is_that_of_any_trial(job: verify.VerifyJob):
    def run(job: verify.VerifyJob, mode: str) -> verify.ModeMeasurement:
        measured = verify.measure(job, "off")
        first, second = measured.points
        return measured if mode == "off" else replace(measured, points=[first, second + 1])

    deviations = [context.close[-128:].std() for context in job.windows.contexts(range(len(job.windows)))]
    assert verify.compare(job, ["default"], run=run)[1].difference == pytest.approx(1 / min(deviations))


def test_a_narrow_table_says_what_a_row_fails_by(job: verify.VerifyJob):
    eager = verify.compare(job, [], run=verify.measure)[0]
    why = "default failed: InductorError: there is no compiler of C++ on this machine, neither g++ nor clang"
    rows = [eager, replace(eager, mode="default", compilation=why, breaks=3, passed=False)]
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(terminal(verify.table(rows), 80))
    shown = captured.get().splitlines()
    assert max(map(len, shown)) <= 80
    heads = shown[: next(n for n, line in enumerate(shown) if line.startswith("toto"))]  # headings of several lines
    assert {"model", "mode", "graph", "breaks", "compilation"} <= set(" ".join(heads).split())
    assert {"recompilations", "skipped"}.isdisjoint(" ".join(heads).split())  # of which there are none
    lines, head = shown[len(heads) :], heads[-1]
    reason = " ".join(line[head.index("compilation") :].strip() for line in lines[1:])
    assert reason == why  # to its end, in lines


def test_a_graph_that_the_trials_did_not_warm_up_counts_as_made_again(job: verify.VerifyJob):
    real, calls = Evaluator.samples, []

    def grown(evaluator: Evaluator, windows: Any, params: Any) -> np.ndarray:
        calls.append(params)
        # From the second repetition on with a context that no warm-up saw.
        return real(evaluator, windows, params | {"context_length": 256 if len(calls) < 4 else 64})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "samples", grown)
        measured = verify.measure(job, "default")
    assert measured.recompilations == 1


def test_random_trials_are_of_the_space():
    space = spaces.make("kronos", configuration.load())
    trials = random_params(space, 50)
    assert trials == random_params(space, 50)
    assert all(space.contains(trial) for trial in trials)
    assert {trial["top_k"] > 0 for trial in trials} == {True, False}


@pytest.mark.slow
def test_the_command_runs_each_mode_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table, folder = bars(), tmp_path / "bars"
    folder.mkdir()
    columns = {name: getattr(table, name) for name in ("open", "high", "low", "close")}
    pd.DataFrame({"timestamp": table.timestamps, **columns}).to_csv(folder / "AAA.csv", index=False)
    (tmp_path / "x.toml").write_text(
        '[toto]\ncheckpoint = "toto-tiny"\ncontext_length = 128\n[compile]\ndir = "kernels"\n'
    )
    monkeypatch.setenv("TOTO_COMPILE_BACKEND", "eager")
    monkeypatch.setenv("TOTO_COMPILE_MODE", "max-autotune")  # what is asked for goes before it
    arguments = ["verify-compile", "--config", str(tmp_path / "x.toml"), "--data-dir", str(folder), "--models", "toto"]
    options = ["--modes", "default", "--repeats", "2", "--trials", "2", "--json"]
    result = CliRunner().invoke(studies, [*arguments, *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["symbol"], row["compilation"]) for row in rows] == [("AAA", "off"), ("AAA", "default")]
    assert (tmp_path / "kernels").is_dir()
    options = ["--dtypes", "float32,bfloat16", "--repeats", "2", "--trials", "1", "--json"]
    result = CliRunner().invoke(studies, [*arguments, *options])
    rows = json.loads(result.stdout)
    assert [(row["dtype"], row["mode"], row["compilation"]) for row in rows] == [
        ("float32", "off", "off"),
        ("bfloat16", "off", "off"),
    ]
    assert rows[0]["windows"] > 30  # those of a confirmation
    assert result.exit_code == (0 if all(row["passed"] for row in rows) else 1)
    assert "a matrix product in bfloat16 has" in result.stderr
    for option, known in (
        ("--modes", "default, reduce-overhead, max-autotune"),
        ("--dtypes", "float32, bfloat16, int8"),
    ):
        usage = CliRunner().invoke(studies, [*arguments, option, "fast"])
        assert usage.exit_code == 2
        assert f"the {option[2:]} are {known}" in usage.stderr
