"""Five hundred studies of a hundred trials in one database: what a worker and a person wait for.

`python -m benchmarks.many_studies`, half a minute; a private server in a temporary folder. Milliseconds of this
machine, the fastest of five (two, of processes), against what they must stay below; exits 1 where one does not.
`--studies 100 400 1600 4000` makes other numbers of studies, one after the other, which takes some minutes.

optuna-dashboard is served as `studies dashboard` serves it. Its list of studies asks for /api/meta and /api/studies,
the page of a study for /api/studies/ID and then for its importances; the page's program comes once and is 1.9 MB.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState
from sqlalchemy import text

from benchmarks import private, recording
from forecasters import Bars
from launch.views import dashboard
from launch.views.run_watcher import RunWatcher
from objectives.metrics import Measurement
from storage import database, slots
from storage.progress import free_counts, has_open, study_progress
from storage.retrying import RetryingStorage
from studies import candidates, space
from studies import config as configuration
from studies import study as studying
from studies.evidence import (
    ForecastSeries,
    ForecastsShown,
    MeasuredConfiguration,
    NoChange,
    Part,
    Source,
    StudyEvidence,
    WindowSpan,
    to_json,
)
from studies.series import Series, confirmation_windows, window_span

# What must not be exceeded, of 500 studies and of 4,000; between and beyond them it grows evenly.
PICK_MS = 20, 20  # to pick the next slot
OPEN_MS = 7500, 60000  # for `launch-workers` to make every study, the bars read
RESUME_MS = 2000, 15000  # to find that every study is there, the bars read
LIST_MS = 2000, 4000  # for `studies list`, as a process
READ_MS = 200, 1600  # for the live table, which then reads every 20 s
PROMOTE_MS = 3000, 3000  # for `promote` over two dozen studies
PROMOTE_ALL_MS = 20000, 160000  # over every finished study
PAGE_MS = 1000, 8000  # for the dashboard's data, which its pages ask for again every ten seconds
STUDIES, TRIALS = 500, 100
PROMOTED = [f"S{number:03}" for number in range(1, STUDIES) if number % 10][:24]  # of finished studies
CONFIG = configuration.load(None)
CONFIG = replace(CONFIG, search=replace(CONFIG.search, trials=TRIALS))
SPACE = space.make("toto", CONFIG)
IN_USE = {"aggregate": "mean", "num_samples": 64, **SPACE.fixed}
COUNTS: dict[Part, int] = {"validation": 30, "confirmation": 250, "test": 20}  # windows
TRIED = [(number, {**IN_USE, "num_samples": 2**number * 128, "aggregate": "median"}) for number in range(5)]
CANDIDATES = candidates.choose(SPACE, TRIED, space.default(SPACE, CONFIG))
AS_OF, CHECKPOINT = "2026-11-20", "c" * 64


def daily_bars(count: int) -> Bars:
    """A random walk whose last bar is of AS_OF."""
    close = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(size=count) * 0.01))
    times = np.datetime64(AS_OF, "ns") - np.arange(count)[::-1] * np.timedelta64(1, "D")
    return Bars(timestamps=times, open=close, high=close, low=close, close=close, volume=None)


BARS = daily_bars(500)  # of every symbol
DEFINITION = studying.define(CONFIG, Series(symbol="S001", path=Path("S001.csv"), bars=BARS), "toto", AS_OF, CHECKPOINT)
SPAN = window_span(confirmation_windows(CONFIG, "S001", BARS))

# Every study has a baseline, a confirmation and what dashboards show: a note and plots, 26 kB in 13 rows.
# Every tenth study is under way, the others are finished.
FILL = """
insert into studies (study_id, study_name)
    select s, 'S' || to_char(s, case when s < 1000 then 'FM000' else 'FM0000' end) || '/toto@2026-11-20'
    from generate_series(1, :studies) s;
insert into study_directions (study_id, direction, objective)
    select s, 'MINIMIZE', 0 from generate_series(1, :studies) s;
