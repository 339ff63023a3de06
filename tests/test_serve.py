"""A real server process and real clients."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.docs_generation import requests, shell
from smallgpt.beams import beam_search
from smallgpt.generation import generate
from smallgpt.openapi import FIELDS
from smallgpt.ort_generate import score_file
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.score import windows

ROOT = Path(__file__).parent.parent
SONG = "the dog sat 日本 🙂 happy"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    return tiny.write_bundles(folder, tiny.random_model("llama"), ["fp32", "int8"]) / "fp32"


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that, without a prompt, always says SONG."""
    folder = tmp_path_factory.mktemp("parrot")
    return tiny.write_bundles(folder, tiny.parrot(SONG), ["fp32"], temperature=0, max_new_tokens=60) / "fp32"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that takes about a second to fill its context of 2048 tokens."""
    folder = tmp_path_factory.mktemp("slow")
    model = tiny.random_model("llama", max_seq_len=2048, embed_dim=128, num_layers=4)
    return tiny.write_bundles(folder, model, ["fp32"], max_new_tokens=2000) / "fp32"


class Served:
    """A server process and a small client for it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(self, path: str, body: Any = None, *, method: str = "", **headers: str) -> tuple[int, Any]:
        """Status and the body, as JSON if it is; a body that is not bytes is sent as JSON."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text

    def complete(self, **body: Any) -> dict[str, Any]:
        status, answer = self.call("/v1/completions", body)
        assert status == 200, answer
        return answer

    def refused(self, body: Any, **headers: str) -> tuple[int, str, str | None]:
        """Status, message and parameter of an error in OpenAI's shape."""
        status, answer = self.call("/v1/completions", body, **headers)
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        return status, answer["error"]["message"], answer["error"]["param"]

    def metric(self, name: str) -> float:
        match = re.search(rf"^smallgpt_{re.escape(name)} (\S+)$", self.call("/metrics")[1], re.MULTILINE)
        assert match, name
        return float(match[1])

    def wait_for(self, name: str, value: float) -> None:
        """Until a figure of /metrics has a value."""
        deadline = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


@contextmanager
def serving(bundle: Path, *arguments: object) -> Iterator[Served]:
    command = [sys.executable, "-m", "smallgpt.serve", bundle, "--port", "0", "--threads", "1", *arguments]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr is not None
    try:
        line = process.stderr.readline().decode()
        match = re.search(r"listening on http://127\.0\.0\.1:(\d+)/v1", line)
        assert match, line + process.stderr.read().decode()
        yield Served(process, int(match[1]))
        assert process.poll() is None or process.returncode in (130, 143)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Served]:
    with serving(bundle) as served:
        yield served


@pytest.fixture(scope="module")
def model(bundle: Path) -> OrtGPT:
    return OrtGPT(bundle, threads=1)


