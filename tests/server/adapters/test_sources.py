"""Adapters from the hub and from S3, through the real libraries, from servers on this machine."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

from malora_server.adapters import sources
from malora_server.adapters.sources import AdapterSourceError, fetch_adapter, prune_cache

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', bytes(range(256)) * 5000
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
HUB_TOKEN, S3_SECRET = "hf_secret0123456789", "s3secret9876543210"
COMMIT = "c0ffee" * 6 + "beef"


class Remote(ThreadingHTTPServer):
    """Files by path, spoken of as the hub's API or as S3's does."""

    daemon_threads = True

    def __init__(self, handler: type["Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files: dict[str, bytes] = {}
        self.announced: dict[str, int] = {}
        """Sizes that are not the files' own."""
        self.commit = COMMIT
        self.status = 200
        self.requests: list[str] = []
        self.before_bytes: Callable[[], None] = lambda: None
        self.silent = "nothing"
        """Requests with this in their path get no answer, until `heard` is set."""
        self.heard = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Remote
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.silent in self.path:
            self.server.heard.wait()
            return
        if self.server.status != 200:
            self.reply(self.server.status, b'{"error": "no"}')
            return
        self.answer(unquote(urlsplit(self.path).path).strip("/"))

    do_HEAD = do_GET

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_with_file(self, path: str, etag: str) -> None:
        if self.command == "GET":
            self.server.before_bytes()
        body, status, headers = self.server.files[path], 200, {"ETag": f'"{etag}"'}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            body, status = body[start : end + 1], 206
        self.reply(status, body, **headers)


class HubHandler(Handler):
    def answer(self, path: str) -> None:
        if match := re.fullmatch(r"api/models/org/name(?:/revision/(.+))?", path):
            if match[1] not in (None, "v1", "refs/pr/2", self.server.commit):
                self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
                return
            files = [
                {"rfilename": name, "size": self.server.announced.get(name, len(body))}
                for name, body in self.server.files.items()
            ]
            about = {"id": "org/name", "sha": self.server.commit, "siblings": files}
            self.reply(200, json.dumps(about).encode(), Content_Type="application/json")
            return
        match = re.fullmatch(rf"org/name/resolve/{self.server.commit}/(.+)", path)
        if match and match[1] in self.server.files:
            self.reply_with_file(match[1], self.server.commit)
        else:
            self.reply(404, b"{}", X_Error_Code="RepoNotFound")


