"""What every request passes first: host, token, size and time limits; and its count in the metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BYTES = 1 << 20  # of a request's body
MOST_SECONDS = 20.0  # for a client to send it
OPEN_PATHS = ("/", "/page.js", "/page.css", "/health")
PATHS = (*OPEN_PATHS, "/v1/embeddings", "/v1/models", "/search", "/compare", "/marks", "/metrics")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Metrics:
    """Counters of a server, in Prometheus' text format."""

    def __init__(self) -> None:
        self._all = every = CollectorRegistry()
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        self.requests = Counter("ebr_requests", "Requests by path and status.", ["path", "status"], registry=every)
        self.seconds = Histogram("ebr_request_seconds", "Seconds to answer.", ["path"], buckets=buckets, registry=every)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_texts = Histogram("ebr_batch_texts", "Texts per batch.", buckets=sizes, registry=every)
        long = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        self.reranked_seconds = Histogram(
            "ebr_reranked_search_seconds",
            "Seconds of a search that re-ranks, without waiting.",
            buckets=long,
            registry=every,
        )
        self.reranks_waiting = Gauge("ebr_waiting_reranks", "Searches that re-rank, or wait to.", registry=every)
        self.waiting = Gauge("ebr_waiting_requests", "Requests that wait for the encoder.", registry=every)

    def text(self) -> bytes:
        """All of them, as `/metrics` shows them."""
        return generate_latest(self._all)


class Guard:
    """An ASGI application around another one.

    :param token: that every request but those of the page's own files must carry.
    :param hosts: names under which the server may be reached; None for any. On this machine's own address it keeps out
        pages of the web that reach it by a name of theirs.
    """

    def __init__(self, app: App, metrics: Metrics, token: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._metrics, self._token, self._hosts = app, metrics, token, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), [500]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", ()), *_encoded(HEADERS)]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requests.labels(path, str(status[0])).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await _refuse(send, *refusal)
            return
        try:
            async with asyncio.timeout(MOST_SECONDS):
                body = await _body(receive)
        except TimeoutError:
            await _refuse(send, 408, f"the request took longer than {MOST_SECONDS:.0f} seconds to arrive")
            return
        if body is None:
            await _refuse(send, 413, f"a request may have {MOST_BYTES:,} bytes; send fewer or shorter texts")
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replayed, send)

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name not in self._hosts:
            return 421, f"host {name[:60]!r}: this server answers to {', '.join(sorted(self._hosts))}"
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self._token and scope["path"] not in OPEN_PATHS and not hmac.compare_digest(given, self._token.encode()):
            return 401, "wanted the header Authorization: Bearer and the server's token"
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0] != "application/json":
            return 415, "wanted JSON with the header Content-Type: application/json"
        return None


async def _body(receive: Receive) -> bytes | None:
    """A request's whole body; None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(body)


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": status}}


async def _refuse(send: Send, status: int, message: str) -> None:
    content = json.dumps(error_body(message, status), ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": content})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