insert into study_user_attributes (study_id, key, value_json)
    select s, 'definition', :definition from generate_series(1, :studies) s;
insert into study_system_attributes (study_id, key, value_json)
    select s, case n when 0 then 'dashboard:note_str:0' else 'dashboard:plot_data:studies-forecast:' || n - 1 end,
           to_json(repeat('x', 2100))::text
    from generate_series(1, :studies) s, generate_series(0, 12) n;
insert into trials (trial_id, number, study_id, state, datetime_start, datetime_complete)
    select (s - 1) * :trials + n, n - 1, s, 'COMPLETE', now(), now()
    from generate_series(1, :studies) s, generate_series(1, :trials) n where s % 10 > 0 or n <= :trials / 2;
select setval('trials_trial_id_seq', :studies * :trials);
insert into trial_values (trial_id, objective, value, value_type)
    select trial_id, 0, (trial_id::bigint * 7919 % 1000) / 1000.0, 'FINITE' from trials;
insert into trial_params (trial_id, param_name, param_value, distribution_json)
    select trial_id, p, trial_id / d % 3,
           '{"name": "CategoricalDistribution", "attributes": {"choices": [64, 128, 256]}}'
    from trials, unnest(array['aggregate', 'num_samples'], array[1, 3]) q (p, d);
insert into trial_system_attributes (trial_id, key, value_json) select trial_id, 'claim', '"h:1:' || trial_id || '"'
    from trials;
insert into trial_user_attributes (trial_id, key, value_json) select trial_id, k, '"host:1"'
    from trials, unnest(array['worker', 'measured']) k;
insert into trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    select trial_id, step, 0.5, 'FINITE' from trials, generate_series(10, 20, 10) step;
insert into slots (study_id, stage, number, label, state, result)
    select s, 0, 0, 'incumbent', 'done', '{"validation": {"mae": 0.9}}' from generate_series(1, :studies) s;
insert into slots (study_id, stage, number, state, claim)
    select s, 1, n - 1, case when s % 10 > 0 or n <= :trials / 2 then 'done' else 'free' end,
           case when s % 10 > 0 or n <= :trials / 2 then 'h:1:' || s || ':' || n end
    from generate_series(1, :studies) s, generate_series(1, :trials) n;
insert into slots (study_id, stage, number, label, state, result)
    select s, 2, 0, 'confirmation', case when s % 10 > 0 then 'done' else 'free' end,
           case when s % 10 > 0 then cast(:confirmation as jsonb) end
    from generate_series(1, :studies) s;
