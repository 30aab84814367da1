"""The OpenAI-compatible endpoint: /v1/models, /v1/chat/completions, /health and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vlmsft.data.records import Turn
from vlmsft.generation.generate import Answer, Prompt, Sampling
from vlmsft.generation.version import engine_version
from vlmsft.serving.api_error import AUTHENTICATION, ApiError, internal, invalid
from vlmsft.serving.images import MIB, ImageLimits, load_images
from vlmsft.serving.metrics import Metrics
from vlmsft.serving.scheduler import CLIENT_LEFT, Generates, Job, Scheduler
from vlmsft.serving.schema import ChatRequest, Defaults, parse

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the server allows.

    model_name: what clients call the model
    max_model_len: tokens of a prompt and its answer together
    max_num_seqs, max_waiting, gather_seconds: see Scheduler
    body_timeout_seconds: for a request's body to arrive
    api_key: what clients must send as their bearer token; None = nothing
    """

    model_name: str
    max_model_len: int
    max_num_seqs: int
    max_waiting: int
    gather_seconds: float
    max_body_bytes: int
    body_timeout_seconds: float
    images: ImageLimits
    defaults: Defaults
    api_key: str | None


CountTokens = Callable[[Sequence[Turn]], int]
"""Text tokens of a prompt, one for each image among them. Called in several threads at once."""


def create_app(generator: Generates, count_tokens: CountTokens, settings: Settings) -> FastAPI:
    """The application; the end of its lifespan ends the thread that generates."""
    server = ChatServer(generator, count_tokens, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.scheduler.close)

    app = FastAPI(title="vlmsft", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_bug)
    protected = [Depends(server.check_key)]
    app.add_api_route("/v1/models", server.models, methods=["GET"], dependencies=protected)
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"], dependencies=protected)
    app.add_api_route(
        "/v1/chat/completions", server.chat, methods=["POST"], dependencies=protected, response_model=None
    )
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"])
    return app


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)


async def _answer_bug(_: Request, error: Exception) -> Response:
    return JSONResponse(internal().body, 500)  # uvicorn logs the traceback


class ChatServer:
    """The endpoints."""

    def __init__(self, generator: Generates, count_tokens: CountTokens, settings: Settings):
        self.count_tokens, self.settings = count_tokens, settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.scheduler = Scheduler(
            generator, settings.max_num_seqs, settings.max_waiting, settings.gather_seconds, self.metrics
        )

    async def check_key(self, request: Request) -> None:
        """401 unless the request carries the server's key, if it has one."""
        if self.settings.api_key is None:
            return
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {self.settings.api_key}"
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            message = "this server wants its API key: Authorization: Bearer <key>"
            raise ApiError(401, message, code="invalid_api_key", kind=AUTHENTICATION)

    async def health(self) -> Response:
        """200 while answers can be generated."""
        return Response(status_code=200 if self.scheduler.is_alive else 503)

    async def show_metrics(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model_card()

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "vlmsft",
            "max_model_len": self.settings.max_model_len,
            "engine_version": engine_version(),
            "transformers_version": version("transformers"),
        }

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            message = f"no model {name!r} here; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, request: Request) -> Response:
        with contextlib.ExitStack() as at_the_end:
            record = at_the_end.enter_context(self._record())
            try:
                at_the_end.enter_context(self.scheduler.admit())
                response = await self._chat(request, at_the_end)
            except ClientDisconnect:  # before all of the request had come
                response = Response(status_code=CLIENT_LEFT)
            except ApiError as error:
                record.status = error.status
                raise
            record.status = response.status_code
            if isinstance(response, EventStream):
                record.job = response.job
                response.at_the_end = at_the_end.pop_all()
            return response

    @contextlib.contextmanager
    def _record(self):
        record, start = _Record(), time.monotonic()
        try:
            yield record
        finally:
            status = record.status if record.job is None else record.job.status
            self.metrics.requests.labels(str(status)).inc()
            self.metrics.request_seconds.observe(time.monotonic() - start)

    async def _chat(self, request: Request, at_the_end: contextlib.ExitStack) -> Response:
        chat = parse(await self._body(request), self.settings.defaults)
        self._check_model(chat.model)
        images = await load_images(chat.image_urls, self.settings.images)
        num_prompt_tokens = await asyncio.to_thread(self.count_tokens, chat.turns)
        sampling = Sampling(
            max_new_tokens=self._max_tokens(chat, num_prompt_tokens),
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=secrets.randbits(63) if chat.seed is None else chat.seed,
            stop=chat.stop,
        )
        job = Job(Prompt(chat.turns, tuple(images)), sampling, num_prompt_tokens)
        at_the_end.callback(job.cancel)
        self.metrics.prompt_tokens.inc(num_prompt_tokens)
        self.scheduler.submit(job)
        reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.settings.model_name, job)
        try:
            if not chat.stream:
                return _json(await _unless_left(request, reply.whole()))
            first = await _unless_left(request, job.event())
        except _ClientLeft:
            return Response(status_code=CLIENT_LEFT)
        return EventStream(job, reply.chunks(first, chat.include_usage))

    async def _body(self, request: Request) -> bytes:
        limit = self.settings.max_body_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _body_too_large(limit)
        try:
            return await asyncio.wait_for(_read_body(request, limit), self.settings.body_timeout_seconds)
        except (asyncio.TimeoutError, TimeoutError):  # one and the same from Python 3.11 on
            raise ApiError(408, "the request's body did not arrive in time") from None

    def _max_tokens(self, chat: ChatRequest, num_prompt_tokens: int) -> int:
        limit = self.settings.max_model_len
        room = limit - num_prompt_tokens
        if room < 1 or (chat.max_tokens is not None and chat.max_tokens > room):
            answer = f" and {chat.max_tokens} of the answer" if chat.max_tokens is not None else ""
            message = f"the prompt's {num_prompt_tokens} tokens{answer} don't fit into this server's {limit} tokens"
            where = "messages" if room < 1 else "max_tokens"
            raise invalid(message, where, "context_length_exceeded")
        return room if chat.max_tokens is None else chat.max_tokens


