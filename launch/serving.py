"""What `studies serve` does: forecasts over HTTP, the state of the server for people and for Prometheus.

Knows HTTP; what is answered is studies/forecasting.py, who may come in launch/door.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from forecasters import ExpectedError
from launch import door as doors
from launch.output import say
from launch.places import open_storage, private_server_kept_alive
from launch.views import status
from storage import DatabaseUnavailable, configs
from storage.retrying import one_line
from studies.config import Config, ConfigError
from studies.ensembles import models_of
from studies.forecasting import Answers, Forecast, Forecasts
from studies.questions import promoted

_log = logging.getLogger("studies")
DANGER = "read the forecasts and have others computed"
GRACE_S = 60.0  # that requests in progress may take once the server is to end
TIDY_S = 6 * 3600.0  # between two looks for forecasts that are kept for too long
MAX_SYMBOLS = 1000  # of a request
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
JSON, TEXT, HTML = "application/json", "text/plain; charset=utf-8", "text/html; charset=utf-8"


def command(config: Config, host: str, port: int, token_file: Path | None, *, device: str) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ExpectedError."""
    door = doors.open_door(host, token_file, what="server", danger=DANGER)
    storage = open_storage(config, start=True, write=True)
    ended = threading.Event()
    log = config.workers.log_dir / "serve.log"
    with Forecasts(config, storage=storage, device=device, note=say) as forecasts:
        server = doors.bind(application(forecasts), door, port)
        for model in sorted(models_in_use(config)):
            forecasts.together.load(model)

        def end(number: int, frame: object) -> None:
            ended.set()
            signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        with private_server_kept_alive(config, say=say, log=log, on_stop=ended.set):
            answering = threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True)
            answering.start()
            say(f"{doors.address(server, door)} (Ctrl-C ends it)")
            while True:
                forecasts.together.tidy()
                if ended.wait(TIDY_S):
                    break
            server.shutdown()
            time.sleep(0.1)  # connections that were taken up have their request read
            if not server.drain(GRACE_S):
                say(f"requests in progress after {GRACE_S:.0f} s are left without an answer")
        server.server_close()
    storage.engine.dispose()
    say("stopped")


def models_in_use(config: Config) -> set[str]:
    """Those of the promoted files that can be read; who asks for one of the others is told why."""
    found = set()
    for symbol in configs.symbols_in(config.hyperparams.dir, "best"):
        with contextlib.suppress(ExpectedError):
            found.update(models_of(promoted(config, symbol)))
    return found


# --- pages --------------------------------------------------------------------------------------------------


def application(forecasts: Forecasts) -> doors.Application:
    """What answers at each address."""
    registry = CollectorRegistry()  # of its own: the default one has the process's
    seconds = Histogram(
        "forecast_response_seconds", "Of requests of /forecast, by this server.", buckets=BUCKETS, registry=registry
    )
    registry.register(_Collector(forecasts))

    def forecast(query: Mapping[str, list[str]]) -> tuple[str, str, bytes]:
        with seconds.time():
            try:
                answers = forecasts.ask(**asked(query))
            except ExpectedError as error:
                return "400 Bad Request", JSON, _json({"error": str(error)})
        return "200 OK" if answers.forecasts else "404 Not Found", JSON, _json(content(answers))

    pages: Mapping[str, Callable[[Mapping[str, list[str]]], tuple[str, str, bytes]]] = {
        "/forecast": forecast,
        "/healthz": lambda query: _health(forecasts),
        "/metrics": lambda query: ("200 OK", "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry)),
        "/": lambda query: ("200 OK", HTML, status.status_page(_status(forecasts)).encode()),
    }

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        page = pages.get(environ["PATH_INFO"] or "/")
        if page is None:
            answered = ("404 Not Found", TEXT, f"there are {', '.join(pages)}\n".encode())
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            answered = ("405 Method Not Allowed", TEXT, b"GET is the only method\n")
        else:
            try:
                answered = page(parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True))
            except Exception as error:  # noqa: BLE001 - one request's failure is told to who asked
                _log.exception("%s failed", environ["PATH_INFO"])
                answered = ("500 Internal Server Error", JSON, _json({"error": one_line(error)}))
        start_response(answered[0], [("Content-Type", answered[1]), ("Content-Length", str(len(answered[2])))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answered[2]]

    return answer


def asked(query: Mapping[str, list[str]]) -> dict[str, Any]:
    """The options of `Forecasts.ask` that a request names. Raises ConfigError."""
    known = ("symbol", "horizon", "keys", "price", "max_age", "token")
    if unknown := [name for name in query if name not in known]:
        raise ConfigError(f"unknown parameter {unknown[0]!r}; there are {', '.join(known[:-1])}")
    symbols = [name for part in query.get("symbol", []) for name in part.split(",") if name]
    if not symbols or len(symbols) > MAX_SYMBOLS:
        raise ConfigError(f"name 1 to {MAX_SYMBOLS} symbols: /forecast?symbol=BTCUSD&symbol=AAPL")
    if "price" in query and len(symbols) > 1:
        raise ConfigError("price is of a single symbol")
    return {
        "symbols": symbols,
        "horizon": _number(query, "horizon", int, 1),
        "keys": [key for part in query.get("keys", []) for key in part.split(",") if key],
        "price": _number(query, "price", float, 1e-300),
        "max_age_s": _number(query, "max_age", float, 0),
    }


def _number(query: Mapping[str, list[str]], name: str, kind: type[int] | type[float], least: float) -> Any:
    if name not in query:
        return None
    text = query[name][-1]
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}={text}: expected {what} {'of at least' if least in (0, 1) else 'above'} {least:.0f}")
    return value


