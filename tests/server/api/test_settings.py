"""Settings from flags and from the environment."""

import json
import sys
from types import SimpleNamespace

import msgspec
import pytest

from malora_server.app import engine_config
from malora_server.settings import Settings, StartError, parse_settings


def test_flags_come_before_the_environment_and_that_before_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALORA_PORT", "77")
    monkeypatch.setenv("MALORA_MAX_NUM_SEQS", "9")
    monkeypatch.setenv("MALORA_ENABLE_PREFIX_CACHING", "false")
    settings = parse_settings(["--base", "org/model", "--port", "78", "--max-model-len", "512"])
    assert (settings.port, settings.max_num_seqs, settings.max_model_len) == (78, 9, 512)
    assert settings.enable_prefix_caching is False
    assert (settings.host, settings.block_size, settings.dtype) == ("127.0.0.1", 16, "auto")
    assert parse_settings(["--base", "x", "--enable-prefix-caching"]).enable_prefix_caching is True


def test_sizes_of_memory() -> None:
    settings = parse_settings(["--base", "x", "--kv-cache-memory", "4GiB"])
    assert settings.kv_cache_memory == 4 * 2**30
    assert json.loads(msgspec.json.encode(engine_config(settings)))["kv_cache_memory"] == 4 * 2**30


def test_an_infinite_slowdown_is_no_bound() -> None:
    assert engine_config(parse_settings(["--base", "x"])).max_slowdown == 1.5
    config = engine_config(parse_settings(["--base", "x", "--max-slowdown", "inf"]))
    assert json.loads(msgspec.json.encode(config))["max_slowdown"] is None


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--base", "models/tiny"], "tiny"),
        (["--base", "models/tiny/"], "tiny"),
        (["--base", "org/model"], "model"),
        (["--base", "org/model", "--served-model-name", "prod"], "prod"),
    ],
)
def test_the_name_of_the_base_model(argv: list[str], name: str) -> None:
    assert parse_settings(argv).base_name == name


def test_the_base_model_that_ships_along(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(PATH="somewhere")
    monkeypatch.setitem(sys.modules, "malora.base_model", package)
    settings = parse_settings([])
    assert (settings.base, settings.base_name) == ("somewhere", "malora-base")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nope"], "--nope"),
        (["stray"], "stray"),
        (["--base"], "--base"),
        (["--adapters", "/no/such/folder"], "/no/such/folder"),
        (["--port", "many"], "--port"),
        (["--port", "65536"], "--port"),
        (["--dtype", "int8"], "--dtype"),
        (["--kv-cache-memory", "4GX"], "--kv-cache-memory"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--max-slowdown", "0.9"], "--max-slowdown"),
        (["--max-slowdown", "nan"], "--max-slowdown"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout"),
    ],
)
def test_a_bad_flag_is_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(StartError) as caught:
        parse_settings(["--base", "x", *argv])
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


def test_a_bad_variable_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALORA_MAX_LOGPROBS", "-1")
    with pytest.raises(StartError, match="MALORA_MAX_LOGPROBS"):
        parse_settings(["--base", "x"])


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in help_text
