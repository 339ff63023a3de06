"""`python -m benchmarks.serve exports/fp32`: how fast the HTTP server answers one client, and many at once.

Each client streams one completion after the other over a connection of its own. Printed are the median and the 99th
percentile of the time to the first text and of the time between two pieces of text, and all clients' tokens per second.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PROMPTS = ["Once upon a time", "The little", "One day, a", "It was raining and", "There was", "Tom and"]


@dataclass
class Figures:
    """What the clients of one run measured, times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    errors: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument(
        "bundle", nargs="?", default="exports/fp32", help="served on a free port (default: exports/fp32)"
    )
    parser.add_argument("--url", help="measure this running server instead, such as http://127.0.0.1:8080")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64], help="default: 1 64")
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients (default: 30)")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion (default: 64)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--serve", default="", help="options of smallgpt.serve, as in --serve='--rows 32'")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(served([options.bundle, *shlex.split(options.serve)]))
        place = urllib.parse.urlsplit(url)
        asyncio.run(run(place.hostname or "", place.port or 80, 1, 1.0, options.tokens))  # warm up
        rows = []
        for clients in options.clients:
            begin = time.perf_counter()
            figures = asyncio.run(run(place.hostname or "", place.port or 80, clients, options.seconds, options.tokens))
            rows.append(summary(clients, figures, time.perf_counter() - begin))
            if not options.json:
                print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif len(rows) > 1 and rows[0]["tokens_per_second"]:
        print(f"throughput: {rows[-1]['tokens_per_second'] / rows[0]['tokens_per_second']:.2f} times that of the first")


@contextlib.contextmanager
def served(arguments: Sequence[str]) -> Iterator[str]:
    """A server process on a free port; yields its address."""
    command = [sys.executable, "-m", "smallgpt.serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        text = process.stderr.readline()
        found = re.search(r"http://\S+:\d+", text)
        if not found:
            sys.exit(f"the server did not start: {text}{process.stderr.read()}")
        print(text, end="", file=sys.stderr)
        threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
        yield found[0]
    finally:
        process.terminate()
        process.wait()


async def run(host: str, port: int, clients: int, seconds: float, tokens: int) -> Figures:
    """Let clients ask until the time is over, and finish what they began."""
    figures = Figures()
    deadline = time.perf_counter() + seconds
    await asyncio.gather(*(client(figures, host, port, number, deadline, tokens) for number in range(clients)))
    return figures


async def client(figures: Figures, host: str, port: int, number: int, deadline: float, tokens: int) -> None:
    """One client."""
    draw = random.Random(number)
    reader, writer = await asyncio.open_connection(host, port)
    while time.perf_counter() < deadline:
        body = {"prompt": draw.choice(PROMPTS), "max_tokens": tokens, "ignore_eos": True, "seed": draw.getrandbits(32)}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        begin = last = time.perf_counter()
        writer.write(head.encode() + data)
        first = True
        while (got := await reader.readline()) != b"data: [DONE]\n":
            if not got or b'"error"' in got:
                figures.errors += 1
                return
            if not got.startswith(b"data: "):
                continue
            now = time.perf_counter()
            (figures.first if first else figures.between).append(now - last if not first else now - begin)
            first, last = False, now
            if b'"usage"' in got:
                figures.tokens += json.loads(got[6:])["usage"]["completion_tokens"]
        while await reader.readline() != b"0\r\n":  # the last chunk of the response
            pass
        await reader.readline()
        figures.requests += 1
    writer.close()


def summary(clients: int, figures: Figures, seconds: float) -> dict[str, Any]:
    """The figures as plain numbers; times in milliseconds."""

    def percentile(values: list[float], share: float) -> float:
        return round(float(np.percentile(values, share)) * 1e3, 2) if values else float("nan")

    return {
        "clients": clients,
        "requests": figures.requests,
        "errors": figures.errors,
        "tokens_per_second": round(figures.tokens / seconds, 1),
        "first_p50_ms": percentile(figures.first, 50),
        "first_p99_ms": percentile(figures.first, 99),
        "between_p50_ms": percentile(figures.between, 50),
        "between_p99_ms": percentile(figures.between, 99),
    }


def line(row: dict[str, Any]) -> str:
    """A row of figures in words."""
    return (
        f"{row['clients']:3} clients: {row['requests']} requests, {row['errors']} errors, "
        f"{row['tokens_per_second']} tokens/s | first p50 {row['first_p50_ms']} ms, p99 {row['first_p99_ms']} ms | "
        f"piece p50 {row['between_p50_ms']} ms, p99 {row['between_p99_ms']} ms"
    )


if __name__ == "__main__":
    main()
