"""Who is let into the dashboard: other sites, other machines, a browser with the token."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from pathlib import Path

from browser import Tab
from places import StudyPlace as Place
from served import served

from launch import cli
from studies.study import Study

TOKEN = "correct-horse-battery"


def ask(address: str, method: str, path: str, **headers: str) -> tuple[int, str, Mapping[str, str]]:
    """Status, text and headers of one answer; a redirection is not followed."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=b"{}" if method == "POST" else None, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def test_other_sites_cannot_read_or_delete_studies(place: Place, folder: Path, study: Study) -> None:
    path = f"/api/studies/{study.study_id}"
    with served(place, folder) as address:
        own, port = address.removeprefix("http://"), address.rsplit(":", 1)[1]
        rebound = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
        cross_site = {"Host": own, "Origin": "http://evil.example", "Sec_Fetch_Site": "cross-site"}
        malformed = [{"Host": ""}, {"Host": "["}, {"Host": f"{own},evil.example"}, {"Host": "127.0.0.1.evil.example"}]
        for method in ("GET", "POST", "DELETE"):
            for headers in (rebound, cross_site, {"Host": own, "Origin": "null"}, *malformed):
                status, line, _ = ask(address, method, path, **headers)
                assert (status, line.count("\n")) == (403, 1), (method, headers)
                assert line.startswith(("Host is", "Origin is"))
        assert ask(address, "GET", path, Host="0.0.0.0")[0] == 403
        assert ask(address, "GET", path, Host="192.0.2.1")[0] == 403
        for host in (own, "LocalHost", "localhost:9999", f"[::1]:{port}"):  # other ports are a tunnel's
            assert ask(address, "GET", path, Host=host, Origin=f"http://{host}")[0] == 200
        # Behind a proxy that passes our Host, the browser vouches for the page.
        proxied = {"Host": own, "Origin": "https://studies.example", "Sec_Fetch_Site": "same-origin"}
        assert ask(address, "DELETE", path, **proxied)[0] == 204


def test_a_token_is_asked_for_once(place: Place, folder: Path) -> None:
    with served(place, folder, host="0.0.0.0", token=TOKEN) as served_at:
        address = served_at.replace("0.0.0.0", "127.0.0.1")
        page = "/api/studies"
        for wrong in (page, f"{page}?token=", f"{page}?token={TOKEN}x"):
            status, line, headers = ask(address, "GET", wrong)
            assert (status, line.count("\n"), "Set-Cookie" in headers) == (401, 1, False)
        for wrong in ("Bearer", f"Basic {TOKEN}", "Bearer b\xe4d"):
            assert ask(address, "GET", page, Authorization=wrong)[0] == 401
        assert ask(address, "GET", page, Cookie=f"studies-{address.rsplit(':', 1)[1]}={TOKEN}")[0] == 401
        assert ask(address, "POST", f"{page}?token={TOKEN}")[0] == 401

        status, _, headers = ask(address, "GET", f"//evil.example/?token={TOKEN}&a=b")
        assert (status, headers["Location"]) == (303, "/evil.example/?a=b")
        cookie, *attributes = headers["Set-Cookie"].split("; ")
        assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Strict"}
        assert TOKEN not in cookie
        status, _, headers = ask(address, "GET", page, Authorization=f"Bearer {TOKEN}")
        assert (status, headers["Set-Cookie"].split("; ")[0]) == (200, cookie)
        assert ask(address, "GET", page, Cookie=f"other=1; {cookie}")[0] == 200

        # Others reach it by an address or this machine's name, and still not by another site's name.
        assert ask(address, "GET", page, Cookie=cookie, Host="192.0.2.1:80")[0] == 200
        assert ask(address, "GET", page, Cookie=cookie, Host=socket.gethostname())[0] == 200
        assert ask(address, "GET", page, Cookie=cookie, Host="evil.example")[0] == 403
        assert ask(address, "DELETE", f"{page}/1", Cookie=cookie, Origin="http://evil.example")[0] == 403


def test_a_browser_with_the_token_may_delete_a_study(place: Place, folder: Path, study: Study, tab: Tab) -> None:
    with served(place, folder, token=TOKEN) as address:
        tab.open(f"{address}/?token={TOKEN}", study.name)
        assert TOKEN not in tab.page.url
        tab.open(f"{address}/dashboard", study.name)
        tab.check()
        delete = "async path => (await fetch(path, {method: 'DELETE'})).status"
        assert tab.page.evaluate(delete, f"/api/studies/{study.study_id}") == 204
        assert place.storage.get_all_studies() == []


def test_nobody_is_let_in_without_a_token_from_elsewhere(place: Place, tmp_path: Path) -> None:
    bad = tmp_path / "token"
    bad.write_text("short\n")
    for words, said in (
        (("--host", "0.0.0.0"), "no login"),
        (("--host", ""), "no login"),
        (("--token-file", str(bad)), "at least 16"),
        (("--token-file", str(tmp_path / "absent")), "No such file"),
    ):
        refused = place.invoke(cli.studies, "dashboard", "--port", "0", *words)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert len(refused.stderr.splitlines()) == 1
        assert said in refused.stderr
        assert "--token-file FILE" in refused.stderr or "openssl rand" in refused.stderr
