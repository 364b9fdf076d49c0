"""Forecasts over HTTP and on the command line: requests, signals, death, a database that restarts, two servers."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from browser import Tab
from click.testing import CliRunner
from conftest import execute
from forecast_places import NAIVE, Place, daily
from places import BIN, last_bars, patch_python
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from launch import cli, serving
from launch import door as doors
from launch.door import Door
from launch.views import forecasts as view
from launch.views.tables import terminal
from storage import embedded, forecasts
from storage.database import create_schema, open_storage
from studies import together
from studies.forecasting import Forecasts

TOKEN = "correct-horse-battery"

# A server that takes this long for a forecast, and whose claims end soon.
SLOW = """
import sys
if "serve" in sys.orig_argv:
    import time
    from studies import together
    together.LEASE_S, answer = 1.0, together.answer
    def slowly(*words):
        time.sleep({seconds})
        return answer(*words)
    together.answer = slowly
"""


def get(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def forecast(address: str, query: str = "symbol=SP500") -> dict[str, Any]:
    status, text = get(address, f"/forecast?{query}")
    assert status == 200, text
    return json.loads(text)["forecasts"]


def metrics(address: str) -> dict[str, float]:
    """Requests by kind, of all symbols."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(get(address, "/metrics")[1]):
        for sample in family.samples if family.name == "forecast_requests" else ():
            found[sample.labels["kind"]] = found.get(sample.labels["kind"], 0) + sample.value
    return found