def content(answers: Answers) -> dict[str, Any]:
    """Answers as JSON values."""
    return {
        "forecasts": {symbol: one.to_json() for symbol, one in answers.forecasts.items()},
        "refused": answers.refused,
    }


def _json(values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _bars(forecasts: Forecasts) -> str:
    folder = forecasts.config.data.dir
    return "ok" if os.access(folder, os.R_OK | os.X_OK) else f"{folder} cannot be read"


def _database(forecasts: Forecasts) -> str:
    return "none" if forecasts.together.storage is None else forecasts.together.away or "ok"


def _health(forecasts: Forecasts) -> tuple[str, str, bytes]:
    """Looks at what is known already, so that it answers whatever else is going on."""
    bars, database = _bars(forecasts), _database(forecasts)
    state = "ok" if bars == "ok" and database in ("ok", "none") else "degraded"
    if not forecasts.together.alive or bars != "ok":
        state = "failed"
    said = {"status": state, "database": database, "bars": bars, "models": dict(forecasts.together.loaded)}
    return "503 Service Unavailable" if state == "failed" else "200 OK", JSON, _json(said)


def _status(forecasts: Forecasts) -> status.Status:
    try:
        totals = forecasts.together.totals()
    except DatabaseUnavailable:
        totals = {}
    return status.Status(
        title="Forecasts",
        database=_database(forecasts),
        bars=_bars(forecasts),
        models=forecasts.together.loaded,
        symbols=configs.symbols_in(forecasts.config.hyperparams.dir, "best"),
        last=dict(forecasts.last),
        totals=totals,
    )


class _Collector:
    """What Prometheus is told beside response times. Requests are summed over all processes, which Postgres does."""

    def __init__(self, forecasts: Forecasts) -> None:
        self._forecasts = forecasts

    def collect(self) -> Iterator[Metric]:
        together = self._forecasts.together
        requests = CounterMetricFamily(
            "forecast_requests",
            "Symbols that were asked for, of all processes on the database, by how they were answered.",
            labels=["symbol", "kind"],
        )
        up = together.storage is not None
        try:
            summed: dict[tuple[str, str], int] = {}
            for (_, symbol, kind), count in together.totals().items():
                summed[symbol, kind] = summed.get((symbol, kind), 0) + count
            for labels, count in sorted(summed.items()):
                requests.add_metric(labels, count)
            yield requests
        except DatabaseUnavailable:
            up = False  # and no sums, rather than ones that fall
        yield GaugeMetricFamily("forecast_database_up", "Whether the database answers.", value=float(up))
        computed = CounterMetricFamily("forecast_computed", "Forecasts that this server computed.", labels=["model"])
        for model, count in dict(together.computed).items():
            computed.add_metric([model], count)
        yield computed
        yield CounterMetricFamily("forecast_computing_seconds", "What this took.", value=together.computing_s)
        stale = GaugeMetricFamily("forecast_stale", "Whether the last answer was stale.", labels=["symbol"])
        ages = GaugeMetricFamily("forecast_bars_age_seconds", "Since the last bar began.", labels=["symbol"])
        for symbol, (_, one) in dict(self._forecasts.last).items():
            if isinstance(one, Forecast):
                stale.add_metric([symbol], float(one.stale))
                ages.add_metric([symbol], time.time() - one.as_of.timestamp())
        yield from (stale, ages)
