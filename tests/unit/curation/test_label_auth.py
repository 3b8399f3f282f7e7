"""Who gets past the gate of the labeling page, asked as a client would, without a browser's help."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlhf_dist.curation.label.auth import Gate

TOKENS = {"annotator": "t" * 32, "organizer": "o" * 32}
COOKIE = {"cookie": f"label_annotator={TOKENS['annotator']}"}


def ask(
    path: str = "/", headers: dict[str, str] | None = None, query: str = "", kind: str = "http"
) -> tuple[int, dict[str, str], list[str]]:
    """(status, headers, scope types that reached the page); a rejected WebSocket has status 1008."""
    reached: list[str] = []
    sent: list[Any] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-page", b"1")]})

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    all_headers = {"host": "127.0.0.1:8400"} | (headers or {})
    scope = {
        "type": kind,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items()],
    }
    gate = Gate(page, TOKENS, ["127.0.0.1", "localhost", "::1"], "label")
    asyncio.run(gate(scope, receive, send))
    first = sent[0]
    found = {name.decode(): value.decode() for name, value in first.get("headers", [])}
    return first.get("status", first.get("code")), found, reached


def test_the_token_moves_from_the_address_into_a_cookie():
    status, headers, reached = ask("/label", query=f"name=A+b&token={TOKENS['annotator']}")
    assert (status, reached) == (303, [])
    assert headers["location"] == "/label?name=A+b"
    assert headers["set-cookie"] == f"label_annotator={TOKENS['annotator']}; Path=/; HttpOnly; SameSite=Lax"
    status, headers, reached = ask("/label", COOKIE)
    assert (status, reached) == (200, ["http"])
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-page"] == "1"


def test_a_redirect_stays_here():
    assert ask("//evil.example/x", query=f"token={TOKENS['annotator']}")[1]["location"] == "/evil.example/x"
    assert "\n" not in ask("/a\nset-cookie: x", query=f"token={TOKENS['annotator']}")[1]["location"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"cookie": "label_annotator=" + "x" * 32},
        {"cookie": "label_annotator="},
        {"cookie": f"other={TOKENS['annotator']}"},
        {"cookie": f"label_organizer={TOKENS['annotator']}"},
        {"cookie": f"label_annotator={TOKENS['annotator'][:-1]}"},
        {"cookie": "label_annotator=é"},
    ],
)
def test_without_the_token_nothing_is_reached(kind: str, headers: dict[str, str]):
    status, _, reached = ask("/_nicegui_ws/socket.io/", headers, kind=kind)
    assert (status, reached) == (401 if kind == "http" else 1008, [])
    assert ask(query="token=wrong")[0] == 401


def test_a_cookie_of_another_server_on_this_machine_is_in_nobodys_way():
    cookies = f'session={{"a": [1, 2]}}; label_annotator={TOKENS["annotator"]}; b="c"'
    assert ask(headers={"cookie": cookies})[0] == 200


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "host", ["evil.example:8400", "evil.example", "", "127.0.0.1.evil.example", "[::2]:8400", "[bad"]
)
def test_a_foreign_name_for_this_server_is_rejected_even_with_the_cookie(kind: str, host: str):
    status, _, reached = ask("/", COOKIE | {"host": host}, kind=kind)
    assert (status, reached) == (421 if kind == "http" else 1008, [])


@pytest.mark.parametrize("host", ["127.0.0.1:8400", "LOCALHOST:9000", "localhost", "[::1]:8400"])
def test_its_own_names_are_fine_also_through_a_tunnel(host: str):
    assert ask("/", COOKIE | {"host": host})[0] == 200
    assert ask("/", COOKIE | {"host": host, "origin": f"http://{host}"}, kind="websocket")[2] == ["websocket"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://localhost:8400"])
def test_pages_of_other_origins_are_rejected(origin: str):
    for kind, status in (("http", 403), ("websocket", 1008)):
        found = ask("/", COOKIE | {"origin": origin}, kind=kind)
        assert (found[0], found[2]) == (status, [])


def test_the_report_is_the_organizers():
    assert ask("/report", COOKIE)[0] == 403
    organizer = {"cookie": f"label_organizer={TOKENS['organizer']}"}
    assert ask("/report", organizer)[2] == ["http"]
    assert ask("/label", organizer)[2] == ["http"]
    assert ask("/report", query=f"token={TOKENS['organizer']}")[1]["location"] == "/report"


def test_an_organizer_who_opens_the_annotators_address_too_stays_organizer():
    cookies = [ask(query=f"token={TOKENS[role]}")[1]["set-cookie"].partition(";")[0] for role in TOKENS]
    assert len({cookie.partition("=")[0] for cookie in cookies}) == 2  # a browser keeps both
    for both in (cookies, cookies[::-1]):
        assert ask("/report", {"cookie": "; ".join(both)})[0] == 200