@dataclass
class _Record:
    """job: of a stream, whose end says more than the status that was sent before it."""

    status: int = 500
    job: Job | None = None


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _body_too_large(limit)
    return bytes(body)


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than this server's {limit / MIB:g} MiB", code="request_too_large")


class _ClientLeft(Exception):
    pass


async def _unless_left(request: Request, answer: Awaitable[T]) -> T:
    """The answer. Raises _ClientLeft if the client goes before it is there."""
    waiting = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise _ClientLeft
    finally:
        waiting.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Reply:
    """An answer in OpenAI's shapes."""

    def __init__(self, name: str, created: int, model_name: str, job: Job):
        self.name, self.created, self.model_name, self.job = name, created, model_name, job

    async def whole(self) -> dict[str, Any]:
        """A chat.completion."""
        text: list[str] = []
        while isinstance(event := await self.job.event(), str):
            text.append(event)
        message = {"role": "assistant", "content": "".join(text), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(event)}

    async def chunks(self, event: str | Answer, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events of chat.completion.chunk, `event` first; an error ends them, in place of a chunk."""
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if include_usage else {})}
        yield _sse({**head, "choices": [_choice({"role": "assistant", "content": ""})]})
        try:
            while isinstance(event, str):
                yield _sse({**head, "choices": [_choice({"content": event})]})
                event = await self.job.event()
            yield _sse({**head, "choices": [_choice({}, event.finish_reason)]})
            if include_usage:
                yield _sse({**head, "choices": [], "usage": self._usage(event)})
        except ApiError as error:  # the status went out long ago
            yield _sse(error.body)
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model_name}

    def _usage(self, answer: Answer) -> dict[str, int]:
        num_prompt = self.job.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": answer.num_tokens,
            "total_tokens": num_prompt + answer.num_tokens,
        }


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {_dumps(data)}\n\n"


LINE_ENDS = {character: f"\\u{character:04x}" for character in (0x85, 0x2028, 0x2029)}
"""Clients that split an event stream as Python's str.splitlines does would break a line at these."""


def _dumps(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False).translate(LINE_ENDS)


def _json(data: dict[str, Any]) -> Response:
    return Response(_dumps(data), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events, and what is to be undone once they are sent or the client has left."""

    at_the_end: contextlib.ExitStack

    def __init__(self, job: Job, events: AsyncIterator[str]):
        self.job = job
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.at_the_end:
            await super().__call__(scope, receive, send)
