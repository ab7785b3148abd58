"""Load a server with a fixed number of requests per second, beside the server that a user would write; prints Markdown.

    python benchmarks/serve.py                    # 50, 100 and 200 requests per second, 15 seconds each
    python benchmarks/serve.py --quick            # 20 per second, 2 seconds

Clients are bounded: at most 64 requests are on their way, each over a connection that stays open. A request's time
starts when it is due, not when a client is free to send it, so that waiting counts. The other server is FastAPI with
sentence-transformers' `encode` and Faiss, a thread per request, as tutorials show it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from contest import machine
from index import QUERIES, write_vectors

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from a checkout

CLIENTS, WAIT = 64, 30.0  # requests on their way at most; seconds after which one counts as lost
ROWS = 10_000
PLAIN = """
import sys
import faiss
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

model, index, app = SentenceTransformer(sys.argv[2], device="cpu"), faiss.read_index(sys.argv[3]), FastAPI()


class Query(BaseModel):
    query: str
    k: int = 10


@app.get("/health")
def health():
    return {}


@app.post("/search")
def search(body: Query):
    vector = model.encode([body.query], normalize_embeddings=True, show_progress_bar=False)
    scores, rows = index.search(vector, body.k)
    return {"results": [{"score": float(s), "row": int(r)} for s, r in zip(scores[0], rows[0])]}


uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
"""


class Connection:
    """One open connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def post(self, path: str, body: bytes) -> int:
        """The status of an answer, which is read to its end."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        self.writer.write(f"{head}\r\n\r\n".encode() + body)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.split("content-length:")[1].split("\r\n")[0])
        await self.reader.readexactly(length)
        return int(answer.split()[1])


async def load(port: int, rate: float, seconds: float) -> tuple[list[float], int, float]:
    """Milliseconds of the answered requests, how many were lost, and answers per second."""
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(CLIENTS):
        free.put_nowait(Connection(port))
    times, lost, texts = [], 0, cycle(QUERIES)
    start = time.perf_counter()

    async def one(due: float, body: bytes) -> None:
        nonlocal lost
        connection = await free.get()
        try:
            async with asyncio.timeout(WAIT):
                status = await connection.post("/search", body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            status, connection = 0, Connection(port)
        free.put_nowait(connection)
        if status == 200:
            times.append(1000 * (time.perf_counter() - due))
        else:
            lost += 1

    jobs = []
    for number in range(int(rate * seconds)):
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        jobs.append(asyncio.create_task(one(due, json.dumps({"query": f"{next(texts)} {number}", "k": 10}).encode())))
    await asyncio.gather(*jobs)
    return times, lost, len(times) / (time.perf_counter() - start)


def started(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    import urllib.request

    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    server.kill()
    raise SystemExit(f"the server did not start: {' '.join(command)}")


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def measured(name: str, command: list[str], port: int, rates: list[float], seconds: float) -> None:
    """Print a row per rate."""
    server = started(command, port)
    try:
        asyncio.run(load(port, min(rates), 1.0))  # the first requests load what is loaded on demand
        for rate in rates:
            times, lost, done = asyncio.run(load(port, rate, seconds))
            shown = [f"{x:.0f}" for x in np.percentile(times, [50, 95, 99])] if times else ["–"] * 3
            print(f"| {name} | {rate:.0f} | {done:.0f} | {' | '.join(shown)} | {lost} |", flush=True)
    finally:
        server.terminate()
        server.wait()


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    from ebr_lib.index.run import build_faiss_index
    from ebr_lib.model.packaged import packaged_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seconds", type=float, default=15)
    given = parser.parse_args(words)
    rates, seconds, rows = ([20.0], 2.0, 1000) if given.quick else (given.rates, given.seconds, ROWS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(rows, folder / "e.txt")
        build_faiss_index({
            "embedding_path": str(folder / "e.txt"), "output_dir": str(folder / "index"), "id_column": "id",
            "measure_queries": 100,
        })  # fmt: skip
        (folder / "plain.py").write_text(PLAIN, encoding="utf-8")
        print(f"{machine()}; MiniLM, {rows:,} rows × 384, Flat, k = 10; {seconds:.0f} s per rate\n")
        print("| server | requests/s asked | answered/s | p50 ms | p95 ms | p99 ms | lost |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        ports = free_port(), free_port()
        ours = [sys.executable, "-m", "ebr_lib", "serve", "--index_dir", str(folder / "index"), "--bm25", "false"]
        ours += ["--port", str(ports[0]), "--judgements_dir", str(folder / "judgements")]
        plain = [sys.executable, str(folder / "plain.py"), str(ports[1]), str(packaged_model())]
        plain += [str(folder / "index" / "index.faiss")]
        measured("`ebr_lib serve`", ours, ports[0], rates, seconds)
        measured("FastAPI + `encode`", plain, ports[1], rates, seconds)


if __name__ == "__main__":
    main()
