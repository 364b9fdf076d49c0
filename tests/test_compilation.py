"""The compile policy, and that compiled forecasters answer as eager ones do, without a break or a recompilation."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import forecasters
from forecasters import Bars, ForecastError, Running, SettingError, compilation, kronos_fixed
from forecasters.compilation import Graphs, Policy, decide
from forecasters.kronos import Kronos
from forecasters.kronos_sampling import Sampling, inverse_cdf
from objectives.evaluation import Evaluator
from objectives.windows import Windows, split

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-5  # of a window's standard deviation
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "toto": {"checkpoint": "toto-tiny"},
    "kronos": {
        "checkpoint": str(GOLDENS / "kronos-a" / "model"),
        "tokenizer": str(GOLDENS / "kronos-a" / "tokenizer"),
        "network_context": 128,
    },
}
PARAMS: dict[str, dict[str, Any]] = {
    "toto": {"context_length": 320, "num_samples": 40},
    "kronos": {
        "max_context": 100, "clip": 2.0, "temperature": 0.7, "top_k": 12, "top_p": 0.9, "sample_count": 40,
    },
}  # fmt: skip
SCRUBBED = ("TORCHINDUCTOR_CACHE_DIR", "STUDIES_KERNELS")
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.fixture(autouse=True)
def _one_thread_and_no_graphs(monkeypatch: pytest.MonkeyPatch, no_graphs: None):
    for name in [name for name in os.environ if name.startswith(("TOTO_", "KRONOS_"))]:
        monkeypatch.delenv(name)
    for name in SCRUBBED:
        monkeypatch.setenv(name, "")  # so that what a test writes there is undone
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bars(count: int) -> Bars:
    rng = np.random.default_rng(1)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, count)))
    days = np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    volume = rng.lognormal(12, 0.5, count)
    return Bars(timestamps=days, open=close * 0.999, high=close * 1.01, low=close * 0.99, close=close, volume=volume)


def windows(horizon: int = 1, count: int = 400) -> Windows:
    return split(bars(count), symbol="X", horizon=horizon, validation=11, test=1).validation


def load(model: str, folder: Path, *, mode: str = "default", backend: str = "eager", dtype: str = "float32", chunk=8):
    running = Running(
        compile_mode=mode, compile_backend=backend, compile_dir=str(folder / "compiled"), dtype=dtype, chunk=chunk
    )
    return forecasters.load(model, **CHECKPOINTS[model], running=running)


def drawn(forecaster: Any, model: str, horizon: int, count: int = 11, max_context: int = 100) -> np.ndarray:
    """Samples for the first `count` windows, encoded eight at a time, as an evaluator does."""
    test, params, parts = windows(horizon), PARAMS[model] | {"max_context": max_context}, []
    for start in range(0, count, 8):
        rows = range(start, min(start + 8, count))
        encoded = forecaster.encode(test.contexts(rows), params, horizon)
        parts.append(forecaster.draw(encoded, params, [test.seeds(0)[row] for row in rows]))
    return np.concatenate(parts)


def deviations(count: int = 11) -> np.ndarray:
    return np.array([context.close[-100:].std() for context in windows().contexts(range(count))])[:, None]


# ---- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "device", "mode", "environ", "expected"),
    [
        ("toto", "cpu", "auto", {}, "off"),
        ("toto", "cuda:1", "auto", {}, "reduce-overhead"),
        ("toto", "cpu", "default", {}, "default"),
        ("toto", "cuda", "off", {}, "off"),
        ("toto", "cuda", "auto", {"TOTO_DISABLE_COMPILE": "1"}, "off"),
        ("toto", "cuda", "max-autotune", {"TOTO_COMPILE": "0"}, "off"),
        ("toto", "cuda", "auto", {"TOTO_DISABLE_COMPILE": "1", "TOTO_COMPILE": "1"}, "off"),
        ("toto", "cuda", "auto", {"TOTO_DISABLE_COMPILE": "0"}, "reduce-overhead"),
        ("toto", "cpu", "auto", {"TOTO_COMPILE": "true"}, "default"),
        ("toto", "cuda", "off", {"TOTO_COMPILE": "1"}, "reduce-overhead"),
        ("toto", "cuda", "max-autotune", {"TOTO_COMPILE": "1"}, "max-autotune"),
        ("toto", "cpu", "off", {"TOTO_COMPILE_MODE": "max-autotune"}, "max-autotune"),
        ("toto", "cuda", "off", {"KRONOS_COMPILE": "1"}, "off"),
        ("kronos", "cpu", "off", {"KRONOS_COMPILE": "1", "KRONOS_COMPILE_MODE": "reduce-overhead"}, "reduce-overhead"),
        ("kronos", "cpu", "auto", {"KRONOS_USE_TORCH_COMPILE": "1"}, "default"),
        ("kronos", "cpu", "auto", {"KRONOS_USE_TORCH_COMPILE": "1", "KRONOS_COMPILE": "0"}, "off"),
        ("kronos", "cuda", "auto", {"KRONOS_USE_TORCH_COMPILE": "0"}, "off"),
        ("toto", "cpu", "auto", {"TORCH_COMPILE_MODE": "max-autotune"}, "off"),
        ("toto", "cuda", "auto", {"TORCH_COMPILE_MODE": "max-autotune"}, "max-autotune"),
        (
            "toto",
            "cuda",
            "auto",
            {"TORCH_COMPILE_MODE": "a", "TOTO_COMPILE_MODE": "max-autotune"},
            "max-autotune",
        ),
    ],
)
def test_the_environment_goes_before_the_settings(model: str, device: str, mode: str, environ: dict, expected: str):
    assert decide(model, device=device, running=Running(compile_mode=mode), environ=environ).mode == expected


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        ({"compile_mode": "fast"}, {}, r"\[compile\] mode = fast: expected one of auto, off"),
        ({}, {"TOTO_COMPILE_MODE": "fast"}, "TOTO_COMPILE_MODE = fast"),
        ({"compile_mode": "default"}, {"TORCH_COMPILE_MODE": "fast"}, "TORCH_COMPILE_MODE = fast: expected one of"),
        ({}, {"TOTO_COMPILE": "maybe"}, "TOTO_COMPILE=maybe: expected 1 or 0"),
        (
            {"compile_mode": "default", "compile_backend": "cc"},
            {},
            r"\[compile\] backend = cc: torch has no such backend",
        ),
        ({"compile_mode": "default"}, {"TOTO_COMPILE_BACKEND": "cc"}, "TOTO_COMPILE_BACKEND = cc"),
    ],
)
def test_a_setting_that_is_none_is_named(settings: dict, environ: dict, message: str):
    with pytest.raises(SettingError, match=message):
        decide("toto", device="cpu", running=Running(**settings), environ=environ)


def test_the_environment_reaches_a_loaded_forecaster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert load("toto", tmp_path, mode="auto").compilation == "off"
    monkeypatch.setenv("TOTO_COMPILE", "1")
    monkeypatch.setenv("TOTO_COMPILE_BACKEND", "eager")
    forecaster = load("toto", tmp_path, mode="auto", backend="inductor")
    drawn(forecaster, "toto", 1, 1)
    assert (forecaster.compilation, forecaster.graphs.count) == ("default", 1)


def test_kernels_go_to_the_folder_unless_the_user_named_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.compiler.list_backends(None)  # imports what writes torch's own default
    for folder in (tmp_path / "a", tmp_path / "b"):
        load("toto", folder)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "compiled" / compilation.INDUCTOR)
    load("toto", tmp_path / "with space")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "b" / "compiled" / compilation.INDUCTOR)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    load("toto", tmp_path / "a")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "compiled").write_text("a file")
    with pytest.raises(SettingError, match=r"\[compile\] dir = .*compiled: .*name a folder"):
        load("toto", tmp_path)


# ---- compiled equals eager -------------------------------------------------------------------------------------------


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Samples [W, N, H] are the same but for one in 200: a number drawn at a token's very edge may fall beside it.

    In units of the context's deviation, or of the samples' own where that is more: Toto's, fed back, spread far.
    """
    error = np.abs(ours - theirs) / np.maximum(deviations(len(ours)), theirs.std(1))[:, None]
    assert (error.max(-1) < TOLERANCE).mean() > 0.995
    assert np.isfinite(ours).all()


