"""Clients that hold on to a connection and do nothing, over real sockets."""

import socket
import time
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import uvicorn

from malora_server.app import create_app, http_config
from malora_server.engine.messages import EngineStats
from malora_server.settings import Settings

SECONDS = 0.3


@pytest.fixture
def settings():
    return Settings(
        base="models/tiny", max_num_seqs=1, max_queued_requests=1, client_timeout=SECONDS
    )


@pytest.fixture
def server(settings, engine, tokenizer):
    """The server that `malora serve` starts, but for its draining."""
    engine.stats = EngineStats()
    return uvicorn.Server(http_config(create_app(settings, engine, tokenizer), settings))


@pytest.fixture
def url(server, run_server):
    with run_server(server, send_buffer=4096) as url:
        yield url


@pytest.fixture
def connect(url):
    parts = urlsplit(url)
    connections = []

    def connect(sent=b"", receive_buffer=None):
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(20)
        connection.connect((parts.hostname, parts.port))
        connection.sendall(sent)
        connections.append(connection)
        return connection

    yield connect
    for connection in connections:
        connection.close()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rest(connection):
    """All that comes until the server closes."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def body_of(reply):
    return msgspec.json.decode(reply.partition(b"\r\n\r\n")[2])["error"]


def request(body=b"", *, length=None, close=False):
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + (b"Connection: close\r\n" if close else b"")
        + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length)
        + body
    )


HELLO = msgspec.json.encode({"model": "tiny", "prompt": "hello", "max_tokens": 2})


def test_half_a_body(connect, url, caplog):
    connection = connect(request(b'{"model": "tiny", ', length=500))
    reply = rest(connection)
    assert reply.startswith(b"HTTP/1.1 408")
    assert b"\r\nconnection: close" in reply.lower()
    assert body_of(reply)["code"] == "request_timeout"
    assert httpx.get(f"{url}/health", timeout=60).is_success


def test_a_body_that_trickles(connect):
    connection = connect(request(b"", length=500))
    started = time.monotonic()
    connection.settimeout(0.02)
    reply = b""
    while not reply and time.monotonic() < started + 20:
        connection.sendall(b" ")
        try:
            reply = connection.recv(65536)
        except TimeoutError:
            continue
    assert reply.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("key", [b"", b"Authorization: Bearer wrong\r\n"])
def test_half_a_body_that_is_refused_anyway(engine, tokenizer, run_server, key):
    settings = Settings(base="models/tiny", api_key="sk-right", client_timeout=SECONDS)
    app = create_app(settings, engine, tokenizer)
    with run_server(uvicorn.Server(http_config(app, settings))) as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), 20) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n" + key + b"\r\n"
            )
            reply = rest(connection)
    assert reply.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HTTP/1.1\r\nHost:", b"\r\n"],
    ids=["nothing", "half the headers", "an empty line"],
)
def test_headers_that_never_end(connect, url, sent):
    connection = connect(sent)
    assert rest(connection) == b""
    assert httpx.get(f"{url}/health", timeout=60).is_success


def test_a_second_requests_headers_that_never_end(connect):
    connection = connect(request(HELLO))
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /health HT")
    assert rest(connection) == b""


def test_headers_without_an_end(connect):
    connection = connect(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
    try:
        for _ in range(20):
            connection.sendall(b"x" * 10_000)
    except OSError:
        pass
    reply = rest(connection)
    assert reply == b"" or reply.startswith(b"HTTP/1.1 431")


def test_large_requests_are_no_long_headers(connect):
    connection = connect()
    padded = HELLO[:-1] + b" " * 1_000_000 + b"}"
    for _ in range(3):
        connection.sendall(request(padded))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    connection.sendall(request(HELLO, close=True))
    assert rest(connection).startswith(b"HTTP/1.1 200")


def test_what_is_no_http(connect):
    reply = rest(connect(b"\x16\x03\x01 hello\r\n\r\n"))
    assert reply.startswith(b"HTTP/1.1 400")
    assert body_of(reply)["code"] == "invalid_http"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_a_client_that_reads_nothing(connect, url, server, engine, stream, close):
    engine.ready = msgspec.structs.replace(engine.ready, max_model_len=10**6)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 3000, "ignore_eos": True}
    large = msgspec.json.encode({**body, "stream": stream, "logprobs": 5})
    connect(request(large, close=close), receive_buffer=4096)
    wait_for(lambda: len(engine.submits) == 1)
    # The stream's sequence is freed, and so is the connection.
    wait_for(lambda: not server.server_state.connections)
    wait_for(lambda: len(engine.aborted) == stream)
    reply = httpx.post(f"{url}/v1/completions", json={**body, "n": 2, "max_tokens": 1}, timeout=60)
    assert reply.is_success  # the queue's two places are there


def test_a_client_that_leaves_a_little_unread(connect, server):
    """What is left once the reply is complete fits in the server's buffer, which is never full."""
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 100, "logprobs": 5}
    body |= {"ignore_eos": True}
    connection = connect(request(msgspec.json.encode(body), close=True), receive_buffer=4096)
    wait_for(lambda: server.server_state.total_requests == 1)
    wait_for(lambda: not server.server_state.connections)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_slowly_gets_it_all(connect, engine):
    engine.ready = msgspec.structs.replace(engine.ready, max_model_len=10**6)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1000, "logprobs": 5, "stream": True}
    body |= {"ignore_eos": True}
    connection = connect(request(msgspec.json.encode(body), close=True), receive_buffer=4096)
    received = b""
    while data := connection.recv(65536):
        received += data
        time.sleep(0.002)
    assert received.count(b"data: {") == 1000
    assert b"data: [DONE]" in received
    assert engine.aborted == []
