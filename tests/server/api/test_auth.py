"""API keys: what is behind them, and that they are never shown."""

import logging
import os
import subprocess
import sys

import httpx
import openai
import pytest
from starlette.responses import Response
from starlette.routing import Route

from malora_client import AuthenticationError, Client
from malora_server.app import create_app
from malora_server.settings import Settings, StartError, parse_settings

KEY, OTHER = "sk-first-0123456789", "sk-second-9876543210"
ADMIN = "sk-admin-5555555555"
CHANGES = [
    ("PUT", "/v1/adapters/a"),
    ("DELETE", "/v1/adapters/a/b"),
    ("POST", "/v1/adapters/a/pin"),
    ("POST", "/v1/adapters/a/unpin"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]
"""The routes that change adapters."""


@pytest.fixture
def settings(tmp_path, adapters):
    keys = tmp_path / "keys"
    keys.write_text(f"# tenants\n{OTHER}  # the second\n\n")
    return Settings(
        base="models/tiny", adapters=adapters, api_key=KEY, api_keys_file=keys, admin_key=ADMIN
    )


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


@pytest.mark.parametrize(
    "header", [f"Bearer {KEY}", f"bearer {OTHER}", f"Bearer  {KEY}", f"Bearer {ADMIN}"]
)
async def test_each_key_opens(client, header):
    headers = {"Authorization": header}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.get("/metrics", headers=headers)).status_code == 200


@pytest.fixture
def ask(engine, tokenizer):
    """The status and the error's code of a request to an application with these settings."""

    async def ask(settings, method, path, key=None):
        app = create_app(Settings(base="models/tiny", **settings), engine, tokenizer)
        app.router.routes.insert(0, Route("/{any:path}", reached, methods=[method]))
        transport = httpx.ASGITransport(app)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://malora") as client:
            reply = await client.request(method, path, headers=headers, content=b"{}")
        return reply.status_code, None if reply.is_success else reply.json()["error"]["code"]

    async def reached(request):
        return Response()

    return ask


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_who_may_change_adapters(ask, method, path):
    both = {"api_key": KEY, "admin_key": ADMIN}
    refused, unknown = (403, "admin_key_required"), (401, "invalid_api_key")
    assert await ask(both, method, path, ADMIN) == (200, None)
    assert await ask(both, method, path, KEY) == refused
    assert await ask(both, method, path, "wrong") == unknown
    assert await ask(both, method, path) == unknown
    assert await ask({"api_key": KEY}, method, path, KEY) == refused
    assert await ask({"api_key": KEY}, method, path) == unknown
    assert await ask({"admin_key": ADMIN}, method, path, ADMIN) == (200, None)
    assert await ask({"admin_key": ADMIN}, method, path, "wrong") == unknown
    assert await ask({"admin_key": ADMIN}, method, path) == unknown
    assert await ask({}, method, path) == (200, None)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/adapters/a"), ("POST", "/v1/completions"), ("GET", "/docs")]
)
async def test_other_routes_are_open_to_both_kinds_of_keys(ask, method, path):
    for settings in ({"api_key": KEY, "admin_key": ADMIN}, {"admin_key": ADMIN}):
        for key in (KEY, ADMIN):
            assert await ask(settings, method, path, key) == (200, None)
    assert await ask({"api_key": KEY, "admin_key": ADMIN}, method, path) == (401, "invalid_api_key")
    assert await ask({"admin_key": ADMIN}, method, path) == (200, None)


@pytest.mark.parametrize(
    "path", ["/v1/adapters/%61", "/v1/adapters/", "/v1/load_lora_adapter/", "/v1/adapters/a/new"]
)
async def test_no_spelling_of_a_path_goes_round_the_admin_key(ask, path):
    assert await ask({"api_key": KEY}, "POST", path, KEY) == (403, "admin_key_required")
    assert await ask({"api_key": KEY}, "PATCH", path, KEY) == (403, "admin_key_required")


def test_admin_keys_come_from_a_file_too(tmp_path):
    file = tmp_path / "admin"
    file.write_text(f"{ADMIN}\n{OTHER}\n")
    settings = parse_settings(["--admin-key-file", str(file), "--admin-key", KEY])
    assert settings.admin_keys() == {ADMIN, OTHER, KEY}
    assert settings.api_keys() == set()
    assert KEY not in repr(settings)


def test_an_api_key_is_no_admin_key():
    with pytest.raises(StartError, match="among the API keys") as error:
        Settings(base="models/tiny", api_key=KEY, admin_key=KEY).admin_keys()
    assert KEY not in str(error.value)


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
    for key in (KEY, OTHER, ADMIN, "sk-wrong-5555"):
        await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert "request" in caplog.text
    shown = caplog.text + str([record.__dict__ for record in caplog.records])
    assert not any(key in shown for key in (KEY, OTHER, ADMIN, "sk-wrong-5555"))


def test_keys_do_not_show_in_settings(settings):
    assert not any(key in repr(settings) + str(settings) for key in (KEY, ADMIN))


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