@pytest.mark.parametrize(
    ("model", "horizon", "graphs"),
    [("toto", 1, 1), ("toto", 7, 1), ("toto", 70, 2), ("kronos", 1, 2), ("kronos", 7, 3)],
)
def test_compiled_equals_eager_without_a_break_or_a_second_graph(model: str, horizon: int, graphs: int, tmp_path: Path):
    """Eleven windows in chunks of eight, so the last one is padded; Toto decodes two patches more at 70 steps."""
    length = 128 - horizon + 1  # Kronos' network sees 128 bars: none drops out
    eager, compiled = load(model, tmp_path, mode="off"), load(model, tmp_path)
    ours = drawn(compiled, model, horizon, max_context=length)
    with torch.compiler.set_stance("fail_on_recompile"):
        np.testing.assert_array_equal(drawn(compiled, model, horizon, max_context=length), ours)
    assert (compiled.compilation, compiled.graphs.count, compiled.graphs.recompilations) == ("default", graphs, 0)
    assert compilation.graph_breaks() == 0
    assert_same(ours, drawn(eager, model, horizon, max_context=length))
    assert eager.graphs.count == 0


def test_a_kronos_window_that_slides_is_drawn_as_ever(tmp_path: Path):
    eager, compiled = load("kronos", tmp_path, mode="off"), load("kronos", tmp_path)
    assert_same(*(drawn(forecaster, "kronos", 7, max_context=126) for forecaster in (eager, compiled)))
    assert compiled.graphs.count == 1  # the prefill's


