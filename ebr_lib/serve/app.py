"""The routes: vectors, search, the page and its judgements."""

from __future__ import annotations

import asyncio
import base64
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from ebr_lib.data.text import HALF_CHARACTER, half_character, is_blank
from ebr_lib.errors import UserError
from ebr_lib.index.after import After
from ebr_lib.index.filters import allowed_values
from ebr_lib.index.opened import Opened
from ebr_lib.index.search import after_vectors
from ebr_lib.logs import logger
from ebr_lib.names import FusionChoice
from ebr_lib.serve.engine import Batcher, BusyError, Engine, Hit, Kind, Turns, Words, embedding_file, shown
from ebr_lib.serve.guard import Metrics, error_body
from ebr_lib.serve.judgements import Judgements

HERE = Path(__file__).parent
MOST_TEXTS, MOST_LETTERS, MOST_ROWS = 256, 32_768, 100
SIDES: dict[str, Kind] = {"query": "query", "document": "document", "passage": "document", "none": "none"}
Text = Annotated[str, Field(max_length=MOST_LETTERS)]
Filter = dict[str, str | int | float | bool | list[str | int | float | bool | None] | None]


class _Body(BaseModel):
    """The body of a request; unknown fields are errors, since they would have no effect."""

    model_config = ConfigDict(extra="forbid")