analyze;
"""


def confirmation() -> dict[str, Any]:
    """A result about as long as real ones: the best trials, the grid and the default, an error for each window."""
    errors = random.Random(0)

    def measured(count: int) -> Measurement:
        return Measurement(
            mae=0.8, price_mae=0.8, mae_percent=0.8, no_change_mae=1.0, skill=0.2, sampling_error=0.001, windows=count,
            errors=tuple(errors.random() for _ in range(count)), seconds={}, latency_s=None,
        )  # fmt: skip

    def one(params: Mapping[str, Any], trial: int | None = None, source: Source = "trial") -> MeasuredConfiguration:
        return MeasuredConfiguration(
            model="toto",
            params=dict(params),
            trial=trial,
            source=source,
            validation=measured(COUNTS["validation"]),
            confirmation=measured(COUNTS["confirmation"]),
            test=measured(COUNTS["test"]),
        )

    def forecasts(count: int) -> ForecastsShown:
        def prices() -> tuple[float, ...]:
            return tuple(errors.random() for _ in range(count))

        def series(trial: int | None) -> ForecastSeries:
            return ForecastSeries(trial=trial, points=prices(), low=prices(), high=prices())

        return ForecastsShown(
            times=("2026-11-20",) * count,
            actual=prices(),
            starts=tuple(range(count)),
            series={"best": series(0), "incumbent": series(None)},
        )

    return to_json(
        StudyEvidence(
            windows={
                part: SPAN if part == "confirmation" else WindowSpan(count=count, first="2025-11-21", last=AS_OF)
                for part, count in COUNTS.items()
            },
            passes=2,
            sampling_error=0.0005,
            candidates=tuple(one(each.params, each.trial, each.source) for each in CANDIDATES),
            in_use={"incumbent": one(IN_USE), "stored": one({**IN_USE, "num_samples": 128})},
            no_change={part: NoChange(mae=1.0, errors=measured(count).errors) for part, count in COUNTS.items()},
            forecasts={part: forecasts(count) for part, count in COUNTS.items() if part != "confirmation"},
        )
    )


def fill(storage: RetryingStorage, studies: int = STUDIES) -> None:
    """Make the studies in an empty database."""
    values = {"studies": studies, "trials": TRIALS, "definition": json.dumps(DEFINITION)}
    values["confirmation"] = json.dumps(confirmation())
    storage.transaction(lambda connection: connection.execute(text(FILL), values))


def resume(storage: RetryingStorage, studies: int) -> list[studying.Opened]:
    """What `launch-workers` does, once it has read the bars: it goes on with studies, or makes them."""
    series = [
        Series(symbol=f"S{number:03}", path=Path(f"S{number:03}.csv"), bars=BARS) for number in range(1, studies + 1)
    ]
    return studying.open_studies(storage, CONFIG, series, ["toto"], {"toto": CHECKPOINT})


def command(url: str, folder: Path, *words: str) -> str:
    """What one of our commands prints, as a process, over the studies."""
    line = [str(Path(sys.executable).parent / words[0]), *words[1:], "--json", "--storage", url]
    return subprocess.run(line, env=os.environ, cwd=folder, capture_output=True, text=True, check=True).stdout


def list_studies(url: str, folder: Path) -> str:
    """What `studies list --json` prints."""
    return command(url, folder, "studies", "list")


def promote(url: str, folder: Path, symbols: Sequence[str]) -> str:
    """What `promote --dry-run --json` prints of these confirmed studies, each with a promoted file to beat."""
    best = folder / "hyperparams" / "best"
    best.mkdir(parents=True, exist_ok=True)
    for symbol in symbols:
        content = {"symbol": symbol, "model": "toto", "config": IN_USE, "validation": {"pct_return_mae": 0.8}}
        (best / f"{symbol}.json").write_text(json.dumps(content))
    words = ["--hyperparams-dir", str(best.parent), "--symbols", ",".join(symbols)]
    return command(url, folder, "promote", "--dry-run", *words)


@contextmanager
def dashboard_over(url: str, folder: Path) -> Iterator[str]:
    """The address of a dashboard, as `studies dashboard` serves it, on a free port."""
    storage = database.open_storage(url, wait_s=10, create=False)
    server = dashboard.bind(storage, folder / "artifacts", dashboard.open_door("127.0.0.1", None), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        storage.engine.dispose()


def get(address: str, paths: Sequence[str]) -> list[bytes]:
    """The answers to requests, one after the other. Raises urllib.error.HTTPError."""
    found = []
    for path in paths:
        with urllib.request.urlopen(address + path, timeout=120) as answer:
            found.append(answer.read())
    return found


def list_page() -> list[str]:
    """What the dashboard's list of studies asks for."""
    return ["/api/meta", "/api/studies"]


def study_page(study_id: int) -> list[str]:
    """What the page of a study asks for. The server keeps trials for seconds: look at another one each time."""
    return ["/api/meta", f"/api/studies/{study_id}?after=0"]