def alone(model: OrtGPT, prompt: str | list[int], number: int = 0, **values: Any) -> tuple[str, str | None]:
    """Text and reason of a single run with the bundle's defaults, with the kernels that a batch is computed with."""
    even = model.bundle.config.variant != "fp32"
    ids = [model.tokenizer.eos_id, *model.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    config = GenerationConfig.from_dict({**model.bundle.generation.to_dict(), **values})
    pieces = [step[0] for step in generate(model, [ids], config, sequences=[number], even=even)]
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def test_openai_client(server: Served, model: OrtGPT) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [entry.id for entry in client.models.list()] == ["smallgpt-fp32"]
    assert client.models.retrieve("smallgpt-fp32").id == "smallgpt-fp32"
    answer = client.completions.create(
        model="smallgpt-fp32", prompt="the cat", max_tokens=12, seed=5, n=2, temperature=0.7, extra_body={"top_k": 5}
    )
    texts = [alone(model, "the cat", j, max_new_tokens=12, seed=5, temperature=0.7, top_k=5)[0] for j in range(2)]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == 1 + len(model.tokenizer.encode("the cat"))
    stream = client.completions.create(
        model="smallgpt-fp32",
        prompt="the cat",
        max_tokens=12,
        seed=5,
        temperature=0.7,
        stream=True,
        extra_body={"top_k": 5},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model="smallgpt-fp32", prompt="the cat", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="the cat")
    with pytest.raises(openai.NotFoundError, match="without a chat template"):
        client.chat.completions.create(model="smallgpt-fp32", messages=[{"role": "user", "content": "hello"}])


def test_every_prompt_of_a_list_is_as_alone(server: Served, model: OrtGPT) -> None:
    prompts = ["the cat", "", "a happy dog\nran 日"]
    answer = server.complete(prompt=prompts, n=2, seed=9, max_tokens=20)
    expected = [alone(model, prompt, j, seed=9, max_new_tokens=20) for prompt in prompts for j in range(2)]
    assert [(choice["text"], choice["reason"]) for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    ids = [[3, *model.tokenizer.encode(prompt)] for prompt in prompts]
    same = server.complete(prompt=ids, n=2, seed=9, max_tokens=20)
    assert [choice["text"] for choice in same["choices"]] == [text for text, _ in expected]
    # Ids are taken as they are, also without <|eos|> in front.
    assert (
        server.complete(prompt=ids[0][1:], seed=9, max_tokens=20)["choices"][0]["text"]
        == (alone(model, ids[0][1:], seed=9, max_new_tokens=20)[0])
    )
    for empty in ({}, {"prompt": None}, {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}):
        assert server.complete(**empty, seed=9, max_tokens=20)["choices"][0]["text"] == expected[2][0]


def test_the_seed_is_drawn_and_reported(server: Served) -> None:
    answers = [server.complete(prompt="the", max_tokens=30, temperature=1.5) for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    assert answers[0]["choices"][0]["text"] != answers[1]["choices"][0]["text"]
    again = server.complete(prompt="the", max_tokens=30, temperature=1.5, seed=answers[0]["seed"])
    assert again["choices"] == answers[0]["choices"]


def stream(server: Served, **body: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The chunks of a streamed response, and the text of each of its choices."""
    status, text = server.call("/v1/completions", {"stream": True, **body})
    assert status == 200, text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    count = 1 + max(choice["index"] for choice in choices)
    return chunks, ["".join(choice["text"] for choice in choices if choice["index"] == i) for i in range(count)]


def test_streams_hold_what_the_whole_response_holds(server: Served) -> None:
    for more in ({}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 0}, {"num_beams": 3, "n": 3}):
        body = {"prompt": ["the cat", "a"], "n": 2, "seed": 4, "max_tokens": 15, **more}
        whole = server.complete(**body)
        chunks, texts = stream(server, **body, stream_options={"include_usage": True})
        assert texts == [choice["text"] for choice in whole["choices"]]
        assert chunks[-1]["usage"] == whole["usage"]
        assert len(chunks) > (3 if "num_beams" in more else 15)
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        for choice in whole["choices"]:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert [c["finish_reason"] for c in parts[:-1]] == [None] * (len(parts) - 1)
            assert parts[-1]["finish_reason"] == choice["finish_reason"]
            for key in choice["logprobs"] or ():
                found = [item for c in parts if c["logprobs"] for item in c["logprobs"][key]]
                assert found == choice["logprobs"][key]


def test_stops_are_held_back_and_cut_off(parrot: Path) -> None:
    with serving(parrot) as server:
        chunks, texts = stream(server, prompt="", stop=["g sat", "happy"])
        assert texts == ["the do"]
        assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["choices"][0]["reason"]) == ("stop", "stop")
        choice = server.complete(prompt="", stop=["no such"])["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["reason"]) == (SONG, "stop", "eos")
        choice = server.complete(prompt="", max_tokens=3)["choices"][0]
        assert (choice["finish_reason"], choice["reason"]) == ("length", "length")
        text = server.complete(prompt="", stop="日", num_beams=2)["choices"][0]["text"]
        assert text == "the dog sat "


def test_beams_are_those_of_the_library(server: Served, model: OrtGPT) -> None:
    ids = [3, *model.tokenizer.encode("the cat")]
    values = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "never"}
    *_, last = beam_search(model, ids, GenerationConfig(max_new_tokens=10, num_return_sequences=3, **values))
    answer = server.complete(prompt="the cat", n=3, max_tokens=10, **values)
    found = [(choice["text"], choice["score"], choice["reason"]) for choice in answer["choices"]]
    assert found == [(h.text, pytest.approx(h.score, abs=1e-9), h.finish) for h in last.done]
    assert answer["usage"]["completion_tokens"] == sum(len(h.ids) for h in last.done)


def test_log_probabilities(server: Served, model: OrtGPT) -> None:
    answer = server.complete(prompt="the cat 日", max_tokens=5, temperature=0, logprobs=3, echo=True)
    choice = answer["choices"][0]
    found = choice["logprobs"]
    prompt = model.tokenizer.encode("the cat 日")
    assert found["tokens"][0] == "<|eos|>"
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    greedy = generate(model, [[3, *prompt]], GenerationConfig(temperature=0, max_new_tokens=5))
    ids = [*prompt, *(step[0].token for step in greedy)]
    logits = model.logits([3, *ids]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(found["tokens"]) == len(ids) + 1
    for i, token in enumerate(ids):
        assert found["token_logprobs"][i + 1] == pytest.approx(expected[i, token], abs=1e-5)
        best = sorted(expected[i], reverse=True)[:3]
        top = sorted(found["top_logprobs"][i + 1].values(), reverse=True)
        assert top[:3] == pytest.approx(best, abs=1e-5)
    at = found["tokens"].index("bytes:\\xe6")
    assert found["tokens"][at : at + 3] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert found["text_offset"][at : at + 4] == [8, 8, 8, 9]
    text = choice["text"]
    offsets = [*found["text_offset"], len(text)]
    for name, start, end in zip(found["tokens"][1:at], offsets[1:], offsets[2:], strict=False):
        assert text[start:end] == name


def test_echo_scores_a_text_as_the_evaluation_does(server: Served, model: OrtGPT, tmp_path: Path) -> None:
    """Windows as evaluate cuts them, each as a prompt of token ids with max_tokens 0."""
    text = tiny.text(11, 120)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    figures = score_file(model, tmp_path / "text.txt")
    tokens = server.call("/tokenize", {"content": text})[1]["tokens"]
    ids = [3, *tokens, 3]
    for prefix, stride in (("", 64), ("sliding_", 32)):
        total = 0.0
        for start, first, end in windows(len(ids), 64, stride):
            body = {"prompt": ids[start : end + 1], "max_tokens": 0, "echo": True, "logprobs": 0}
            logprobs = server.complete(**body)["choices"][0]["logprobs"]["token_logprobs"]
            assert logprobs[0] is None
            total -= sum(logprobs[1 + first - start :])
        assert total == pytest.approx(figures[f"{prefix}total_nats"], rel=1e-6)
    # A text that fits is scored whole, its first token too, given the <|eos|> in front of it.
    short = text[:60]
    (tmp_path / "text.txt").write_text(short, encoding="utf-8")
    choice = server.complete(prompt=short, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (short, "length")
    logits = model.logits([3, *model.tokenizer.encode(short)])[-1].astype(np.float64)
    end = np.log(np.exp(logits).sum()) - logits[3]
    nats = -sum(choice["logprobs"]["token_logprobs"][1:])
    assert nats + end == pytest.approx(score_file(model, tmp_path / "text.txt")["total_nats"], rel=1e-6)


def test_tokens(server: Served, model: OrtGPT) -> None:
    text = "the cat 日\u2581\n"
    status, answer = server.call("/tokenize", {"content": text})
    assert (status, answer["tokens"], answer["count"]) == (200, model.tokenizer.encode(text), len(answer["tokens"]))
    assert server.call("/tokenize", {"prompt": text, "add_special_tokens": True})[1]["tokens"][0] == 3
    assert server.call("/detokenize", {"tokens": answer["tokens"]})[1] == {"content": text, "prompt": text}
    assert server.call("/tokenizer_info")[1]["eos_token"] == "<|eos|>"
    for path, body in (("/tokenize", {}), ("/tokenize", {"content": 5}), ("/detokenize", {"tokens": [320]})):
        assert server.call(path, body)[0] == 400


def test_health_metrics_and_description(server: Served) -> None:
    status, answer = server.call("/health")
    assert (status, answer["status"], answer["device"]) == (200, "ok", "cpu")
    before = server.metric("tokens_total"), server.metric("requests_finished_total")
    server.complete(prompt="the", max_tokens=7, ignore_eos=True)
    server.complete(prompt="the", max_tokens=7, ignore_eos=True, num_beams=2)
    after = server.metric("tokens_total"), server.metric("requests_finished_total")
    assert (after[0] - before[0], after[1] - before[1]) == (14, 2)
    assert server.metric('first_token_seconds_bucket{le="+Inf"}') == server.metric("first_token_seconds_count") > 0
    status, answer = server.call("/openapi.json")
    schema = answer["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == FIELDS.keys()
    known = set(GenerationConfig().to_dict()) - {"max_new_tokens", "num_return_sequences"}
    assert known <= FIELDS.keys()


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", "no valid JSON", None),
        (b"{", "no valid JSON", None),
        (b"[1]", "no JSON object", None),
        (b'"\xff"', "no valid JSON", None),
        (b'{"temperature": NaN}', "NaN is no JSON", None),
        (b'{"temperature": -Infinity}', "-Infinity is no JSON", None),
        (b'{"temperature": 1e999}', "temperature is inf", "temperature"),
        (b'{"n": 1, "n": 2}', "the key n stands twice", None),
        pytest.param(
            b"{" + b"".join(b'"k%d": 1, ' % i for i in range(75_000)) + b'"k74999": 2}',  # a MB of keys holds nobody up
            "the key k74999 stands twice",
            None,
            id="many keys",
        ),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "no valid JSON", None),
        (b'{"seed": ' + b"9" * 4000 + b"}", "seed is 999", "seed"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", None),
        (b'{"prompt": "\\ud800"}', "lone surrogate", "prompt"),
        (b'{"\\ud800": 1}', "unknown parameter", "\ud800"),
        ({"max_token": 5}, "unknown parameter max_token; did you mean max_tokens?", "max_token"),
        ({"num_return_sequences": 2}, "unknown parameter num_return_sequences", "num_return_sequences"),
        ({"prompt": 5}, "prompt must be a text", None),
        ({"prompt": ["a", 5]}, "prompt must be a text", None),
        ({"prompt": [1.5]}, "prompt must be a list of token ids", "prompt"),
        ({"prompt": [True]}, "prompt must be a list of token ids", "prompt"),
        ({"prompt": [320]}, "token id 320; the vocabulary is 0 to 319", "prompt"),
        ({"prompt": [-1]}, "token id -1", "prompt"),
        ({"prompt": [5] * 65}, "65 tokens; at most 64 fit", "prompt"),
        ({"prompt": ["a"] * 65}, "65 prompts; this server takes at most 64 (--max-prompts)", "prompt"),
        ({"max_tokens": -1}, "max_tokens is -1", "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens is 5000; this server allows 0 to 4096", "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens is 5.0; it must be a whole number", "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens is '5'", "max_tokens"),
        ({"max_tokens": True}, "max_tokens is True", "max_tokens"),
        ({"n": 0}, "n is 0", "n"),
        ({"n": 17}, "n is 17", "n"),
        ({"n": 3, "num_beams": 2}, "2 beams give no more", "n"),
        ({"num_beams": 17}, "num_beams is 17; this server allows at most 16", "num_beams"),
        ({"num_beams": 2, "logprobs": 1}, "beam search has no logprobs", "logprobs"),
        (
            {"prompt": ["a"] * 5, "n": 13, "logprobs": 0},
            "at most 64 choices (--max-prompts), not 65",
            "n",
        ),
        ({"logprobs": 21}, "logprobs is 21", "logprobs"),
        ({"logprobs": True}, "logprobs is True", "logprobs"),
        ({"best_of": 2}, "best_of is not supported", "best_of"),
        ({"suffix": "x"}, "suffix is not supported", "suffix"),
        ({"stream": "yes"}, "stream is 'yes'", "stream"),
        ({"stream_options": 1}, "stream_options must be", "stream_options"),
        ({"temperature": "hot"}, "temperature is 'hot'", "temperature"),
        ({"top_p": 0}, "top_p is 0", "top_p"),
        ({"seed": -2}, "seed is -2", "seed"),
        ({"seed": True}, "seed is True", "seed"),
        ({"stop": [""]}, "stop is ['']", "stop"),
        ({"stop": ["a"] * 17}, "stop has 17; this server allows at most 16 (--max-stop)", "stop"),
        ({"stop_token_ids": list(range(17))}, "stop_token_ids has 17", "stop_token_ids"),
        ({"logit_bias": {"400": 1}}, "token id 400", "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias is", "logit_bias"),
        ({"max_time": 301}, "max_time is 301; this server allows at most 300.0 (--max-time)", "max_time"),
    ],
)
def test_wrong_requests(server: Served, body: Any, message: str, param: str | None) -> None:
    status, found, about = server.refused(body)
    assert (status, about) == (400, param)
    assert message in found
    assert len(found) < 600
    assert server.complete(prompt="the", max_tokens=1)["choices"][0]["finish_reason"] in ("length", "stop")


def test_the_examples_of_the_documentation(server: Served) -> None:
    page = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    examples = requests(page)
    assert len(examples) > 5
    for command in examples:
        answer = shell(command.replace("localhost:8080", f"127.0.0.1:{server.port}"))
        assert ('"error"' in answer) == ("temprature" in command), answer
        assert len(answer) > 50
    routes = server.call("/openapi.json")[1]["paths"]
    assert [path for path in routes if path not in page] == []
    assert [name for name in FIELDS if f"`{name}`" not in page] == []


def test_routes_and_methods_that_are_not_there(server: Served) -> None:
    for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/nope", 404), ("DELETE", "/health", 405)):
        found, answer = server.call(path, method=method)
        assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert "chat template" in server.call("/v1/chat/completions", {"messages": []})[1]["error"]["message"]
    assert server.call("/v1/models/gpt-4")[0] == 404


def test_host_allow_list(server: Served, bundle: Path) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", ""):
        assert server.call("/health", Host=host)[0] == 421
    for host in ("localhost", f"LOCALHOST:{server.port}", "192.168.1.2:80", "[::1]:8080"):
        assert server.call("/health", Host=host)[0] == 200
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with serving(bundle, "--allowed-host", "Model.Example") as other:
        assert other.call("/health", Host="model.example:80")[0] == 200
        assert other.call("/health", Host="evil.example")[0] == 421


def test_large_bodies_are_refused(bundle: Path) -> None:
    with serving(bundle, "--max-body-bytes", 1000) as server:
        assert server.refused({"user": "x" * 900, "max_tokens": -1})[0] == 400
        assert server.refused({"user": "x" * 1000})[0] == 413
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:  # before it is sent
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a.b\r\nHost: localhost\r\n\r\n")
            assert b" 400 " in connection.recv(1000).split(b"\r\n")[0]
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        connection = server.connect()  # chunked, without a length
        connection.request("POST", "/v1/completions", iter([b"x" * 600, b"x" * 600]), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert server.call("/health")[0] == 200


@pytest.mark.slow
def test_a_client_that_goes_away_frees_its_row(slow: Path) -> None:
    body = {"prompt": "the", "max_tokens": 2000, "ignore_eos": True, "seed": 1}
    with serving(slow, "--rows", 1) as server:
        for number, more in enumerate(
            ({"stream": True}, {}, {"stream": True, "num_beams": 4}, {"num_beams": 4}), start=1
        ):
            connection = server.connect()
            connection.request("POST", "/v1/completions", json.dumps(body | more))
            server.wait_for("requests_running", 1)
            if more.get("stream"):
                assert connection.getresponse().readline().startswith(b"data: ")
            connection.sock.close() if connection.sock else None
            connection.close()
            server.wait_for("requests_cancelled_total", number)
            server.wait_for("requests_running", 0)
        # One that waits: the one in work goes on, the one behind it gets the row.
        first = server.connect()
        first.request("POST", "/v1/completions", json.dumps(body))
        server.wait_for("requests_running", 1)
        second = server.connect()
        second.request("POST", "/v1/completions", json.dumps(body))
        server.wait_for("requests_waiting", 1)
        second.close()
        server.wait_for("requests_waiting", 0)
        first.close()
        server.wait_for("requests_running", 0)
        assert server.complete(prompt="the", max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_full_queue_and_long_requests(slow: Path) -> None:
    body = {"prompt": "the", "max_tokens": 2000, "ignore_eos": True, "seed": 1}
    with serving(slow, "--rows", 1, "--queue", 1) as server:
        running = [server.connect() for _ in range(2)]
        running[0].request("POST", "/v1/completions", json.dumps(body))
        server.wait_for("requests_running", 1)
        running[1].request("POST", "/v1/completions", json.dumps(body))
        server.wait_for("requests_waiting", 1)
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert json.loads(response.read())["error"]["code"] == "queue_full"
        assert server.metric("requests_refused_total") == 1
        assert server.call("/health")[1]["waiting"] == 1  # answered all the same
        for other in running:
            other.close()
        server.wait_for("requests_waiting", 0)
        choice = server.complete(**body, max_time=0.05)["choices"][0]
        assert (choice["finish_reason"], choice["reason"]) == ("length", "time")
    with serving(slow, "--max-time", 0.05) as server:
        assert server.complete(**body)["choices"][0]["reason"] == "time"


def test_beams_and_scores_do_not_stall_the_batch(slow: Path) -> None:
    with serving(slow) as server:
        long = server.connect()
        long.request(
            "POST",
            "/v1/completions",
            json.dumps({"prompt": "a", "num_beams": 4, "max_tokens": 2000, "ignore_eos": True}),
        )
        server.wait_for("requests_running", 1)
        assert server.complete(prompt="the", max_tokens=5)["choices"][0]["reason"] in ("length", "eos")
        assert server.complete(prompt="the", max_tokens=0, echo=True, logprobs=0)["choices"][0]["text"] == "the"
        assert server.call("/health")[1]["running"] >= 1
        long.close()


def test_settings_that_leave_no_token_hurt_only_their_own_request(slow: Path) -> None:
    everything = list(range(4, 320))
    bad = {"prompt": [everything, [3]], "n": 2, "no_repeat_ngram_size": 1, "ignore_eos": True, "max_tokens": 2000}
    with serving(slow) as server, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "the", "max_tokens": 500, "ignore_eos": True, "seed": 1}
        running = pool.submit(server.complete, **body)
        server.wait_for("requests_running", 1)
        for more in ({}, {"num_beams": 2}):
            status, message, _ = server.refused(bad | more)
            assert (status, message.split(":")[0]) == (400, "no token is left")
        status, text = server.call("/v1/completions", bad | {"stream": True})
        assert status == 200
        assert "no token is left" in text.split("data: ")[-2]
        assert running.result()["choices"] == server.complete(**body)["choices"]
        assert server.metric("requests_failed_total") == 3
        assert server.metric("requests_running") == 0


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_what_comes(slow: Path) -> None:
    with serving(slow) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "the", "max_tokens": 1500, "ignore_eos": True, "seed": 1}
        running = pool.submit(server.complete, **body)
        streaming = pool.submit(stream, server, **body)
        server.wait_for("requests_running", 2)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while (answer := server.call("/v1/completions", {"prompt": "the", "max_tokens": 1}))[0] == 200:
            assert time.monotonic() < deadline
        assert answer[0] == 503
        assert answer[1]["error"]["code"] == "stopping"
        assert server.call("/health")[0] == 503
        choice = running.result()["choices"][0]
        assert choice["reason"] == "length"
        assert streaming.result()[1] == [choice["text"]]
        assert server.process.wait(60) == 143


@pytest.mark.slow
def test_sigterm_finishes_what_runs_also_where_nobody_reads_its_messages(slow: Path) -> None:
    with serving(slow) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.complete, prompt="the", max_tokens=1500, ignore_eos=True, seed=1)
        server.wait_for("requests_running", 1)
        assert server.process.stderr is not None
        server.process.stderr.close()  # as `2>&1 | grep -m1 listening` does
        server.process.send_signal(signal.SIGTERM)
        assert running.result()["choices"][0]["reason"] == "length"
        assert server.process.wait(60) == 143


@pytest.mark.slow
def test_a_second_signal_breaks_off(slow: Path) -> None:
    with serving(slow) as server:
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "the", "ignore_eos": True}))
        server.wait_for("requests_running", 1)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere/config.json does not exist"),
        (["--port", "99999"], 2, "cannot listen on 127.0.0.1:99999"),
        (["--port", "{port}"], 2, "Address already in use"),
        (["--rows", "0"], 2, "'0' is no number from 1 on"),
        (["--device", "tpu"], 2, "--device is 'tpu'"),
    ],
)
def test_wrong_usage(server: Served, bundle: Path, arguments: list[str], code: int, message: str) -> None:
    command = [argument.format(port=server.port) for argument in arguments]
    command = command if command[0] == "nowhere" else [str(bundle), *command]
    done = subprocess.run(
        [sys.executable, "-m", "smallgpt.serve", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr.splitlines()[-1]


def crowd(server: Served, model: OrtGPT, clients: int, seconds: float) -> tuple[int, int]:
    """Clients that ask again and again; requests and tokens that were answered, each compared with its single run."""
    asked: list[tuple[dict[str, Any], Any]] = []
    deadline = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = np.random.default_rng(number)
        while time.monotonic() < deadline:
            prompt = tiny.text(int(draw.integers(1000)), int(draw.integers(0, 6)))
            body = {"prompt": prompt, "seed": int(draw.integers(2**40)), "max_tokens": int(draw.integers(1, 60))}
            body |= {"temperature": float(draw.choice([0.0, 0.8, 1.3])), "presence_penalty": float(draw.choice([0, 1]))}
            if number % 4 == 0:
                asked.append((body, stream(server, **body)[1][0]))
            else:
                asked.append((body, server.complete(**body)["choices"][0]["text"]))

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client, number) for number in range(clients)]:
            future.result()
    tokens = 0
    for body, text in asked:
        values = {key: value for key, value in body.items() if key not in ("prompt", "max_tokens")}
        expected, _ = alone(model, body["prompt"], max_new_tokens=body["max_tokens"], **values)
        assert text == expected, body
        tokens += len(model.tokenizer.encode(text))
    return len(asked), tokens


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize("seconds", [120 if "SMALLGPT_FULL_TESTS" in os.environ else 30])
def test_64_clients_get_what_they_would_get_alone(bundle: Path, variant: str, seconds: float) -> None:
    model = OrtGPT(bundle.parent / variant, threads=1)
    with serving(bundle.parent / variant) as server:
        for clients, duration in ((1, seconds / 4), (64, seconds)):
            requests, tokens = crowd(server, model, clients, duration)
            print(f"{clients} clients: {requests} requests, {tokens / duration:.0f} tokens/s")
            assert requests >= clients
        assert threading.active_count() < 64
        server.wait_for("requests_running", 0)
        assert server.metric("requests_failed_total") == 0


def test_a_large_batch_may_be_computed_in_another_way(bundle: Path) -> None:
    body = {"prompt": "the cat sat on a dog, happy and sad and happy again", "max_tokens": 5, "seed": 4, "n": 8}

    def tokens(*arguments: str) -> list[list[float]]:
        with serving(bundle.parent / "int8", *arguments) as server:
            return [c["logprobs"]["token_logprobs"] for c in server.complete(**body, logprobs=0)["choices"]]

    expected, found = tokens(), tokens("--no-batch-invariant")
    assert found != expected
    assert [row[0] for row in found] == [row[0] for row in expected]  # after the prompt
    assert tokens("--no-batch-invariant", "--rows", "5") == expected


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema of the description allows, small."""
    if "anyOf" in schema:
        return st.one_of([values_of(option) for option in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=12),
        "boolean": st.booleans(),
        "integer": st.integers(low, high) | st.integers(0, 6),
        "number": st.floats(low, high, allow_nan=False) | st.floats(0, 1),
        "object": st.dictionaries(st.integers(0, 400).map(str) | st.text(max_size=4), st.floats(-100, 100), max_size=4),
    }
    if schema["type"] == "array":
        return st.lists(values_of(schema["items"]), max_size=6)
    return kinds[schema["type"]]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
BODIES = st.fixed_dictionaries(
    {}, optional={name: st.one_of(values_of(schema), values_of(schema), JUNK) for name, schema in FIELDS.items()}
)
FEW = st.dictionaries(st.sampled_from(list(FIELDS)), JUNK, max_size=3)
VALID = st.lists(
    st.sampled_from([name for name in FIELDS if name not in ("model", "best_of", "suffix")]), max_size=5
).flatmap(lambda names: st.fixed_dictionaries({name: values_of(FIELDS[name]) for name in names}))


@pytest.mark.slow
def test_no_request_breaks_the_server(server: Served) -> None:
    """2,000 requests after the server's own description, valid, half valid and garbage: none is answered with 5xx."""
    connection = server.connect()
    seen: dict[int, int] = {}

    @settings(max_examples=2000, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(VALID, VALID, BODIES, FEW, JUNK),
        st.sampled_from(["/v1/completions"] * 8 + ["/tokenize", "/detokenize"]),
    )
    def ask(body: Any, path: str) -> None:
        if isinstance(body, dict) and path == "/v1/completions":
            body = {"max_tokens": 4, **body}
        # NaN and lone surrogates included, as a careless client would send them.
        connection.request("POST", path, json.dumps(body).encode())
        response = connection.getresponse()
        text = response.read().decode()
        seen[response.status] = seen.get(response.status, 0) + 1
        assert response.status in (200, 400, 404), (body, text)
        assert response.status == 200 or json.loads(text).keys() == {"error"}

    ask()
    print(seen)
    assert min(seen[200], seen[400]) > 200
    server.wait_for("requests_running", 0)
    assert server.call("/health")[0] == 200
