"""An adapter from a hub: fetched by a call, served, and known after a restart without the hub."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest

from malora.base_model import PATH as BASE

COMMIT = "c0ffee" * 6 + "beef"
FILES = ("adapter_config.json", "adapter_model.safetensors")
BODY = {"model": "fetched", "prompt": "Hello there", "max_tokens": 8, "temperature": 0}


@pytest.fixture
def hub(adapters):
    """A server that speaks as much of the hub's API as it takes to fetch one adapter."""
    files = {name: (adapters / "experts" / name).read_bytes() for name in FILES}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            path = urlsplit(self.path).path
            body = files.get(path.removeprefix(f"/org/name/resolve/{COMMIT}/"))
            if path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": name, "size": len(files[name])} for name in FILES]
                body = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_adapter_from_a_hub(launch, greedy, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MALORA_ADMIN_KEY", "sk-admin")
    root = tmp_path / "adapters"
    root.mkdir()
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", root)
    want = greedy([BODY["prompt"]], ["experts"], 8)[0].text
    server = launch(*flags)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        put = {"source": "hf://org/name"}
        refused = client.put("/v1/adapters/fetched", json=put)
        assert (refused.status_code, list(root.iterdir())) == (401, [])
        client.headers["Authorization"] = "Bearer sk-admin"
        missing = client.put("/v1/adapters/fetched", json={"source": "hf://org/other"})
        assert missing.json()["error"]["code"] == "adapter_source_not_found"
        assert missing.status_code == 404
        assert client.put("/v1/adapters/fetched", json=put).is_success
        assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == want
    assert server.stop() == 0
    # Addresses of files may be signed, and be good for whoever reads the log.
    assert "fetching hf://org/other failed" in server.log.read_text()
    assert f"/resolve/{COMMIT}" not in server.log.read_text()
    hub.shutdown()
    hub.server_close()
    server = launch(*flags)
    reply = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert reply.json()["choices"][0]["text"] == want
    assert server.stop() == 0
