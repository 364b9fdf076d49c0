"""What most tests need: a folder with settings, bars and promoted files, and a database of its own.

`place` in conftest.py makes the class that a test module calls Place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import click
import optuna
import sqlalchemy
from click.testing import CliRunner, Result
from optuna.trial import TrialState

import forecasters
from launch import cli
from objectives.evaluation import Evaluator
from storage import database, slots
from storage.progress import read_confirmations, study_progress
from studies import config as configuration
from studies import study as studying
from studies import working
from studies.config import Config
from studies.demo import INDICES, demo_bars
from studies.series import Series, read_series
from studies.study import Study

BIN = Path(sys.executable).parent

# Everything that a run reads and writes, beside its settings. Dotted keys: a test can set more of the same tables.
FOLDERS = """
data.dir = "bars"
workers.log_dir = "logs"
hyperparams.dir = "hyperparams"
promotion.results_dir = "results"
"""

RUN_SETTINGS = f"""{FOLDERS}
workers.lease_s = 2.0
[windows]
min_context = 64
confirmation = 40
[toto]
checkpoint = "toto-tiny"
context_length = 256
num_samples = [64, 128, 256]
aggregates = ["mean", "median", "trimmed_mean_10", "quantile_0.30"]
[kronos]
checkpoint = "kronos-tiny"
max_context = [128, 192]
clip = [1.0, 1.4]
sample_count = [96, 128]
[naive]
context_length = 256
num_samples = [64, 128, 256]
aggregates = ["mean", "median", "trimmed_mean_10", "quantile_0.30"]
[search]
models = ["naive"]
"""

STUDY_SETTINGS = f"""{FOLDERS}
[windows]
confirmation = 60
max_passes = 4
[search]
models = ["toto"]
[toto]
checkpoint = "toto-tiny"
context_length = 256
num_samples = [64, 128]
aggregates = ["mean", "median", "trimmed_mean_10", "quantile_0.30"]
[kronos]
checkpoint = "kronos-tiny"
"""


# A worker that sleeps in every trial, where signals find it at no cost of the processor. Confirmations have no rungs.
SLOW_TRIALS = """
import sys
if "launch.worker" in sys.orig_argv:
    import time
    from objectives.evaluation import Evaluator
    measure = Evaluator.measure
    def slowly(self, *words, on_rung=None, **options):
        time.sleep({seconds} if on_rung else 0)
        return measure(self, *words, on_rung=on_rung, **options)
    Evaluator.measure = slowly
"""

# A worker whose first trial waits until others are in theirs: one may else do everything before the next starts.
TOGETHER = """
import sys
if "launch.worker" in sys.orig_argv:
    import os, time
    from pathlib import Path
    from objectives.evaluation import Evaluator
    measure = Evaluator.measure
    def together(self, *words, on_rung=None, **options):
        if on_rung:
            Path({folder!r}, str(os.getpid())).touch()
            while len(os.listdir({folder!r})) < {workers}:
                time.sleep(0.01)
        return measure(self, *words, on_rung=on_rung, **options)
    Evaluator.measure = together
"""

# A worker whose confirmations note what they measured, and sleep for a minute once they have measured this often.
STUCK_CONFIRMATION = """
import sys
if "launch.worker" in sys.orig_argv:
    import json, time
    from pathlib import Path
    from objectives.evaluation import Evaluator
    batch_errors, count = Evaluator.batch_errors, 0
    def noting(self, windows, params, indices, *, passes, **more):
        global count
        if tuple(passes) == (0,):  # a trial, or the windows of the search
            return batch_errors(self, windows, params, indices, passes=passes, **more)
        count += 1
        time.sleep(60 if count > {calls} else 0)
        found = batch_errors(self, windows, params, indices, passes=passes, **more)
        with Path({log!r}).open("a") as file:
            file.write(json.dumps([dict(params), [windows.origins[i] for i in indices], list(passes)]) + "\\n")
        return found
    Evaluator.batch_errors = noting
"""

INCUMBENT = {"num_samples": 48, "aggregate": "quantile_0.90"}


@cache
def index_bars() -> Mapping[str, list[str]]:
    """The lines of each packaged index's file of bars, header first, by symbol."""
    with TemporaryDirectory() as folder:
        return {path.stem: path.read_text().splitlines() for path in demo_bars(folder, INDICES)}


