"""A small local endpoint for tests: answers as OpenAI's and TEI's servers do, or with whatever a test gives it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str, bytes]
"""Status, content type, body."""


def as_json(value: Any, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode()


def vectors_answer(path: str, vectors: Any) -> Answer:
    """Vectors as the API of a path gives them; OpenAI's in reversed order, which their index undoes."""
    rows = [[float(x) for x in row] for row in vectors]
    if path == "/embed":
        return as_json(rows)
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    return as_json({"object": "list", "data": data[::-1]})


@contextmanager
def serving(answer: Callable[[str, dict[str, Any], Any], Answer]) -> Iterator[str]:
    """Serve `answer(path, body, headers)` on a free port; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(answer(self.path, body, self.headers))

        def do_GET(self) -> None:
            self._send(answer(self.path, {}, self.headers))

        def _send(self, found: Answer) -> None:
            status, kind, content = found
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:9/login")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
