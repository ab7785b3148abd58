"""Entry point: serve an index on this machine until it is stopped."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import ConfigError
from ebr_lib.extras import require
from ebr_lib.files import read_token
from ebr_lib.index.milvus import MilvusIndex
from ebr_lib.index.search import after_vectors
from ebr_lib.logs import logger
from ebr_lib.model.bases import look_for_models
from ebr_lib.serve.config import ServeConfig

if TYPE_CHECKING:
    import uvicorn

    from ebr_lib.serve.app import Served

GRACE = 30  # seconds for requests in progress when the server is stopped
MOST_CONNECTIONS = 1024


@dataclass(frozen=True)
class Running:
    """A server that listens; `server.run(sockets=[listening])` answers until `server.should_exit`."""

    server: uvicorn.Server
    listening: socket.socket
    url: str


def serve_index(config: ServeConfig | Mapping[str, Any] | None = None) -> None:
    """Serve an index until Ctrl-C or SIGTERM, and finish the requests in progress.

    :param config: a ServeConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed), the port is taken, another server writes
        the same judgements, or everyone could reach it without a token.
    :raises MissingError: there is no index.
    :raises ModelError: an index's model does not load, or is another one now; the reranker that is named does not load.
    :raises DataError: the index does not keep a column that is named.
    :raises NotInstalledError: the packages of the extra are missing.
    """
    with listening(ServeConfig.resolve(config)) as running:
        logger.info("服务已启动，浏览器打开 serving, open in a browser: %s", running.url)
        with _stopped_quietly():
            running.server.run(sockets=[running.listening])
    logger.info("服务已停止 stopped")


@contextmanager
def listening(config: ServeConfig) -> Iterator[Running]:
    """Load what is served, and listen; see `serve_index` for the errors."""
    require("serve")
    require("index")
    import uvicorn

    from ebr_lib.serve.app import make_app
    from ebr_lib.serve.guard import Guard

    token = read_token(config.token_file)
    if not config.is_local and token is None:
        raise ConfigError(f"host {config.host}: others could search and judge; give a token_file as well")
    look_for_models(config.base_model_path, config.hub)
    with _listening_at(config.host, config.port) as found:
        served = _served(config)
        hosts = frozenset({"127.0.0.1", "localhost", "[::1]"}) if config.is_local else None
        app = Guard(make_app(served), served.metrics, token, hosts)
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=GRACE,
        )
        address = found.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        try:
            yield Running(uvicorn.Server(settings), found, f"http://{host}:{address[1]}")
        finally:
            if served.judgements is not None:
                served.judgements.close()


@contextmanager
def _listening_at(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port} ({error.strerror}); give another port or host"
        ) from error
    with contextlib.closing(found):
        yield found


def _served(config: ServeConfig) -> Served:
    """Load the indexes, BM25 and the judgements."""
    from ebr_lib.serve.app import Served
    from ebr_lib.serve.engine import Batcher, Engine, Turns, Words, need_column, shown_column
    from ebr_lib.serve.guard import Metrics
    from ebr_lib.serve.judgements import Judgements

    knobs: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "on_changed_vectors": config.on_changed_vectors,
    }
    engine = Engine(config.index_dir, config.model_name, knobs | {"query_prompt": config.query_prompt})
    ids = config.id_column or engine.current()[0].manifest.get("id_column")
    text = shown_column(engine, config.text_column, ids)
    systems: dict[str, Engine | Words] = {}
    if config.base_index_dir is not None:
        base = systems["base"] = Engine(config.base_index_dir, None, knobs)
        for name in filter(None, (ids, text)):
            need_column(base, name, "base_index_dir")
    systems["index"] = engine
    if ids is not None:
        need_column(engine, ids, "id_column")
    if isinstance(engine.current()[0], MilvusIndex):
        logger.info("索引在 Milvus 中，页面不显示 BM25: the page shows no BM25 beside an index in Milvus")
    elif config.bm25 and text is not None:
        systems["bm25"] = Words(engine, text)
    reranking: dict[str, Any] = {
        "reranker": config.reranker_name,
        "depth": config.rerank_depth,
        "trust_remote_code": config.trust_remote_code,
    }
    after = after_vectors(engine.current()[0], "", **reranking)
    if after.said:
        logger.info("检索排序 searches: %s%s", after.said, f" ({after.why})" if after.why else "")
    if ids is None:
        logger.warning("未指定 ID 列，页面不能标注 nothing can be judged: no id_column; give one that the index keeps")
    metrics = Metrics()
    return Served(
        systems=systems,
        text=text,
        ids=ids,
        reranking=reranking,
        judgements=Judgements(config.judgements_dir) if ids is not None else None,
        metrics=metrics,
        batcher=Batcher(metrics.batch_texts.observe),
        turns=Turns(metrics.reranked_seconds.observe),
    )


@contextmanager
def _stopped_quietly() -> Iterator[None]:
    """Keep uvicorn, which raises a signal again once it has stopped, from ending the process by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