class S3Handler(Handler):
    def answer(self, path: str) -> None:
        if "list-type" in parse_qs(urlsplit(self.path).query):
            self.reply(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        elif path not in self.server.files:
            self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            etag = str(hash(self.server.files[path]))
            if self.headers.get("If-Match", f'"{etag}"') != f'"{etag}"':
                self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                self.reply_with_file(path, etag)


@pytest.fixture
def serve() -> Iterator[Callable[[type[Handler]], Remote]]:
    servers = []

    def start(handler: type[Handler]) -> Remote:
        servers.append(Remote(handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        return servers[-1]

    yield start
    for server in servers:
        server.heard.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(serve, monkeypatch, tmp_path) -> Remote:
    remote = serve(HubHandler)
    remote.files = dict(FILES)
    # What HF_ENDPOINT and HF_TOKEN set; the library reads the former when it is imported.
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, remote.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", remote.url)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return remote


@pytest.fixture
def s3(serve, monkeypatch) -> Remote:
    remote = serve(S3Handler)
    remote.files = {f"bucket/team/mine/{name}": body for name, body in FILES.items()}
    for name, value in {
        "AWS_ENDPOINT_URL": remote.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    return remote


@pytest.fixture(params=["hub", "s3"])
def remote(request) -> tuple[Remote, str]:
    server = request.getfixturevalue(request.param)
    return server, {"hub": "hf://org/name", "s3": "s3://bucket/team/mine"}[request.param]


def failure(source: str, root: Path, **kwargs: int) -> AdapterSourceError:
    """How fetching fails; nothing of it stays in the cache."""
    with pytest.raises(AdapterSourceError) as caught:
        fetch_adapter(source, root, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert not any(secret in message for secret in (HUB_TOKEN, S3_SECRET, str(root), "127.0.0.1"))
    cache = root / ".cache"
    assert not cache.is_dir() or not list(cache.iterdir())
    return caught.value


def make_old(root: Path) -> None:
    for entry in (root / ".cache").iterdir():
        os.utime(entry, (0, 0))


def test_an_adapter_is_fetched_once_a_version(remote, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server, source = remote
    fetched = fetch_adapter(source, tmp_path)
    assert fetched.source == source
    assert fetched.folder.parent == tmp_path / ".cache"
    assert {path.name: path.read_bytes() for path in fetched.folder.iterdir()} == FILES
    assert os.listdir(tmp_path / ".cache") == [fetched.folder.name]

    def bytes_again() -> None:
        raise AssertionError("fetched again")

    server.before_bytes = bytes_again
    assert fetch_adapter(f"{source}/", tmp_path) == fetched
    shown = caplog.text + str([record.__dict__ for record in caplog.records])
    assert not any(secret in shown for secret in (HUB_TOKEN, S3_SECRET))


def test_a_new_version_lies_beside_the_old_one(remote, tmp_path):
    server, source = remote
    old = fetch_adapter(source, tmp_path)
    for name in list(server.files):
        server.files[name] += b" "
    server.commit = "ba5eba11" * 5
    new = fetch_adapter(source, tmp_path)
    assert new.version != old.version
    for fetched, end in ((old, b""), (new, b" ")):
        assert (fetched.folder / "adapter_config.json").read_bytes() == CONFIG + end
        assert (fetched.folder / "adapter_model.safetensors").read_bytes() == WEIGHTS + end
    prune_cache(tmp_path, {new.folder})
    assert len(os.listdir(tmp_path / ".cache")) == 2  # the old one is too young
    make_old(tmp_path)
    prune_cache(tmp_path, {new.folder})
    assert os.listdir(tmp_path / ".cache") == [new.folder.name]


@pytest.mark.parametrize("source", ["hf://org/name@v1/a/b", "hf://org/name@refs%2Fpr%2F2/a/b"])
def test_a_revision_and_a_subfolder_of_the_hub(hub, tmp_path, source):
    hub.files = {f"a/b/{name}": body for name, body in FILES.items()}
    fetched = fetch_adapter(source, tmp_path)
    assert fetched.version == COMMIT
    assert (fetched.folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "source",
    [
        "",
        "hf://",
        "hf://name",
        "hf://org/name@",
        "hf://org/name@a/b/../../c",
        "hf://org/name/../other",
        "hf://org/name//a",
        "hf://../name",
        "hf://org/name@v1%2f..%2fx?y",
        "hf://datasets/org/name@v\n1",
        "s3://",
        "s3://b",
        "s3://Bucket/x",
        "s3://bucket/../x",
        "s3://bucket/a?versionId=1",
        "s3://bucket/a*",
        "s3://key:secret@bucket/x",
        "file:///etc",
        "memory://x",
        "http://127.0.0.1/x",
        "https://example.com/x",
        "/etc/passwd",
        "github://org:repo@main/x",
        "simplecache::s3://bucket/x",
        "hf://org/name/" + "x" * 2000,
    ],
)
def test_what_is_no_source(hub, s3, tmp_path, source):
    error = failure(source, tmp_path)
    assert error.code == "adapter_source_invalid"
    assert "s3://bucket/prefix" in str(error)
    assert hub.requests == s3.requests == []


def test_what_is_not_there(remote, tmp_path):
    server, source = remote
    name = next(name for name in server.files if name.endswith(".safetensors"))
    del server.files[name]
    assert failure(source, tmp_path).code == "adapter_source_not_found"
    server.files.clear()
    assert failure(source, tmp_path).code == "adapter_source_not_found"
    assert failure("hf://org/other", tmp_path).code != "adapter_source_invalid"


def test_an_unknown_revision(hub, tmp_path):
    assert failure("hf://org/name@v7", tmp_path).code == "adapter_source_not_found"


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_source_that_refuses(remote, tmp_path, status, caplog):
    server, source = remote
    server.status = status
    error = failure(source, tmp_path)
    # The hub answers 401 to who may not know that there is nothing.
    assert error.code in ("adapter_source_unavailable", "adapter_source_not_found")
    if status == 403:
        assert "credentials" in str(error)
    shown = caplog.text + str([record.__dict__ for record in caplog.records])
    assert source in shown
    assert not any(secret in shown for secret in (HUB_TOKEN, S3_SECRET))


def test_a_source_that_is_down(remote, tmp_path):
    server, source = remote
    server.shutdown()
    server.server_close()
    assert failure(source, tmp_path).code == "adapter_source_unavailable"


def test_sizes_are_limited_before_a_byte_comes(remote, tmp_path):
    server, source = remote
    error = failure(source, tmp_path, max_bytes=len(WEIGHTS) - 1)
    assert error.code == "adapter_too_large"
    assert "adapter_model.safetensors" in str(error)
    assert not any("resolve" in request for request in server.requests)
    assert not any(request.startswith("GET /bucket") for request in server.requests)
    for name in server.files:
        if name.endswith(".json"):
            server.files[name] = b" " * (2**20 + 1)
    assert failure(source, tmp_path).code == "adapter_too_large"
    for name in server.files:
        if name.endswith(".json"):
            server.files[name] = CONFIG
    assert fetch_adapter(source, tmp_path, max_bytes=len(WEIGHTS)).folder.is_dir()


@pytest.mark.parametrize("difference", [-1, 1, -len(WEIGHTS) + 1])
def test_a_hub_that_announces_another_size(hub, tmp_path, difference):
    hub.announced["adapter_model.safetensors"] = len(WEIGHTS) + difference
    error = failure("hf://org/name", tmp_path)
    assert error.code == "adapter_source_unavailable"
    assert "announced" in str(error)


def test_a_file_that_changes_while_it_is_read(s3, tmp_path):
    name = "bucket/team/mine/adapter_model.safetensors"
    num_reads = 0

    def change() -> None:
        nonlocal num_reads
        num_reads += 1
        if num_reads == 1:  # the configuration; the weights' size and tag are known by then
            s3.files[name] = bytes(reversed(WEIGHTS))

    s3.before_bytes = change
    assert failure("s3://bucket/team/mine", tmp_path).code == "adapter_source_unavailable"
    s3.before_bytes = lambda: None
    fetched = fetch_adapter("s3://bucket/team/mine", tmp_path)
    assert (fetched.folder / "adapter_model.safetensors").read_bytes() == bytes(reversed(WEIGHTS))


@pytest.mark.parametrize(
    "silent", ["/api/models/org/name?", "/revision/", "/adapter_config", "/adapter_model"]
)
def test_a_hub_that_never_answers(hub, tmp_path, monkeypatch, silent):
    hub.silent = silent
    with monkeypatch.context() as shorter:
        shorter.setattr(sources, "_REQUEST_SECONDS", 0.2)
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            assert 0 < getattr(huggingface_hub.constants, name) <= 10
            shorter.setattr(huggingface_hub.constants, name, 0.2)
        error = failure("hf://org/name", tmp_path)
    assert error.code == "adapter_source_unavailable"
    assert "too long" in str(error)
    assert any(silent in request for request in hub.requests)
    # There is no request beside these, so none without a limit.
    hub.silent = "nothing"
    hub.requests.clear()
    fetch_adapter("hf://org/name", tmp_path)
    assert [request for request in hub.requests if "org/name" in request] == [
        "GET /api/models/org/name?blobs=true",
        f"GET /api/models/org/name/revision/{COMMIT}",
        f"GET /org/name/resolve/{COMMIT}/adapter_config.json",
        f"GET /org/name/resolve/{COMMIT}/adapter_model.safetensors",
    ]


def test_a_source_that_trickles(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_SECONDS", -1.0)
    error = failure("hf://org/name", tmp_path)
    assert error.code == "adapter_source_unavailable"
    assert "too long" in str(error)


def test_a_full_disk(hub, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "fsync", full)
    error = failure("hf://org/name", tmp_path)
    assert (error.code, "No space left" in str(error)) == ("adapter_cache_unwritable", True)


def test_the_cache_is_no_link(hub, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterSourceError) as caught:
        fetch_adapter("hf://org/name", tmp_path / "root")
    assert caught.value.code == "adapter_cache_unwritable"
    prune_cache(tmp_path / "root", ())
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_a_broken_download_left_is_pruned(hub, tmp_path):
    prune_cache(tmp_path, ())
    fetched = fetch_adapter("hf://org/name", tmp_path)
    (tmp_path / ".cache" / ".partial-x").mkdir()
    make_old(tmp_path)
    prune_cache(tmp_path, [fetched.folder])
    assert os.listdir(tmp_path / ".cache") == [fetched.folder.name]
    fetch_adapter("hf://org/name", tmp_path)  # which makes it young again
    prune_cache(tmp_path, ())
    assert os.listdir(tmp_path / ".cache") == [fetched.folder.name]
    make_old(tmp_path)
    prune_cache(tmp_path, ())
    assert os.listdir(tmp_path / ".cache") == []


def test_two_who_fetch_the_same(hub, tmp_path):
    both = threading.Barrier(2, timeout=20)
    hub.before_bytes = both.wait
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch_adapter("hf://org/name", tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert os.listdir(tmp_path / ".cache") == [results[0].folder.name]


def test_a_server_without_s3(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    error = failure("s3://bucket/x", tmp_path)
    assert error.code == "adapter_source_unavailable"
    assert "malora[s3]" in str(error)


def test_the_environment_names_the_hub_and_nothing_loads_torch(hub, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from malora_server.adapters.sources import fetch_adapter\n"
        "print(fetch_adapter('hf://org/name', Path(sys.argv[1])).folder.name)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (
        tmp_path / ".cache" / done.stdout.strip() / "adapter_config.json"
    ).read_bytes() == CONFIG
