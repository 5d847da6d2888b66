"""API keys: what is behind them, and that they are never shown."""

import logging
import os
import subprocess
import sys

import httpx
import openai
import pytest

from malora_client import AuthenticationError, Client
from malora_server.app import create_app
from malora_server.settings import Settings, StartError, parse_settings

KEY, OTHER = "sk-first-0123456789", "sk-second-9876543210"


@pytest.fixture
def settings(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"# tenants\n{OTHER}  # the second\n\n")
    return Settings(base="models/tiny", api_key=KEY, api_keys_file=keys)


def routes(app):
    documented = [
        (method.upper(), path.replace("{name}", "sql").replace("{model}", "sql"))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    ]
    return [*documented, ("GET", "/docs"), ("GET", "/openapi.json")]


async def test_every_route_but_health_is_behind_the_keys(app, client):
    assert ("POST", "/v1/completions") in routes(app)
    for method, path in routes(app):
        reply = await client.request(method, path)
        if path == "/health":
            assert reply.status_code == 200
            continue
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert "x-request-id" in reply.headers
    assert (await client.get("/no/such/route")).status_code == 401


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer é",
    ],
)
async def test_a_wrong_key_is_refused(client, header):
    reply = await client.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert reply.status_code == 401


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {OTHER}", f"Bearer  {KEY}"])
async def test_each_key_opens(client, header):
    headers = {"Authorization": header}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.get("/metrics", headers=headers)).status_code == 200


async def test_without_keys_everybody_may(engine, tokenizer):
    app = create_app(Settings(base="models/tiny"), engine, tokenizer)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://malora"
    ) as client:
        assert (await client.get("/v1/models")).status_code == 200


def test_the_clients_send_their_key(url):
    for key in (KEY, OTHER):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
            reply = client.completions.create(model="sql", prompt="the", max_tokens=3)
            assert reply.usage.completion_tokens == 3
        with Client(base_url=url, api_key=key) as ours:
            assert ours.models.list().data
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with Client(base_url=url, api_key="wrong") as ours, pytest.raises(AuthenticationError):
        ours.models.list()


def test_a_large_body_without_a_key_gets_its_answer(url):
    reply = httpx.post(f"{url}/v1/completions", content=b"x" * (20 << 20), timeout=20)
    assert reply.status_code == 401


async def test_keys_are_never_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    for key in (KEY, OTHER, "sk-wrong-5555"):
        await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert "request" in caplog.text
    shown = caplog.text + str([record.__dict__ for record in caplog.records])
    assert not any(key in shown for key in (KEY, OTHER, "sk-wrong-5555"))


def test_keys_do_not_show_in_settings(settings):
    assert KEY not in repr(settings)
    assert KEY not in str(settings)


@pytest.mark.parametrize("text", ["", "# nothing\n", "two words\n", "schlüssel\n"])
def test_a_file_without_good_keys_stops_the_start(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(StartError, match=str(path)) as error:
        parse_settings(["--api-keys-file", str(path)]).api_keys()
    assert "schlüssel" not in str(error.value)


def test_a_bad_key_stops_the_server_before_it_loads_a_model():
    done = subprocess.run(
        [sys.executable, "-c", "from malora_server.app import main; main([])"],
        env={**os.environ, "MALORA_API_KEY": "with space"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --api-key (or MALORA_API_KEY)")
    assert "with space" not in done.stderr
