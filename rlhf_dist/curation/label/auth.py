"""Who may speak to the page: every request, also of the WebSocket, passes here first.

- The Host header must name this server: a foreign site that makes its own name point here (DNS rebinding) is rejected.
- Where a browser says where a request comes from (Origin), that must be this server too.
- A token, in the address once and in a cookie from then on, says which role a caller has; each role has a cookie of its own, so
  that one address does not undo the other. Tokens are compared in constant time.

Nothing that the page shows may load or send anything elsewhere (Content-Security-Policy).
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.requests import cookie_parser

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ORGANISER_PATHS = ("/report",)
# The UI library compiles its templates in the page, hence the inline scripts and eval; all of it comes from this server, and
# responses reach the page as text only.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: App, tokens: Mapping[str, str], hosts: Iterable[str], cookie: str) -> None:
        """`tokens`: role → secret, roles `annotator` and `organizer`; `hosts`: names of this server, without ports; `cookie`:
        what the names of the cookies begin with; `_annotator` or `_organizer` follows."""
        self._app = app
        self._tokens = {role: token.encode() for role, token in tokens.items()}
        self._hosts = {host.lower().strip("[]") for host in hosts}
        self._cookie = cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status, text = self._rejection(scope, headers)
        if status:
            await _refuse(scope, send, status, text)
            return
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        in_address = next((value for key, value in query if key == "token"), None)
        role = next(iter(self._roles(dict.fromkeys(self._tokens, in_address))), None)
        if role is not None and in_address is not None and scope["type"] == "http":
            await self._welcome(scope, send, role, in_address, [(key, value) for key, value in query if key != "token"])
            return
        cookies = cookie_parser(headers.get("cookie", ""))
        roles = self._roles({role: cookies.get(f"{self._cookie}_{role}") for role in self._tokens})
        if not roles:
            await _refuse(
                scope, send, 401, "This page needs the whole address that `rlhf-dist label` printed, with its token."
            )
        elif "organizer" not in roles and scope["path"].startswith(ORGANISER_PATHS):
            await _refuse(scope, send, 403, "This page is the organizer's; its address has a token of its own.")
        else:
            await self._app(scope, receive, _with_headers(send))

    def _rejection(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str]:
        host = headers.get("host", "")
        if _name_of(host) not in self._hosts:
            return 421, (
                "This server is not called so. Use an address that `rlhf-dist label` printed, or add the name to "
                "server.allowed_hosts."
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "A page of another site asked for this; that is rejected."
        return 0, ""

    def _roles(self, given: Mapping[str, str | None]) -> list[str]:
        """The roles whose token is given for them."""
        # All are compared, whichever match: the time says nothing.
        return [
            role
            for role, secret in self._tokens.items()
            if hmac.compare_digest(secret, (given[role] or "").encode("utf-8", "replace"))
        ]

    async def _welcome(self, scope: Scope, send: Send, role: str, token: str, query: list[tuple[str, str]]) -> None:
        """The token moves from the address, which histories and screenshots keep, into a cookie."""
        path = quote("/" + scope["path"].lstrip("/"))  # never //other.host
        target = f"{path}?{urlencode(query)}" if query else path
        # Lax, not Strict: a link in a mail must work; what other sites' pages send stays without the cookie.
        cookie = f"{self._cookie}_{role}={token}; Path=/; HttpOnly; SameSite=Lax"
        start = {
            "type": "http.response.start",
            "status": 303,
            "headers": [
                (b"location", target.encode("latin-1")),
                (b"set-cookie", cookie.encode("ascii")),
                (b"cache-control", b"no-store"),
                (b"referrer-policy", b"no-referrer"),
                (b"content-length", b"0"),
            ],
        }
        await send(start)
        await send({"type": "http.response.body", "body": b""})


def _name_of(host: str) -> str:
    """A Host header without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    body = (text + "\n").encode("utf-8")
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