@contextmanager
def served(found: Forecasts, host: str = "127.0.0.1", token: str | None = None) -> Iterator[str]:
    """The address of a server in this process."""
    server = doors.bind(serving.application(found), Door(host=host, token=token, what="server"), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Server:
    """`studies serve` in a process of its own."""

    def __init__(self, place: Place, *words: str, url: str = "", slow_s: float = 0.0) -> None:
        environment = {**os.environ, "OPTUNA_STORAGE": url or place.url}
        if slow_s:
            environment |= patch_python(place.folder / f"slow-{time.monotonic_ns()}", SLOW.format(seconds=slow_s))
        command = [str(BIN / "studies"), "serve", "--config", str(place.settings), "--port", "0", *words]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.match(r"http://([\d.:]+)/", line):
                self.address = found[1]
                return
        raise AssertionError("the server did not begin")

    def end(self, number: int = signal.SIGTERM) -> str:
        """What it says until it ends."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[1]


@contextmanager
def servers(place: Place, count: int = 1, **options: Any) -> Iterator[list[Server]]:
    started: list[Server] = []
    try:
        with ThreadPoolExecutor(count) as threads:
            started += threads.map(lambda _: Server(place, **options), range(count))
        yield started
    finally:
        for one in started:
            if one.process.poll() is None:
                one.process.kill()
                one.process.communicate()


# --- requests ---------------------------------------------------------------------------------------------------


def test_a_request_is_answered_with_all_there_is_to_say(place: Place) -> None:
    with served(place.open()) as address:
        status, text = get(address, "/forecast?symbol=SP500,NASDAQ&symbol=NOBODY&keys=high,low&horizon=2")
        said = json.loads(text)
        assert status == 200
        assert set(said["forecasts"]) == {"SP500", "NASDAQ"}
        assert "no configuration is promoted" in said["refused"]["NOBODY"]
        one = said["forecasts"]["SP500"]
        (row,) = forecasts.forecasts_of(place.storage, "SP500")
        assert one["keys"]["high"]["points"] == row.content["keys"]["high"]["points"]  # to the last bit
        assert (one["digest"], one["bars"], one["configuration"]) == (row.digest, row.bars, row.configuration)
        assert (one["study"], one["trial"]) == ("SP500/naive@2026-03-19", 7)
        assert (one["cached"], one["stale"]) == ("computed", True)
        assert one["as_of"] == row.as_of.isoformat()
        assert forecast(address, "symbol=SP500&keys=high,low&horizon=2")["SP500"]["cached"] == "memory"
        assert forecast(address, "symbol=SP500&price=1")["SP500"]["price_moved"]
        status, text = get(address, "/forecast?symbol=SP500&max_age=60")
        assert (status, "too old" in text) == (404, True)
        for query, line in {
            "": "name 1 to 1000 symbols",
            "symbol=": "name 1 to 1000 symbols",
            "symbol=SP500&horizon=two": "horizon=two: expected a whole number of at least 1",
            "symbol=SP500&price=-1": "price=-1: expected a number above 0",
            "symbol=SP500&max_age=nan": "max_age=nan: expected a number of at least 0",
            "symbol=SP500,NASDAQ&price=1": "price is of a single symbol",
            "symbols=SP500": "unknown parameter 'symbols'",
        }.items():
            status, text = get(address, f"/forecast?{query}")
            assert (status, line in json.loads(text)["error"]) == (400, True), text
        assert get(address, "/forecast?symbol=SP500", "POST")[0] == 405
        assert get(address, "/forecast?symbol=SP500", "HEAD") == (200, "")
        assert get(address, "/favicon.ico") == (404, "there are /forecast, /healthz, /metrics, /\n")


def test_requests_add_up_over_two_servers(place: Place) -> None:
    with served(place.open()) as one, served(place.open()) as other:
        for address in (one, other, one):
            forecast(address)
        get(other, "/forecast?symbol=NOBODY")
        metrics(one)  # writes its own
        assert metrics(other) == metrics(one) == {"computed": 1, "stored": 1, "memory": 1, "failed": 1}


def test_health_is_told_while_a_forecast_is_computed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, begun, go_on = together.answer, threading.Event(), threading.Event()

    def stuck(*words: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return answer(*words)

    monkeypatch.setattr(together, "answer", stuck)
    with served(place.open()) as address, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(forecast, address)
        assert begun.wait(30)
        said = json.loads(get(address, "/healthz")[1])
        assert not waiting.done()
        go_on.set()
        assert waiting.result()["SP500"]["cached"] == "computed"
        assert (said["status"], said["database"], said["bars"]) == ("ok", "ok", "ok")
        assert set(json.loads(get(address, "/healthz")[1])["models"]) == {"naive"}
        place.data.rename(place.folder / "elsewhere")
        status, text = get(address, "/healthz")
        assert (status, json.loads(text)["status"]) == (503, "failed")
        assert "cannot be read" in text


def test_a_server_has_its_models_loaded_before_they_are_asked_for(place: Place) -> None:
    place.put_promoted("ALIEN", {}, model="alien")
    with servers(place) as (server,):
        deadline = time.monotonic() + 30
        while json.loads(get(server.address, "/healthz")[1])["models"] == {}:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_curl_can_ask(place: Place) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    with served(place.open()) as address:
        url = f"http://{address}/forecast?symbol=SP500&keys=high,low,close"
        said = subprocess.run(["curl", "-sf", url], capture_output=True, text=True, check=True, timeout=30).stdout
        assert set(json.loads(said)["forecasts"]["SP500"]["keys"]) == {"high", "low", "close"}


def test_who_comes_from_elsewhere_needs_the_token(place: Place) -> None:
    with served(place.open(), "0.0.0.0", TOKEN) as address:
        pages = ("/forecast?symbol=SP500", "/healthz", "/metrics", "/")
        assert [get(address, path)[0] for path in pages] == [401] * 4
        assert place.rows() == 0
        assert [get(address, path, Authorization=f"Bearer {TOKEN}")[0] for path in pages] == [200] * 4
        taken = place.invoke(cli.studies, "serve", "--port", address.rpartition(":")[2])
        assert (taken.exit_code, "Address already in use" in taken.stderr) == (1, True)
    refused = place.invoke(cli.studies, "serve", "--port", "0", "--host", "0.0.0.0")
    assert refused.exit_code == 1
    assert "lets other machines in, and whoever reaches it could read the forecasts" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_page_shows_what_was_answered(place: Place, tab: Tab) -> None:
    place.put_promoted("GONE", NAIVE, model="naive")
    place.put_promoted("QUIET", NAIVE, model="naive")
    with served(place.open()) as address:
        for _ in range(4):
            get(address, "/forecast?symbol=SP500,GONE&keys=high,low")
        tab.open(f"http://{address}/", "no GONE.csv or GONE.parquet")
        text = tab.page.inner_text("body")
        for part in ("Database: ok", "naive", "stale", "not asked for yet", "75.0 %", "2018-12-31", "high 2"):
            assert part in text, text
        tab.check()


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_answers_first(place: Place, number: int) -> None:
    found = place.open().ask(["SP500"], horizon=3)  # and long ago, so that it is not kept
    execute(place.url, "update forecasts set computed_at = now() - interval '401 days'")
    with servers(place, slow_s=1.0) as (server,), ThreadPoolExecutor(2) as thread:
        waiting = [thread.submit(forecast, server.address, f"symbol={name}") for name in ("SP500", "NASDAQ")]
        time.sleep(0.5)
        assert server.end(number).splitlines() == ["stopped"]
        assert server.process.returncode == 0
        assert {one["cached"] for each in waiting for one in each.result().values()} == {"computed"}
        assert place.rows() == 2
        assert forecasts.read_forecasts(place.storage, [found.forecasts["SP500"].digest]) == {}
        place.opened.pop().close()
        assert place.counts() == {"computed": 3}  # written at the end


def test_a_second_signal_ends_a_server_at_once(place: Place) -> None:
    with servers(place, slow_s=30.0) as (server,), ThreadPoolExecutor(1) as thread:
        lost = thread.submit(forecast, server.address)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        began = time.monotonic()
        server.end()
        assert time.monotonic() - began < 10
        assert server.process.returncode == -signal.SIGTERM
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            lost.result()


def test_a_server_waits_for_the_requests_in_progress() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(environ: Any, start_response: Any) -> list[bytes]:
        begun.set()
        assert go_on.wait(30)
        start_response("200 OK", [])
        return [b"done"]

    server = doors.bind(slow, Door(host="127.0.0.1", token=None), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(get, f"127.0.0.1:{server.server_port}", "/")
        assert begun.wait(30)
        server.shutdown()
        thread.join()
        assert not server.drain(0.05)
        go_on.set()
        assert server.drain(30)
        assert waiting.result() == (200, "done")
    server.server_close()


def test_what_a_killed_server_was_computing_is_computed_by_another(place: Place) -> None:
    with servers(place, 2, slow_s=1.0) as (one, other), ThreadPoolExecutor(4) as threads:
        lost = threads.submit(forecast, one.address)
        time.sleep(0.5)
        waiting = [threads.submit(forecast, other.address) for _ in range(2)]
        time.sleep(0.2)
        one.process.kill()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            lost.result()
        kinds = sorted(each.result()["SP500"]["cached"] for each in waiting)
        assert kinds == ["computed", "joined"]
        assert place.rows() == 1
        (row,) = forecasts.forecasts_of(place.storage, "SP500")
        alone = place.open(KRONOS_PREDICTION_CACHE_ENABLED="0").ask(["SP500"]).forecasts["SP500"]
        assert row.content["keys"]["close"]["points"] == list(alone.keys["close"].points)


def test_two_servers_compute_each_forecast_once(place: Place) -> None:
    with servers(place, 2, slow_s=0.3) as both, ThreadPoolExecutor(16) as threads:
        asked = [
            threads.submit(forecast, both[number % 2].address, f"symbol={name}&horizon={1 + number // 4}")
            for number in range(8)
            for name in ("SP500", "NASDAQ")
        ]
        found = [one for each in asked for one in each.result().values()]
        assert len({one["digest"] for one in found}) == 4
        assert sum(one["cached"] == "computed" for one in found) == 4
        assert place.rows() == 4
        for digest in {one["digest"] for one in found}:
            assert len({json.dumps(one["keys"]) for one in found if one["digest"] == digest}) == 1
        for one in both:
            one.end()
        assert sum(place.counts().values()) == 16


def test_a_database_that_restarts_costs_no_answer(
    place: Place, own_server: embedded.PrivateServer, scratch: Path
) -> None:
    create_schema(own_server.url)
    folder = own_server.passfile.parent
    stop, failed, answered = threading.Event(), [], []

    def ask(server: Server) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                answered.append(forecast(server.address, f"symbol=SP500&horizon={1 + number % 20}")["SP500"])
            except (AssertionError, OSError) as error:
                failed.append(error)

    with servers(place, 2, url=own_server.url) as both:
        threads = [threading.Thread(target=ask, args=(one,)) for one in both]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        embedded.stop(folder)
        time.sleep(1.0)
        for one in both:
            assert json.loads(get(one.address, "/healthz")[1])["status"] in ("ok", "degraded")
        embedded.start(folder)
        deadline = time.monotonic() + 30
        while any(json.loads(get(one.address, "/healthz")[1])["database"] != "ok" for one in both):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == []
        for one in both:
            one.end()
        storage = open_storage(own_server.url, wait_s=5)
        rows = {row.digest: row for row in forecasts.forecasts_of(storage, "SP500")}
        assert set(rows) == {one["digest"] for one in answered}
        for one in answered:
            assert one["keys"]["close"]["points"] == rows[one["digest"]].content["keys"]["close"]["points"]
        assert sum(forecasts.request_counts(storage).values()) == len(answered)
        storage.engine.dispose()


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_shows_forecasts_and_where_they_come_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = place.invoke(cli.studies, "forecast", "SP500", "NASDAQ", "NOBODY", "--keys", "high,low,close")
    assert ended.exit_code == 1
    lines = ended.stdout.splitlines()
    assert lines[0].split()[:5] == ["symbol", "as", "of", "key", "last"]
    assert [line.split()[:3] for line in lines[1:3]] == [["SP500", "2018-12-31", key] for key in ("high", "low")]
    assert len(lines) == 7
    said = ended.stderr
    assert "SP500: naive of SP500/naive@2026-03-19#7, configuration" in said
    assert "SP500: stale: a bar after the last of" in said
    assert said.splitlines()[-1].startswith("error: NOBODY: no configuration is promoted")
    assert place.rows() == 2

    ended = place.invoke(cli.studies, "forecast", "SP500", "--keys", "high,low,close", "--json")
    (one,) = json.loads(ended.stdout)["forecasts"]
    assert (ended.exit_code, one["cached"]) == (0, "stored")
    assert place.invoke(cli.studies, "forecast", "SP500", "--max-age", "60").exit_code == 1
    assert place.invoke(cli.studies, "forecast", "SP500", "NASDAQ", "--price", "3").exit_code == 2
    moved = place.invoke(cli.studies, "forecast", "SP500", "--price", "3")
    assert "SP500: the price has moved" in moved.stderr


def test_the_table_fits_a_terminal(place: Place) -> None:
    place.put_promoted("BTCUSD", NAIVE, model="naive")
    place.write("BTCUSD.csv", last_bars("SP500", 300))
    asked = place.open().ask(["BTCUSD", "NASDAQ"], keys=["high", "low", "close"], horizon=3)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(view.table(list(asked.forecasts.values())), 80))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for heading in ("symbol", "key", "step", "forecast", "return", "10 %", "90 %"):
        assert heading in text


def test_the_command_needs_no_database_and_makes_none(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "no-server"
    place.settings.write_text(place.settings.read_text() + f'[storage]\ndata_dir = "{folder}"\n')
    words = ["forecast", "SP500", "--config", str(place.settings)]
    ended = CliRunner().invoke(cli.studies, words)
    assert ended.exit_code == 0
    assert "no database: forecasts are kept in memory only" in ended.stderr
    assert not folder.exists()
    ended = CliRunner().invoke(cli.studies, [*words, "--storage", "postgresql://nobody@127.0.0.1:1/none"])
    assert ended.exit_code == 0
    assert "127.0.0.1:1" in ended.stderr
    assert "SP500" in ended.stdout


def test_bars_of_the_future_are_refused_by_the_command(place: Place) -> None:
    place.write("SP500.csv", daily(datetime.now(UTC) + timedelta(days=2)))
    ended = place.invoke(cli.studies, "forecast", "SP500")
    assert (ended.exit_code, ended.stdout) == (1, "")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert "begins after the time of this machine" in line
