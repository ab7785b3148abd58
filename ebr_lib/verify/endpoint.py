"""A client of an embedding endpoint: OpenAI's `/v1/embeddings` and TEI's `/embed`, every answer checked."""

from __future__ import annotations

import base64
import binascii
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

import numpy as np

from ebr_lib.arrays import Vectors
from ebr_lib.errors import ModelError
from ebr_lib.model.shapes import Side
from ebr_lib.tables import shortened

MOST_BYTES = 1 << 28  # of an answer: 16 texts of 16,384 dimensions in JSON are 6 MB
BATCH = 16
OPENAI, TEI = "/v1/embeddings", "/embed"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the token and the texts to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


class _RefusedError(ModelError):
    """An answer with an error status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Endpoint:
    """An address that gives vectors.

    :param url: with or without its path.
    :param extra: more fields of every request.
    :param named: send the side's name, so that the server puts its prompt before the text.
    """

    url: str
    model_name: str
    token: str | None = None
    timeout: float = 60.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    named: bool = False

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if self.url.endswith("/v1"):
            self.url += "/embeddings"
        if not self.url.endswith(("/embeddings", TEI)):
            self.url += self._path()

    def _path(self) -> str:
        """The path that the server knows."""
        try:
            self._post(self.url + OPENAI, self._body(OPENAI, ["a"], "query"))
        except _RefusedError as error:
            if error.status in (404, 405):
                return TEI
        return OPENAI

    def __call__(self, side: Side, texts: Sequence[str]) -> Vectors:
        """Vectors (texts × dimensions).

        :raises ModelError: says what came instead.
        """
        batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        rows = [row for batch in batches for row in self._rows(batch, side)]
        if len({len(row) for row in rows}) != 1:
            raise ModelError(f"{self.url} gives vectors of several dimensions; serve one embedding model there")
        return np.array(rows, np.float32)

    def _rows(self, texts: Sequence[str], side: Side) -> list[Any]:
        answer = self._post(self.url, self._body(self.url, texts, side))
        try:
            rows = answer
            if isinstance(answer, dict):
                rows = [entry["embedding"] for entry in sorted(answer["data"], key=lambda entry: entry["index"])]
            rows = [_decoded(row) for row in rows]
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise ModelError(f"{self.url} answers with JSON that holds no vectors: {_start_of(answer)}") from error
        if len(rows) != len(texts):
            raise ModelError(f"{self.url} gives {len(rows)} vectors for {len(texts)} texts; serve one vector per text")
        return rows

    def _body(self, path: str, texts: Sequence[str], side: Side) -> dict[str, Any]:
        by_name: dict[str, str] = {"prompt_name": side} if self.named else {}
        if path.endswith(TEI):
            return {"inputs": list(texts), **by_name, **self.extra}
        if self.named:
            by_name["input_type"] = side
        return {"model": self.model_name, "input": list(texts), "encoding_format": "float", **by_name, **self.extra}

    def _post(self, url: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)  # noqa: S310 # the config takes http and https only
        try:
            with _opener.open(request, timeout=self.timeout) as answer:
                kind, content = answer.headers.get_content_type(), answer.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            raise _refused(url, error) from error
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ModelError(
                f"{url} cannot be reached ({reason}); is the server up, and is this its address?"
            ) from error
        return _json_in(url, kind, content)


def served_name(url: str, token: str | None, timeout: float, wanted: str) -> str | None:
    """The wanted name, if a server lists it, or that of the only model; None if it lists none.

    :raises ModelError: several other models are served.
    """
    place = url.rstrip("/").removesuffix(OPENAI).removesuffix("/v1").removesuffix(TEI)
    client = Endpoint(f"{place}{OPENAI}", "", token, timeout)
    try:
        answer = client._post(f"{place}/v1/models", None)
        names = list(dict.fromkeys(str(model["id"]) for model in answer["data"]))
    except (ModelError, KeyError, TypeError):
        return None
    if wanted in names:
        return wanted
    if len(names) > 1:
        raise ModelError(f"{place} serves several models ({', '.join(names)}), none named {wanted}; give served_name")
    return names[0] if names else None


def _decoded(row: Any) -> list[float]:
    """A vector as numbers, also if a server sends base64 in any case."""
    if isinstance(row, str):
        return [float(x) for x in np.frombuffer(base64.b64decode(row, validate=True), np.float32)]
    return [float(x) for x in row]


def _json_in(url: str, kind: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        text = content[:200].decode(errors="replace")
        if kind == "text/html" or text.lstrip().startswith("<"):
            raise ModelError(
                f"{url} answers with an HTML page ({_start_of(text)}); give the address of its embedding endpoint"
            ) from error
        raise ModelError(f"{url} answers with {kind} that is not JSON: {_start_of(text)}") from error


def _refused(url: str, error: urllib.error.HTTPError) -> _RefusedError:
    said = _start_of(error.read(2000).decode(errors="replace"))
    advice = {
        401: "; give the token in token_file",
        403: "; give the token in token_file",
        404: "; check the path of the address, and served_name",
    }.get(error.code, "")
    if 300 <= error.code < 400:
        advice = f"; it points to {error.headers.get('Location')}: give that address"
    return _RefusedError(f"{url} answers {error.code} ({said or error.reason}){advice}", error.code)


def _start_of(answer: Any) -> str:
    return shortened(" ".join(str(answer).split()), 120)