def fastest_ms(work: Callable[[], object], times: int = 5) -> float:
    """Of several times, since other work on the machine only adds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


def limit_ms(of_500_and_4000: tuple[int, int], studies: int) -> float:
    low, high = of_500_and_4000
    return low + (high - low) * max(0, studies - 500) / 3500


def measure(url: str, folder: Path, studies: int) -> Mapping[str, tuple[float, tuple[int, int]]]:
    """Milliseconds and their limits, by what was done."""
    storage = database.open_storage(url, wait_s=10)
    found: dict[str, tuple[float, tuple[int, int]]] = {}
    found["open all, new"] = (fastest_ms(lambda: resume(storage, studies), times=1), OPEN_MS)
    storage.transaction(lambda connection: connection.execute(text("truncate studies cascade")))
    fill(storage, studies)
    everyone = list(range(1, studies + 1))
    found["resume all"] = (fastest_ms(lambda: resume(storage, studies), times=2), RESUME_MS)
    picks: dict[str, Callable[[], object]] = {
        "free slots of every study": lambda: free_counts(storage, everyone),
        "is any slot left": lambda: has_open(storage, everyone),
        "claim": lambda: slots.claim(storage, 10, worker="w:1", lease_s=60),
        "claim where there is none": lambda: slots.claim(storage, 11, worker="w:1", lease_s=60),
        "reap": lambda: slots.reap(storage, everyone, lease_s=60),
        "all trials of a study": lambda: storage.get_all_trials(10),
        "new trials of a study": lambda: storage._get_trials(10, None, {901}, 950),
        "create and end a trial": lambda: storage.set_trial_state_values(storage.create_new_trial(10), TrialState.FAIL),
    }
    found |= {name: (fastest_ms(work), PICK_MS) for name, work in picks.items()}
    watch = RunWatcher(storage, {study_id: f"S{study_id}" for study_id in everyone})
    found["progress of every study"] = (fastest_ms(lambda: study_progress(storage)), READ_MS)
    found["a read of every study for the live table"] = (fastest_ms(watch.read), READ_MS)
    found["studies list, as a process"] = (fastest_ms(lambda: list_studies(url, folder), times=2), LIST_MS)
    promoting = f"promote --dry-run over {len(PROMOTED)} studies, as a process"
    found[promoting] = (fastest_ms(lambda: promote(url, folder, PROMOTED), times=2), PROMOTE_MS)
    finished = [each.symbol for number, each in enumerate(studying.list_studies(storage), 1) if number % 10]
    promoting = "promote --dry-run over every finished study, as a process"
    found[promoting] = (fastest_ms(lambda: promote(url, folder, finished), times=1), PROMOTE_ALL_MS)
    with dashboard_over(url, folder) as address:
        other = iter(everyone)
        pages: dict[str, Callable[[], list[str]]] = {
            "list of studies": list_page,
            "page of a study": lambda: study_page(next(other)),
            "importances of a study": lambda: [f"/api/studies/{next(other)}/param_importances"],
        }
        for name, page in pages.items():
            found[f"dashboard: {name}"] = (fastest_ms(lambda page=page: get(address, page())), PAGE_MS)
    storage.engine.dispose()
    return found


def main() -> int:
    parser = recording.parser("many_studies", __doc__)
    parser.add_argument(
        "--studies",
        type=recording.at_least_one,
        nargs="+",
        default=[STUDIES],
        metavar="N",
        help=f"how many; {STUDIES} by default",
    )
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    postgres = ""
    for studies in options.studies:
        with private.folder() as folder, private.server(folder) as server:
            found = measure(server.url, folder, studies)
            storage = database.open_storage(server.url, wait_s=10, create=False)
            postgres = private.postgres(storage)
            storage.engine.dispose()
        rows = [(name, ms, limit_ms(limits, studies)) for name, (ms, limits) in found.items()]
        recording.table(f"{studies} studies of {TRIALS} trials", ("what", "ms", "below"), rows)
        figures[str(studies)] = {name: {"ms": ms, "limit_ms": limit} for name, ms, limit in rows}
        recording.write(options, figures, postgres=postgres)
    return 0 if all(one["ms"] < one["limit_ms"] for each in figures.values() for one in each.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