class EmbeddingsRequest(_Body):
    """OpenAI's request for vectors, with the side of the texts as TEI and vLLM name it."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    input_type: str | None = None
    prompt_name: str | None = None


class SearchRequest(_Body):
    """A query, filters on kept columns, how vectors and words are fused, and whether to re-rank; see `search`."""

    query: Text
    k: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 10
    where: Filter = {}
    fusion: FusionChoice = "auto"
    bm25_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    rerank: bool = True


class MarkRequest(_Body):
    """A judgement: 1 right, 0 wrong, null takes it back."""

    query: Text
    id: Text
    grade: Literal[0, 1] | None


@dataclass(frozen=True)
class Served:
    """Everything that the routes need.

    :param systems: engines and BM25 by the name of their column on the page, in its order; "index" is what is served.
    :param text: column that the page shows; `ids` the one that judgements name.
    :param reranking: which reranker a search uses, as `after_vectors` takes it.
    """

    systems: Mapping[str, Engine | Words]
    text: str | None
    ids: str | None
    reranking: Mapping[str, Any]
    judgements: Judgements | None
    metrics: Metrics
    batcher: Batcher
    turns: Turns

    @property
    def engine(self) -> Engine:
        """The index that `/search` and `/v1/embeddings` serve."""
        engine = self.systems["index"]
        assert isinstance(engine, Engine)
        return engine


def make_app(served: Served) -> FastAPI:
    """The application, without limits and token (`Guard`)."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(served.batcher.run())
        yield
        running.cancel()
        served.turns.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_page(app)
    _add_vectors(app, served)
    _add_search(app, served)
    _add_judgements(app, served)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        engine = served.engine
        return {"status": "ok", "model": engine.label, "dimensions": engine.dim, "index": Path(engine.folder).name}

    @app.get("/metrics")
    async def metrics() -> Response:
        served.metrics.waiting.set(served.batcher.waiting)
        served.metrics.reranks_waiting.set(served.turns.waiting)
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _add_errors(app: FastAPI) -> None:
    """Every error is a sentence, in the form that OpenAI's clients read."""

    def answer(status: int, message: str) -> JSONResponse:
        return JSONResponse(error_body(message, status), status, {"retry-after": "1"} if status == 503 else None)

    @app.exception_handler(UserError)
    async def of_user(request: Request, error: UserError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return answer(503, "too many requests are waiting; try again in a second")

    @app.exception_handler(AnyHTTPException)
    async def of_route(request: Request, error: AnyHTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(f"{'.'.join(map(str, one['loc'][1:3]))}: {one['msg']}" for one in error.errors()[:3])
        return answer(422, said)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        logger.error("服务内部错误 internal error: %r", error)
        return answer(500, "internal error; the server's log has it")


def _add_page(app: FastAPI) -> None:
    def sender(name: str) -> Any:
        async def send() -> FileResponse:
            return FileResponse(HERE / name)

        return send

    for path, name in (("/", "page.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.get(path, name=name)(sender(name))


def _add_vectors(app: FastAPI, served: Served) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": served.engine.label, "object": "model", "owned_by": "ebr"}]}

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> dict[str, Any]:
        engine, texts = served.engine, [body.input] if isinstance(body.input, str) else body.input
        _check_texts(texts)
        if body.model not in (None, "", engine.label):
            raise HTTPException(404, f"model {body.model!r}: this server has {engine.label}")
        if body.dimensions not in (None, engine.dim):
            raise HTTPException(400, f"dimensions {body.dimensions}: the index has vectors of {engine.dim}")
        _, vectors = await served.batcher.vectors(engine, _kind_of(engine, body), texts)
        rows = vectors.astype("<f4")
        coded = [base64.b64encode(r.tobytes()).decode() for r in rows] if body.encoding_format == "base64" else None
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(coded or rows.tolist())]
        return {"object": "list", "model": engine.label, "data": data}


def _kind_of(engine: Engine, body: EmbeddingsRequest) -> Kind:
    """Which side the texts are of; a model with prompts, or with other weights for documents, has to be given it."""
    side = body.input_type or body.prompt_name
    if side is None and engine.sides_differ:
        raise HTTPException(
            400, "queries and documents have other vectors here: give input_type query, document, or none for no prompt"
        )
    if side is not None and side not in SIDES:
        raise HTTPException(400, f"input_type {side[:40]!r}: wanted query, document or none")
    return SIDES[side or "none"]


def _check_texts(texts: list[str]) -> None:
    if any(map(is_blank, texts)):
        raise HTTPException(400, "a text is blank; give some words")
    if half_character(texts) is not None:
        raise HTTPException(400, f"a text holds {HALF_CHARACTER}")


def _add_search(app: FastAPI, served: Served) -> None:
    async def steps(held: Opened, body: SearchRequest) -> After:
        reranking = served.reranking if body.rerank else {}
        return await asyncio.to_thread(
            after_vectors, held, body.query, body.fusion, weight=body.bm25_weight, **reranking
        )

    async def found(system: Engine | Words, body: SearchRequest) -> tuple[str, list[Any]]:
        """The order in words, and the rows."""
        where, said = allowed_values(body.where), ""
        rows: Sequence[Hit]
        if isinstance(system, Words):
            held, _ = await asyncio.to_thread(served.engine.current)
            rows = await asyncio.to_thread(system.find, held, body.query, body.k)
        else:
            held, vectors = await served.batcher.vectors(system, "query", [body.query])
            after = await steps(held, body)
            work = partial(held.find, vectors[0], body.k, where, after=after)
            rows, said = await (served.turns.run(work) if after.scores else asyncio.to_thread(work)), after.said
        return said, list(shown(rows, served.text, served.ids))

    @app.post("/search")
    async def search(body: SearchRequest) -> dict[str, Any]:
        _check_texts([body.query])
        said, rows = await found(served.engine, body)
        return {"query": body.query, "order": said or None, "results": rows}

    @app.post("/compare")
    async def compare(body: SearchRequest) -> dict[str, Any]:
        _check_texts([body.query])
        if body.where or body.fusion != "auto" or not body.rerank:
            raise HTTPException(400, "the page compares without filters, vectors alone beside all steps; use /search")
        held, _ = await asyncio.to_thread(served.engine.current)
        after = await steps(held, body)
        alone = body.model_copy(update={"fusion": "none", "rerank": False})
        wanted = [(name, system, alone) for name, system in served.systems.items()]
        if after.is_fused or after.scores:
            wanted.append(("served", served.engine, body))
        lists = await asyncio.gather(*(found(system, asked) for _, system, asked in wanted))
        titles = {name: getattr(system, "label", "BM25") for name, system, _ in wanted} | {"served": after.said}
        systems = [
            {"name": name, "title": titles[name], "results": rows}
            for (name, _, _), (_, rows) in zip(wanted, lists, strict=True)
        ]
        marks = served.judgements.of(body.query) if served.judgements else {}
        return {"query": body.query, "systems": systems, "marks": marks}


def _add_judgements(app: FastAPI, served: Served) -> None:
    def state() -> dict[str, Any]:
        if served.judgements is None:
            return {"possible": False, "queries": 0, "right": 0, "wrong": 0, "command": None}
        given = {
            "data_path": served.judgements.folder,
            "corpus_path": embedding_file(served.engine),
            "id_column": served.ids,
        }
        flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())
        command = f"python -m ebr_lib evaluate {flags}"
        return {"possible": True, **served.judgements.counts(), "command": command}

    @app.get("/marks")
    async def marks() -> dict[str, Any]:
        return state()

    @app.post("/marks")
    async def mark(body: MarkRequest) -> dict[str, Any]:
        if served.judgements is None:
            raise HTTPException(409, "this index keeps no ids, which judgements name; start serve with id_column")
        _check_texts([body.query, body.id])
        await asyncio.to_thread(served.judgements.mark, body.query, body.id, body.grade)
        return state()