def last_bars(symbol: str, count: int) -> list[str]:
    """The header and the last bars of a packaged index."""
    header, *lines = index_bars()[symbol]
    return [header, *lines[-count:]]


def write_bars(folder: Path, counts: Mapping[str, int]) -> None:
    """A file of the last bars of each of these indices."""
    folder.mkdir(exist_ok=True)
    for symbol, count in counts.items():
        (folder / f"{symbol}.csv").write_text("\n".join([*last_bars(symbol, count), ""]))


def patch_python(folder: Path, code: str) -> dict[str, str]:
    """The environment in which every Python process runs this code first, from a module in this new folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    others = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {"PYTHONPATH": os.pathsep.join([str(folder), *others])}


def start_together(folder: Path, workers: int) -> dict[str, str]:
    """The environment in which no trial begins to measure before as many workers have one."""
    there = folder / "in-a-trial"
    there.mkdir()
    return patch_python(folder / "together", TOGETHER.format(folder=str(there), workers=workers))


@cache
def tiny_toto() -> forecasters.Forecaster:
    """The bundled Toto on the CPU, loaded once a process."""
    return forecasters.load("toto", checkpoint="toto-tiny", device="cpu")


class Place:
    """The base: what every kind of place has."""

    SETTINGS: ClassVar[str] = FOLDERS
    BARS: ClassVar[Mapping[str, int]] = {}  # number of the last bars, by symbol

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.settings = folder / "studies.toml"
        self.settings.write_text(self.SETTINGS)
        self.data = folder / "bars"
        write_bars(self.data, self.BARS)
        self.storage = database.open_storage(url, wait_s=10, create=False)

    def close(self) -> None:
        """Give the connections back; the database is dropped by the fixture that made it."""
        self.storage.engine.dispose()

    def write(self, name: str, lines: list[str]) -> Path:
        """A file of bars."""
        path = self.data / name
        path.write_text("\n".join([*lines, ""]))
        return path

    def promoted_file(self, symbol: str, folder: str = "best") -> Path:
        return self.folder / "hyperparams" / folder / f"{symbol}.json"

    def put_promoted(
        self, symbol: str, config: Mapping[str, Any], *, folder: str = "best", model: str = "toto", **more: Any
    ) -> Path:
        """A configuration in use, as a promoted file says it."""
        path = self.promoted_file(symbol, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        validation = {"price_mae": 1.0, "pct_return_mae": 0.5, "latency_s": 1.0}
        record = {"symbol": symbol, "model": model, "config": dict(config), "validation": validation, **more}
        path.write_text(json.dumps(record))
        return path

    def suggested(self, words: str) -> str:
        """A command as messages suggest it here."""
        return f"{words} --config {self.settings}"

    def invoke(self, command: click.Command, *words: str, url: str | None = None) -> Result:
        """A command in this process."""
        options = ["--config", str(self.settings), "--storage", url or self.url]
        return CliRunner().invoke(command, [*words, *options])


class RunPlace(Place):
    """For commands in processes of their own, on two symbols.

    They search `naive`, whose processes do not import torch: most tests are about the processes, not about the model.
    """

    SETTINGS = RUN_SETTINGS
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 420, "NASDAQ": 420}  # enough for the windows, quick to read

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        self.model = "naive"
        # Encodings that other tests kept are not found here.
        self.environment: dict[str, str] = {**os.environ, "OPTUNA_STORAGE": url, "XDG_DATA_HOME": str(folder / "data")}

    def search(self, model: str) -> None:
        """Let the settings name another model."""
        text = self.settings.read_text().replace(f'models = ["{self.model}"]', f'models = ["{model}"]')
        self.settings.write_text(text)
        self.model = model

    def slow_down(self, seconds: float) -> None:
        """Let every trial last this long."""
        self.environment |= patch_python(self.folder / "slow", SLOW_TRIALS.format(seconds=seconds))

    def start_together(self, workers: int) -> None:
        self.environment |= start_together(self.folder, workers)

    def get_stuck(self, calls: int) -> Path:
        """Let confirmations stop getting on after so many measurements, which are noted in the file returned."""
        folder = self.folder / f"stuck-{calls}"
        log = self.folder / f"measured-{calls}"
        code = STUCK_CONFIRMATION.format(calls=calls, log=str(log))
        self.environment |= patch_python(folder, code)
        return log

    def command(self, *words: str) -> list[str]:
        return [str(BIN / words[0]), *words[1:], "--config", str(self.settings)]

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        ended = subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == code, f"{words}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def promote(self, *words: str) -> list[dict[str, Any]]:
        """What `promote --json` prints, in this process: one of its own takes a second to import what it needs."""
        ended = self.invoke(cli.promote, "--json", *words)
        assert ended.exit_code == 0, ended.output
        return json.loads(ended.stdout)

    def launch(self, *words: str) -> subprocess.Popen[str]:
        """A search of two workers, under way."""
        command = self.command("launch-workers", "--cpus", "2", *words)
        return subprocess.Popen(
            command, env=self.environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def wait_for_trials(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while sum(p.done for p in study_progress(self.storage).values()) < count:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.02)

    def wait_for(self, query: str, wanted: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.storage.transaction(lambda c: c.execute(sqlalchemy.text(query)).scalar())) != wanted:
            assert time.monotonic() < deadline, f"{query}: {found}, not {wanted}"
            time.sleep(0.02)

    def trials(self, symbol: str, model: str | None = None) -> list[optuna.trial.FrozenTrial]:
        names = (symbol, model or self.model)
        (study,) = [study for study in studying.list_studies(self.storage) if (study.symbol, study.model) == names]
        return optuna.load_study(study_name=study.name, storage=self.storage).get_trials(deepcopy=False)

    def assert_exact(self, budget: int, *symbols: str, model: str | None = None) -> None:
        """Every trial of the budget is done, once."""
        for symbol in symbols:
            trials = self.trials(symbol, model)
            states = [trial.state for trial in trials]
            assert states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED) == budget
            assert TrialState.RUNNING not in states
            claims = [t.system_attrs["claim"] for t in trials if t.state != TrialState.FAIL]
            assert len(set(claims)) == budget


class StudyPlace(Place):
    """For studies of one symbol that are worked in this process, as a worker works them."""

    SETTINGS = STUDY_SETTINGS
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 400}
    TRIALS: ClassVar[int] = 6

    @property
    def forecaster(self) -> forecasters.Forecaster:
        return tiny_toto()

    def config(self, **searching: Any) -> Config:
        config = configuration.load(self.settings)
        return replace(config, search=replace(config.search, **{"trials": self.TRIALS, **searching}))

    def series(self) -> Series:
        return read_series(self.config(), [])[0][0]

    def open(self, **searching: Any) -> studying.Opened:
        config = self.config(**searching)
        checkpoints = {"toto": self.forecaster.fingerprint}
        return studying.open_studies(self.storage, config, [self.series()], ["toto"], checkpoints)[0]

    def run(self, study: Study, **searching: Any) -> studying.StudyRun:
        return studying.start(self.storage, self.config(**searching), study, self.series(), self.forecaster.fingerprint)

    def evaluator(self, **options: Any) -> Evaluator:
        return Evaluator(self.forecaster, cache_bytes=1 << 26, max_num_samples=128, **options)

    def finish(self, study: Study, evaluator: Evaluator | None = None, **searching: Any) -> Mapping[str, Any]:
        """Do every slot of a study, as a worker does. Returns what its confirmation says."""
        run = self.run(study, **searching)
        evaluator = evaluator or self.evaluator(exact=searching.get("objective") == "exact")
        clock = working.StageClock(self.storage, [evaluator])
        while slot := slots.claim(self.storage, study.study_id, worker="host:1", lease_s=60):
            working.work(self.storage, run, slot, evaluator, attrs={"worker": "host:1", "device": "cpu"}, clock=clock)
        return self.result(study)

    def result(self, study: Study) -> Any:
        return read_confirmations(self.storage, [study.study_id])[study.study_id].result

    def trials(self, study: Study) -> dict[int, optuna.trial.FrozenTrial]:
        found = optuna.load_study(study_name=study.name, storage=self.storage).get_trials(deepcopy=False)
        return {trial.number: trial for trial in found}

    def put(self, folder: str, config: Mapping[str, Any], model: str = "toto") -> None:
        self.put_promoted("SP500", config, folder=folder, model=model)
