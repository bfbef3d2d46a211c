"""Route what the endpoint answers: chat completions, models, its status, and its page."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mpcache.errors import MpcacheError
from mpcache.report.units import BYTES, DURATIONS
from mpcache_parties.endpoint.answers import Beat, Exchange
from mpcache_parties.endpoint.bodies import check_served
from mpcache_parties.endpoint.chat_like import Models
from mpcache_parties.endpoint.completions import CompletionRequest, read_request
from mpcache_parties.endpoint.conversations import ConversationPool
from mpcache_parties.endpoint.gate import Admission, Gate
from mpcache_parties.endpoint.refusals import Refusal
from mpcache_parties.endpoint.text_completions import read_text_request
from mpcache_parties.say import Say, quiet

PAGE = Path(__file__).with_name("page.html")
LARGEST_BODY = 1 << 20  # bytes
BODY_S = 20.0  # for a body to come
QUEUE = 16  # requests, unless told otherwise
IDLE_S = 900.0  # likewise
END_S = 4.0  # for conversations to end in order
PLACE = "X-Mpcache-Place"  # in the queue, when the request came

CSP = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Endpoint:
    """What answers at a client's endpoint. Its conversations are shared by all who may call it."""

    def __init__(
        self,
        models: Models,
        limit: int,
        queue: int = QUEUE,
        idle_s: float = IDLE_S,
        say: Say = quiet,
    ) -> None:
        """Hold up to `limit` conversations, opened when they are asked for.

        models: each with how a conversation with it is opened.  queue: requests that may wait.  idle_s: after
        which a conversation is closed.
        """
        self.models, self.say = tuple(models), say
        self.pool = ConversationPool(models, limit, queue, idle_s, say)
        self._exchanges: dict[str, Exchange] = {}
        self._needs_key = False

    def app(self, admission: Admission | None = None) -> ASGIApp:
        """Return the ASGI application, behind its gate."""
        admission = Admission() if admission is None else admission
        self._needs_key = admission.key is not None
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._continue, methods=["POST"]),
            Route("/v1/mpcache/status", self._status),
            Route("/v1/mpcache/stop", self._stop, methods=["POST"]),
        ]
        inner: ASGIApp = Starlette(
            routes=routes,
            exception_handlers={Refusal: _refused, HTTPException: _unrouted, Exception: _failed},
        )
        if admission.origins:
            inner = CORSMiddleware(
                inner, admission.origins, ("GET", "POST"), ("*",), expose_headers=(PLACE, "Retry-After")
            )
        return Gate(inner, admission)

    async def end(self) -> None:
        """Stop what runs and close all conversations, in seconds."""
        await self.pool.end("the endpoint ends", END_S)

    # ------------------------------------------------------------------------------------- completions

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, read_request(await _body(request), self.models))

    async def _continue(self, request: Request) -> Response:
        return await self._complete(request, read_text_request(await _body(request), self.models))

    async def _complete(self, request: Request, asked: CompletionRequest) -> Response:
        exchange = Exchange(self.pool, asked)
        self._exchanges[asked.id] = exchange
        headers = {PLACE: str(exchange.place)}
        try:
            if asked.stream:
                lines = self._lines(exchange)
                first = await anext(lines)  # what fails at once has a status of its own
                return _EventStream(exchange, first, lines, headers, self._forget)
            whole = await _unless_gone(request, self._whole(exchange))
        except BaseException as error:
            self._forget(exchange)
            if isinstance(error, MpcacheError):
                raise Refusal.of(error) from None
            raise
        self._forget(exchange)
        return Response() if whole is None else JSONResponse(whole, headers=headers)

    def _forget(self, exchange: Exchange) -> None:
        exchange.leave()
        self._exchanges.pop(exchange.request.id, None)

    async def _whole(self, exchange: Exchange) -> dict[str, Any]:
        pieces = [event async for event in exchange.events() if isinstance(event, str)]
        end = exchange.end
        return exchange.request.whole("".join(pieces), end, self._about(exchange, end.cost()))

    async def _lines(self, exchange: Exchange) -> AsyncIterator[str]:
        """Yield the lines of a stream. Raises what fails before the first of them."""
        asked, begun = exchange.request, False
        try:
            async for event in exchange.events():
                if isinstance(event, Beat) and event.place:
                    yield f": place {event.place} in the queue\n\n"
                if isinstance(event, str):
                    yield _data(asked.chunk(event, not begun))
                else:
                    yield _data(asked.chunk("", not begun, mpcache=self._about(exchange, asdict(event))))
                begun = True
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, MpcacheError | Refusal):
                logging.getLogger(__name__).error("a stream has failed", exc_info=error)
            yield _data(Refusal.of(error).to_dict())
            return
        end = exchange.end
        yield _data(asked.chunk("", not begun, end.finish, self._about(exchange, end.cost())))
        if asked.include_usage:
            yield _data(asked.usage_chunk(end))
        yield "data: [DONE]\n\n"

    def _about(self, exchange: Exchange, more: dict[str, Any]) -> dict[str, Any]:
        """Return what stands under `mpcache`: the conversation, with what it has taken."""
        if exchange.answer is None:
            return more
        conversation = exchange.answer.conversation
        return {"conversation": conversation.id, "account": asdict(conversation.chat.account)} | more

    async def _stop(self, request: Request) -> Response:
        try:
            found = json.loads(await _body(request))["id"]
            exchange = self._exchanges.get(found)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refusal(400, "id: the answer's, as its stream tells it", "id") from None
        if exchange is None:
            raise Refusal(404, "no such answer runs", "id", "not_running")
        exchange.stop()
        return JSONResponse({"stopped": True})

    # ------------------------------------------------------------------------------------- what there is

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(name) for name in self.models]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_served(name, self.models)
        return JSONResponse(_card(name))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _status(self, request: Request) -> Response:
        conversations = [
            {
                "id": each.id,
                "model": each.model,
                "busy": each.busy,
                "room": each.chat.room,
                "progress": each.chat.progress,
                "account": asdict(each.chat.account),
            }
            for each in self.pool.open
        ]
        return JSONResponse(
            {
                "models": self.models,
                "limit": self.pool.limit,
                "waiting": self.pool.waiting,
                "queue": self.pool.queue,
                "conversations": conversations,
            }
        )

    async def _page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        about = json.dumps({"models": self.models, "key": self._needs_key})
        for character in "<>&":  # a script element ends at the first "</", whatever its quotes say
            about = about.replace(character, f"\\u{ord(character):04x}")
        units = json.dumps({"bytes": BYTES, "durations": DURATIONS})
        text = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce).replace("{{units}}", units)
        text = text.replace("{{about}}", about)
        return HTMLResponse(text, headers={"Content-Security-Policy": CSP.format(nonce=nonce)})


