"""HTTP around the scheduler: who may ask, how a body is read, how answers and events are sent."""

import asyncio
import contextlib
import functools
import ipaddress
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from smallgpt.completions import Reply, RequestError, to_json
from smallgpt.jobs import End, Event, Request
from smallgpt.scheduler import DrainingError, QueueFullError, Scheduler

BODY_TIME = 30  # seconds for a request's body to arrive


class HostCheck:
    """Answers 421 to a Host header that is no IP address, not localhost and not one of `names`; "*" allows all.

    A web page that rebinds its own name to this machine's address comes with that name.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        hosts = [value for name, value in scope.get("headers", []) if name == b"host"]
        if scope["type"] != "http" or (len(hosts) == 1 and self._allowed(hosts[0].decode("latin-1"))):
            await self.app(scope, receive, send)
            return
        message = "the Host header names another host; allow it with --allowed-host NAME"
        await error_response(RequestError(message, status=421 if len(hosts) == 1 else 400))(scope, receive, send)

    def _allowed(self, host: str) -> bool:
        if "*" in self.names:
            return True
        name = re.sub(r":\d*$", "", host.lower())
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
        return name in self.names


class Events:
    """The events of one request, as they come; when the client goes away the request is cancelled.

    Iterating over them ends with a RequestError when the request failed.
    """

    def __init__(self, http: HttpRequest) -> None:
        self._receive, self._loop = http.receive, asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Event]] = asyncio.Queue()

    def deliver(self, events: list[Event]) -> None:
        """Called in the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, events)

    def submit(self, scheduler: Scheduler, request: Request) -> None:
        """Hand the request over. Raises RequestError with 429 or 503 when it is not taken."""
        try:
            scheduler.submit(request)
        except QueueFullError as error:
            raise RequestError(f"{error}; try again later", status=429, code="queue_full") from None
        except DrainingError as error:
            raise RequestError(str(error), status=503, code="stopping") from None
        self._cancel = functools.partial(scheduler.cancel, request)
        self._watch = asyncio.create_task(self._disconnect())

    async def _disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    async def __aiter__(self) -> AsyncGenerator[list[Event], None]:
        try:
            while True:
                events = await self._queue.get()
                yield events
                if isinstance(events[-1], End):
                    _check(events[-1])
                    return
        finally:
            self._watch.cancel()
            self._cancel()


def _check(end: End) -> None:
    """Raise RequestError when the request failed."""
    if isinstance(end.error, DrainingError):
        raise RequestError(str(end.error), status=503, code="stopping")
    if isinstance(end.error, ValueError):
        raise RequestError(str(end.error))
    if end.error is not None:
        raise RequestError("the model failed; the server's log says more", status=500)


async def chunks(reply: Reply, events: Events) -> AsyncGenerator[bytes, None]:
    """Server-sent events: the chunks of a response."""
    for chunk in reply.begin():
        yield _event({**reply.head, "choices": [chunk]})
    try:
        async for batch in events:
            yield b"".join(_event({**reply.head, "choices": [chunk]}) for chunk in reply.feed(batch))
    except RequestError as error:
        yield _event(error.to_dict())
    if reply.completion.usage:
        yield _event({**reply.head, "choices": [], "usage": reply.usage()})
    yield b"data: [DONE]\n\n"


async def read_body(http: HttpRequest, limit: int) -> bytes:
    """The body of a request. Raises RequestError: 413 when it is, or says it is, too large, 408 when it is late."""
    too_large = RequestError(f"the body is larger than {limit} bytes (--max-body-bytes)", status=413)
    if int(http.headers.get("content-length") or 0) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME):
            async for piece in http.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_TIME} s", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client went away") from None
    return bytes(body)


def json_response(value: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(to_json(value), status, media_type="application/json")


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """OpenAI's shape of an error."""
    response = json_response(error.to_dict(), error.status)
    response.headers.update(headers or {})
    if error.status in (429, 503):
        response.headers["retry-after"] = "1"
    if error.status in (408, 413, 503):  # the rest of a body is not waited for
        response.headers["connection"] = "close"
    return response


def _event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