@pytest.mark.parametrize("model", ["toto", "kronos"])
def test_contexts_of_other_lengths_share_a_graph(model: str, tmp_path: Path):
    """What is padded, whole patches on the left or bars on the right, changes nothing."""
    eager, compiled = load(model, tmp_path, mode="off"), load(model, tmp_path)
    whole = bars(250)
    contexts = [whole.slice(0, stop) for stop in (210, 200, 220, 250, 240)]
    params = PARAMS[model] | {"max_context": 120}
    answers = [f.draw(f.encode(contexts, params, 1), params, range(5)) for f in (eager, compiled)]
    assert_same(*answers)
    shorter = [context.slice(0, len(context) - 6) for context in contexts]
    made = compiled.graphs.count
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = [f.draw(f.encode(shorter, params, 1), params, range(5)) for f in (eager, compiled)]
    assert_same(*answers)
    assert compiled.graphs.count == made


def random_params(model: str, rng: np.random.Generator) -> dict[str, Any]:
    if model == "toto":
        aggregate = rng.choice(["mean", "median", "trimmed_mean_10", "quantile_0.30"])
        return {"context_length": 320, "num_samples": int(rng.choice([16, 40, 64])), "aggregate": str(aggregate)}
    return {
        "max_context": int(rng.choice([70, 100, 128])),
        "clip": float(rng.choice([1.0, 2.0, 3.0])),
        "temperature": float(rng.uniform(0.05, 0.4)),
        "top_k": int(rng.choice([0, 4, 12, 48])),
        "top_p": float(rng.uniform(0.65, 0.95)),
        "sample_count": int(rng.choice([16, 40, 64])),
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toto", "kronos"])
def test_a_whole_study_of_changing_params_needs_no_other_graph(model: str, tmp_path: Path):
    eager, compiled = load(model, tmp_path, mode="off"), load(model, tmp_path)
    rng, test = np.random.default_rng(0), windows()
    # A cache of no bytes: every trial encodes anew.
    theirs, ours = (Evaluator(f, cache_bytes=0, rung=8) for f in (eager, compiled))
    trials = [random_params(model, rng) for _ in range(100)]
    for params in (
        [trials[0]] if model == "toto" else [trials[0] | {"max_context": length} for length in (70, 128)]
    ):  # one graph a length of contexts, that of 100 bars being 128's
        ours.measure(test, params)
    made = compiled.graphs.count
    with torch.compiler.set_stance("fail_on_recompile"):
        maes = [ours.measure(test, params).mae for params in trials]
    assert compiled.graphs.count == made
    assert compiled.graphs.recompilations == compilation.graph_breaks() == 0
    assert compiled.compilation == "default"
    for i in range(0, 100, 10):
        assert maes[i] == pytest.approx(theirs.measure(test, trials[i]).mae, rel=1e-3), trials[i]


@pytest.mark.parametrize("top_k", [0, 1, 4, 5000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_tokens_are_picked_by_tensors_as_by_numbers(top_k: int, top_p: float):
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(50, 256, generator=generator)
    logits[:, 7] = logits[:, 9]  # a tie
    u = torch.rand(50, 30, generator=generator, dtype=torch.float64)
    probabilities = Sampling(temperature=0.3, top_k=top_k, top_p=top_p).probabilities(logits)
    expected = inverse_cdf(probabilities, np.repeat(np.arange(50), 30), u.flatten().numpy())
    params = (torch.tensor(0.3), torch.tensor(top_k), torch.tensor(top_p))
    ours = kronos_fixed.pick(logits[:, None].expand(-1, 30, -1), params, u)
    np.testing.assert_array_equal(ours.flatten(), expected)


@pytest.mark.slow
@pytest.mark.timeout(600)  # 25 s each on an idle core
@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler, g++ or clang++, and there is none")
def test_inductors_kernels_give_kronos_the_same_answer(tmp_path: Path):
    eager, compiled = load("kronos", tmp_path, mode="off"), load("kronos", tmp_path, backend="inductor")
    assert_same(*(drawn(forecaster, "kronos", 1, 8) for forecaster in (eager, compiled)))
    assert compiled.compilation == "default"


@pytest.mark.slow
@pytest.mark.timeout(600)  # 25 s each on an idle core
@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler, g++ or clang++, and there is none")
def test_inductors_kernels_give_toto_the_same_answer_and_serve_a_second_process(tmp_path: Path):
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from torch._dynamo.utils import counters\n"
        "import test_compilation as t\n"
        "load = lambda mode: t.load('toto', Path(sys.argv[1]), mode=mode, backend='inductor')\n"
        "eager, compiled = load('off'), load('default')\n"
        "t.assert_same(*(t.drawn(forecaster, 'toto', 1, 8) for forecaster in (eager, compiled)))\n"
        "found = [counters['inductor'][f'fxgraph_cache_{which}'] for which in ('miss', 'hit')]\n"
        "print(json.dumps([compiled.compilation, *found]))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in SCRUBBED}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-c", script, str(tmp_path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environ) for _ in range(2)]
    assert [json.loads(run.stdout) for run in runs] == [["default", 1, 0], ["default", 0, 1]]
    assert list((tmp_path / "compiled" / compilation.INDUCTOR).rglob("*.so"))


# ---- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toto", "kronos"])
@pytest.mark.parametrize("mode", ["off", "default"])
def test_bfloat16_is_the_networks_only_and_another_fingerprint(model: str, mode: str, tmp_path: Path):
    exact, coarse = load(model, tmp_path, mode="off"), load(model, tmp_path, mode=mode, dtype="bfloat16")
    assert exact.fingerprint == forecasters.load(model, **CHECKPOINTS[model]).fingerprint
    assert coarse.fingerprint != exact.fingerprint
    running = Running(dtype="bfloat16")
    assert coarse.fingerprint == forecasters.inspect(model, **CHECKPOINTS[model], running=running)
    horizon = 40 if model == "toto" else 7
    test, params = windows(horizon).contexts(range(8)), PARAMS[model]
    theirs, ours = (cast(Any, f.encode(test, params, horizon)) for f in (exact, coarse))
    if model == "toto":
        np.testing.assert_array_equal(ours.affine_loc, theirs.affine_loc)
        np.testing.assert_array_equal(ours.affine_scale, theirs.affine_scale)
        assert ours.prefixes[0].keys[0].dtype == torch.bfloat16
    else:
        for mine, other in zip(ours.windows, theirs.windows, strict=True):
            assert torch.equal(mine.tokens, other.tokens)
            assert mine.decoder[0][0].dtype == torch.float32
        assert ours.windows[0].prefix.hidden.dtype == torch.bfloat16
    points = [f.draw(encoded, params, range(8)).mean(1) for f, encoded in ((exact, theirs), (coarse, ours))]
    error = np.abs(points[0] - points[1]) / deviations(8)
    assert 0 < np.median(error) < 0.2
    assert coarse.compilation == mode


# ---- failures, and sharing the kernels -------------------------------------------------------------------------------


def broken(*_: Any) -> Any:
    raise RuntimeError("no such instruction: vfoo")


def test_a_failed_compilation_is_one_warning_and_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    compiled = load("toto", tmp_path)
    with caplog.at_level(logging.WARNING):
        ours = drawn(compiled, "toto", 40)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such instruction: vfoo" in caplog.text
    assert compiled.compilation == "default failed: RuntimeError: no such instruction: vfoo"
    assert_same(ours, drawn(load("toto", tmp_path, mode="off"), "toto", 40))


def test_memory_that_runs_out_is_no_failed_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It halves the chunk as ever, and the smaller graph is compiled."""
    real, sizes = torch.compile, []

    def limited(function: Any, **options: Any) -> Any:
        whole = real(function, **options)

        def call(series: torch.Tensor, *rest: Any) -> Any:
            sizes.append(len(series))
            if len(series) > most:
                raise torch.OutOfMemoryError
            return whole(series, *rest)

        return call

    monkeypatch.setattr(torch, "compile", limited)
    most, compiled = 4, load("toto", tmp_path)
    assert_same(drawn(compiled, "toto", 1, 8), drawn(load("toto", tmp_path, mode="off"), "toto", 1, 8))
    assert sizes == [8, 4, 4]
    assert compiled.compilation == "default"
    sizes.clear()
    most, compiled = 4, load("toto", tmp_path)
    assert np.isfinite(drawn(compiled, "toto", 1, 1)).all()  # one window, run with seven of padding
    assert sizes == [8, 4]
    most = 0
    with pytest.raises(ForecastError, match="out of memory on cpu with one window"):
        drawn(compiled, "toto", 1, 8)


def test_a_step_that_runs_out_of_memory_is_tried_with_fewer_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    eager, compiled = load("kronos", tmp_path, mode="off"), cast(Kronos, load("kronos", tmp_path))
    real, sizes, most = kronos_fixed.FixedShapes.step, [], 16
    encoded = compiled.encode(windows(7).contexts(range(8)), PARAMS["kronos"], 7)

    def run(function: Any, key: Any, *arguments: Any) -> Any:
        sizes.append(arguments[0].shape[1])
        if sizes[-1] > most:
            raise torch.OutOfMemoryError
        return real(compiled._fixed, *arguments)

    monkeypatch.setattr(compiled.graphs, "run", run)
    expected = drawn(eager, "kronos", 7, 8)
    seeds = windows(7).seeds(0)[:8]
    assert_same(compiled.draw(encoded, PARAMS["kronos"], seeds), expected)
    assert sizes == [64, 32, *[16] * 7 * 3]
    most = 0
    with pytest.raises(ForecastError, match="out of memory on cpu with one sample of 7 bars of 8 windows"):
        compiled.draw(encoded, PARAMS["kronos"], seeds)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def graphs(folder: Path) -> Graphs:
    policy = Policy(mode="default", backend="eager", folder=folder)
    return Graphs(policy, device=torch.device("cpu"), identity="")


def hold(folder: Path, entered: Any) -> None:
    with graphs(folder)._turn(double, "key"):
        entered.set()
        time.sleep(600)


@pytest.mark.slow
def test_one_compiles_the_others_wait_and_a_dead_one_lets_go(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    held, entered = context.Event(), threading.Event()

    def enter() -> None:
        with graphs(tmp_path)._turn(double, "key"):
            entered.set()

    first, second = context.Process(target=hold, args=(tmp_path, held)), threading.Thread(target=enter)
    first.start()
    try:
        assert held.wait(120)
        with graphs(tmp_path)._turn(double, "another"):
            pass  # another graph is nobody's concern
        second.start()
        assert not entered.wait(1)
    finally:
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
    assert entered.wait(60)
    second.join()
    with graphs(tmp_path)._turn(double, "key"), graphs(tmp_path)._turn(double, "key"):
        pass  # compiled by now: nobody waits for anybody