class _EventStream(StreamingResponse):
    """A stream that lets go of its request however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, exchange: Exchange, first: str, lines: AsyncIterator[str], headers: dict[str, str], forget: Any
    ) -> None:
        super().__init__(self._all(first, lines), headers={**headers, "X-Accel-Buffering": "no"})
        self._exchange, self._lines, self._forget = exchange, lines, forget

    @staticmethod
    async def _all(first: str, lines: AsyncIterator[str]) -> AsyncIterator[str]:
        yield first
        async for line in lines:
            yield line

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._forget(self._exchange)


def _card(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "mpcache"}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _body(request: Request) -> bytes:
    """Read a JSON body within its bounds. Raises Refusal."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A form of another site could send this without asking; JSON it could not.
        raise Refusal(415, "the body must be JSON: Content-Type: application/json")
    large = Refusal(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
    told = request.headers.get("content-length", "0")
    if not told.isdigit() or int(told) > LARGEST_BODY:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise large
    except TimeoutError:
        raise Refusal(
            408, f"the body did not come within {BODY_S:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise Refusal(400, "the caller has left") from None
    return bytes(body)


async def _unless_gone(request: Request, work: Any) -> dict[str, Any] | None:
    """Return what the work gives, or None once the caller has left."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([job, gone], return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        job.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    refusal = Refusal.of(error)
    return JSONResponse(refusal.to_dict(), refusal.status, refusal.headers)


async def _unrouted(request: Request, error: Exception) -> Response:
    """Tell of a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at", 405: "this method is not for"}.get(error.status_code, error.detail)
    refusal = Refusal(error.status_code, f"{what} {request.url.path:.80}", headers=error.headers)
    return await _refused(request, refusal)


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, error)
