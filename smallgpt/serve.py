"""`python -m smallgpt.serve exports/fp32`: OpenAI's completions over HTTP from a bundle, without PyTorch.

Requests are decoded together as they come (`scheduler`); what they may ask for is limited (`completions.Limits`).
"""

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from smallgpt import __version__, cli
from smallgpt.completions import (
    Limits,
    Reply,
    RequestError,
    check_model,
    read_completion,
    read_ids,
    read_json,
    read_text,
    token_name,
)
from smallgpt.jobs import Request
from smallgpt.openapi import openapi
from smallgpt.options import BATCH_INVARIANT, session_option
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.scheduler import Scheduler
from smallgpt.tokenizer import CONTROL_PIECES
from smallgpt.web import Events, HostCheck, chunks, error_response, json_response, read_body

log = logging.getLogger(__name__)

PROBE_TIME = 30  # seconds for the token of /health
CHAT = "this is a base model without a chat template; send the text to continue to /v1/completions"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see `--help`. Returns 128 + the signal that stopped it, after its requests are finished."""
    options = _parse(arguments)
    limits = Limits(
        body=options.max_body_bytes,
        tokens=options.max_tokens,
        n=options.max_n,
        stop=options.max_stop,
        prompts=options.max_prompts,
        beams=options.max_beams,
        time=options.max_time,
    )
    listener = _listen(options.host, options.port)
    model = OrtGPT(
        options.bundle,
        device=options.device,
        threads=options.threads,
        session=options.session_option,
        batch_invariant=options.batch_invariant,
    )
    scheduler = Scheduler(model, rows=options.rows, queue=options.queue)
    name = options.alias or f"smallgpt-{model.bundle.config.variant}"
    app = HostCheck(build(model, scheduler, limits, name), [options.host, *options.allowed_host])
    settings: dict[str, Any] = {"log_config": None, "server_header": False, "lifespan": "off", "timeout_keep_alive": 75}
    settings["timeout_graceful_shutdown"] = 30  # for clients that do not read what was made for them
    server = Server(uvicorn.Config(app, access_log=options.verbose, **settings), scheduler)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    host, port = listener.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listener.listen(1024)
    log.info("%s on %s, listening on http://%s/v1", name, model.device, place)
    try:
        server.run(sockets=[listener])
    finally:
        scheduler.close()
    return 128 + server.stopped_by if server.stopped_by else 0


class Server(uvicorn.Server):
    """uvicorn that at a signal finishes what it has and answers 503 to what comes; a second signal breaks off."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.scheduler, self.stopped_by = scheduler, 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal came."""
        if self.stopped_by:
            self.should_exit = self.force_exit = True
        else:
            self.stopped_by = sig
            self.scheduler.drain()
            message = f"{signal.Signals(sig).name}: finishing the requests that run; again to break off\n"
            with contextlib.suppress(OSError):  # nobody may read it
                os.write(2, message.encode())

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to leave."""
        drained = self.stopped_by > 0 and self.scheduler.idle
        return await super().on_tick(counter) or drained


def build(model: OrtGPT, scheduler: Scheduler, limits: Limits, name: str) -> Starlette:
    """The web application."""
    lineage = str(model.bundle.config.lineage.get("model", ""))[:12]
    fingerprint = f"{model.bundle.config.variant}-{lineage}"
    created = int(time.time())

    async def complete(http: HttpRequest) -> Any:
        completion = read_completion(read_json(await read_body(http, limits.body)), model, limits, name)
        reply = Reply(completion, model.tokenizer, name, fingerprint)
        events = Events(http)
        request = Request(
            completion.prompts,
            completion.config,
            events.deliver,
            n=completion.n,
            logprobs=completion.logprobs,
            score=reply.scored,
            live=completion.stream,
        )
        events.submit(scheduler, request)
        if completion.stream:
            headers = {"cache-control": "no-store"}
            return StreamingResponse(chunks(reply, events), media_type="text/event-stream", headers=headers)
        reply.begin()
        async for batch in events:
            reply.feed(batch)
        return json_response(reply.whole())

    async def models(http: HttpRequest) -> Response:
        shape = {**model.bundle.config.model, "variant": model.bundle.config.variant, "device": model.device}
        entry = {"id": name, "object": "model", "created": created, "owned_by": "smallgpt", "meta": shape}
        if "model" in http.path_params:
            check_model(http.path_params, name)
            return json_response(entry)
        return json_response({"object": "list", "data": [entry]})

    async def health(http: HttpRequest) -> Response:
        state = {"model": name, "device": model.device, "running": scheduler.running, "waiting": scheduler.waiting}
        events = Events(http)
        try:
            events.submit(scheduler, Request([], GenerationConfig(), events.deliver, probe=True))
            async with asyncio.timeout(PROBE_TIME):
                async for _ in events:
                    pass
        except (RequestError, TimeoutError) as error:
            return json_response({"status": str(error) or f"no token within {PROBE_TIME} s", **state}, 503)
        return json_response({"status": "ok", **state})

    async def metrics(http: HttpRequest) -> Response:
        gauges = {"requests_running": scheduler.running, "requests_waiting": scheduler.waiting, "rows": scheduler.rows}
        text = scheduler.metrics.render(**gauges)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(http: HttpRequest) -> Response:
        values = read_json(await read_body(http, limits.body))
        key = "content" if "content" in values else "prompt"
        ids = read_text(values.get(key), key, model.tokenizer)
        ids = [model.tokenizer.eos_id, *ids] if values.get("add_special_tokens") is True else ids
        pieces = [token_name(model.tokenizer, token) for token in ids]
        return json_response(
            {"tokens": ids, "token_strs": pieces, "count": len(ids), "max_model_len": model.max_seq_len}
        )

    async def detokenize(http: HttpRequest) -> Response:
        values = read_json(await read_body(http, limits.body))
        text = model.tokenizer.decode(read_ids(values.get("tokens"), "tokens", model.vocab_size))
        return json_response({"content": text, "prompt": text})

    async def tokenizer_info(http: HttpRequest) -> Response:
        names = zip(("pad", "unk", "bos", "eos"), CONTROL_PIECES, strict=True)
        return json_response({f"{key}_token": piece for key, piece in names} | {"vocab_size": model.vocab_size})

    async def chat(http: HttpRequest) -> Response:
        return error_response(RequestError(CHAT, status=404, code="no_chat"))

    async def describe(http: HttpRequest) -> Response:
        return json_response(openapi(name))

    routes = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
        Route("/v1/chat/completions", chat, methods=["GET", "POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/openapi.json", describe),
    ]

    async def wrong(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            message = f"{http.method} {http.url.path}: {error.detail.lower()}"
            return error_response(RequestError(message, status=error.status_code), dict(error.headers or {}))
        return error_response(error if isinstance(error, RequestError) else RequestError("something broke", status=500))

    return Starlette(routes=routes, exception_handlers={RequestError: wrong, HTTPException: wrong, Exception: wrong})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smallgpt.serve", description="Serve a bundle with OpenAI's completions API."
    )
    limits, whole = Limits(), functools.partial(_number, int, 1)
    parser.add_argument("bundle", nargs="?", default="exports/fp32", help="default: exports/fp32")
    add = functools.partial(parser.add_argument, metavar="N", type=whole)
    add("--host", metavar="ADDRESS", default="127.0.0.1", type=str, help="default: 127.0.0.1, this machine only")
    add("--port", default=8080, type=functools.partial(_number, int, 0), help="default: 8080; 0 takes a free one")
    add("--allowed-host", metavar="NAME", default=[], action="append", type=str, help="Host header beside IP addresses")
    add("-a", "--alias", metavar="NAME", type=str, help="the model's name; default: smallgpt- and the variant")
    add("--device", metavar="DEVICE", default="auto", type=str, help="auto, cpu, cuda or cuda:N")
    add("-t", "--threads", default=0, type=functools.partial(_number, int, 0), help="default: all cores, at most 8")
    add(
        "--session-option",
        metavar="KEY=VALUE",
        default=[],
        action="append",
        type=session_option,
        help="for onnxruntime",
    )
    add("--rows", default=16, help="sequences that are decoded together (default: 16)")
    parser.add_argument("--batch-invariant", **BATCH_INVARIANT)
    add("--queue", default=256, help="requests that may wait; beyond that the answer is 429 (default: 256)")
    add("--max-body-bytes", default=limits.body, help=f"of a request (default: {limits.body})")
    add("--max-tokens", default=limits.tokens, help=f"largest max_tokens (default: {limits.tokens})")
    add("--max-n", default=limits.n, help=f"largest n (default: {limits.n})")
    add("--max-stop", default=limits.stop, help=f"stop strings, and stop token ids (default: {limits.stop})")
    add("--max-prompts", default=limits.prompts, help=f"prompts of a request (default: {limits.prompts})")
    add("--max-beams", default=limits.beams, help=f"largest num_beams (default: {limits.beams})")
    seconds = functools.partial(_number, float, 0.001)
    add("--max-time", default=limits.time, type=seconds, help=f"seconds of a generation (default: {limits.time:g})")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every request")
    parser.add_argument("--version", action="version", version=f"smallgpt {__version__}")
    options = parser.parse_args(arguments)
    if not re.fullmatch(cli.DEVICES, options.device):
        raise ValueError(f"--device is {options.device!r}; it must be auto, cpu, cuda or cuda:N")
    return options


def _number(kind: type, least: float, text: str) -> float:
    try:
        value: float = kind(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} on")
    return value


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; OSError, when it cannot be, names the place."""
    # asyncio turns Nagle's delay off only for sockets that name their protocol.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}:{port}: {reason}; choose with --host and --port") from None


def run() -> NoReturn:
    """Entry point of the `smallgpt-serve` script."""
    cli.run(main)


if __name__ == "__main__":
    run()
