"""Adapters that come, change and go while the server runs, through the SDK."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from malora import cli
from malora.base_model import PATH as BASE
from malora_client import (
    AsyncClient,
    BadRequestError,
    Client,
    ConflictError,
    InternalServerError,
    NotFoundError,
)

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PROMPT = "Once upon a time there were four numbers: one, two, three, four, five, six, seven"
MANIFEST = ".malora-adapters.json"


@pytest.fixture(scope="module")
def root(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapters folder of this module's own, and what its tests bring there in `new`."""
    folder = tmp_path_factory.mktemp("lifecycle")
    for name in ("experts", "lora", "nan"):
        shutil.copytree(adapters / name, folder / name)
    return folder


def flags(root: Path) -> tuple[object, ...]:
    return (
        "--base",
        BASE,
        "--served-model-name",
        "base",
        "--adapters",
        root,
        "--kv-cache-memory",
        "64MiB",
    )


@pytest.fixture(scope="module")
def own_url(serve: Callable[..., Any], root: Path) -> Iterator[str]:
    with serve(*flags(root)) as url:
        yield url


@pytest.fixture
def own(own_url: str) -> Iterator[Client]:
    with Client(base_url=own_url, max_retries=0) as client:
        yield client


def complete(client: Client, model: str, **params: Any) -> Any:
    return client.completions.create(
        **{"model": model, "prompt": PROMPT, "max_tokens": 8, **GREEDY, **params}
    )


def text(client: Client, model: str, **params: Any) -> str:
    return str(complete(client, model, **params).choices[0].text)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def put_folder(source: Path, target: Path) -> None:
    """A whole folder at once, in place of what was there."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.copytree(source, partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def test_nothing_is_read_before_it_is_asked_for(own: Client) -> None:
    experts = own.adapters.retrieve("experts")
    assert (experts.state, experts.generation, experts.device_bytes) == ("unloaded", None, 0)
    assert (experts.peft_type, experts.num_experts, experts.r) == ("MALORA", 8, 4)
    reply = complete(own, "experts")
    experts = own.adapters.retrieve("experts")
    assert experts.state == "device"
    assert experts.device_bytes == experts.host_bytes > 0
    assert experts.generation == reply.system_fingerprint == (experts.digest or "")[:16]
    assert (experts.in_flight, experts.source) == (0, "experts")
    assert time.time() - (experts.last_used or 0) < 60
    assert (experts.load_seconds or 0) > 0


def test_a_folder_is_served_as_soon_as_it_is_there_and_no_more_when_it_is_gone(
    own: Client, root: Path, adapters: Path
) -> None:
    with pytest.raises(NotFoundError):
        complete(own, "noticed")
    put_folder(adapters / "compact", root / "noticed")
    first = complete(own, "noticed")
    put_folder(adapters / "dense", root / "noticed")
    wait_for(lambda: complete(own, "noticed").system_fingerprint != first.system_fingerprint)
    assert text(own, "noticed") != first.choices[0].text
    shutil.rmtree(root / "noticed")
    wait_for(lambda: "noticed" not in {model.id for model in own.models.list()})
    with pytest.raises(NotFoundError):
        complete(own, "noticed")
    put_folder(adapters / "compact", root / "listed")
    wait_for(lambda: "listed" in {model.id for model in own.models.list()})
    shutil.rmtree(root / "listed")


def test_a_broken_folder_is_served_once_it_is_mended(
    own: Client, root: Path, adapters: Path
) -> None:
    for _ in range(2):
        with pytest.raises(BadRequestError) as broken:
            complete(own, "nan")
        assert broken.value.code == "adapter_not_finite"
    put_folder(adapters / "compact", root / "nan")
    assert complete(own, "nan").choices[0].text
    put_folder(adapters / "nan", root / "nan")


def test_a_combination_says_what_pefts_weighted_sum_says(
    own: Client, root: Path, tmp_path: Path
) -> None:
    """`malora combine` against transformers with PEFT's add_weighted_adapter, token by token."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    other = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj", "down_proj"])
    torch.manual_seed(11)
    model = peft.get_peft_model(base, other, adapter_name="other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    model.load_adapter(root / "lora", adapter_name="first")
    model.add_weighted_adapter(["first", "other"], [0.75, -0.5], "both", combination_type="cat")
    model.set_adapter("both")
    parts = [f"{root / 'lora'}=0.75", f"{tmp_path / 'other'}=-0.5"]
    combined = CliRunner().invoke(cli.app, ["combine", *parts, "--out", str(tmp_path / "both")])
    assert combined.exit_code == 0, combined.stderr
    put_folder(tmp_path / "both", root / "combined")
    reply = complete(own, "combined", max_tokens=24, logprobs=0)
    ids = own.tokenize(prompt=PROMPT).tokens
    with torch.no_grad():
        for got in reply.choices[0].logprobs.token_logprobs:
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert got == pytest.approx(float(logprobs.max()), abs=1e-4)
            ids.append(int(logprobs.argmax()))
    assert AutoTokenizer.from_pretrained(BASE).decode(ids[-24:]) == reply.choices[0].text
    assert reply.choices[0].text != text(own, "lora", max_tokens=24)
    shutil.rmtree(root / "combined")


async def test_replacing_under_load_is_atomic_and_nothing_is_stale(
    own: Client, own_url: str, root: Path, adapters: Path
) -> None:
    """Every answer is wholly one generation's, the one that its fingerprint names."""
    put_folder(adapters / "compact", root / "swapped")
    put_folder(adapters / "dense", root / "other")
    truth = {}
    for name in ("swapped", "other"):
        reply = complete(own, name, max_tokens=24)
        truth[reply.system_fingerprint] = reply.choices[0].text
    assert len(set(truth.values())) == 2
    generations = {name: own.adapters.retrieve(name).generation for name in ("swapped", "other")}
    seen: list[str] = []
    stopping = False

    async def ask(client: AsyncClient) -> None:
        while not stopping:
            reply = await client.completions.create(
                model="swapped", prompt=PROMPT, max_tokens=24, **GREEDY
            )
            assert reply.choices[0].text == truth[reply.system_fingerprint or ""]
            seen.append(reply.system_fingerprint or "")

    async with (
        AsyncClient(base_url=own_url, max_retries=0) as client,
        asyncio.timeout(60),
        asyncio.TaskGroup() as asking,
    ):
        for _ in range(4):
            asking.create_task(ask(client))
        for turn in range(6):
            source = ("other", "swapped")[turn % 2]
            loaded = await client.adapters.load("swapped", source=source)
            assert loaded.generation == generations[source]
            # Whoever asks from here on gets the new one.
            reply = await client.completions.create(
                model="swapped", prompt=PROMPT, max_tokens=2, **GREEDY
            )
            assert reply.system_fingerprint == generations[source]
            seen.clear()
            while generations[source] not in seen:  # so that changes meet requests of both
                await asyncio.sleep(0.01)
        stopping = True


def test_a_replacement_that_is_broken_changes_nothing(own: Client, root: Path) -> None:
    before = complete(own, "experts")
    with pytest.raises(BadRequestError) as broken:
        own.adapters.load("experts", source="nan")
    assert broken.value.code == "adapter_not_finite"
    after = complete(own, "experts")
    assert after.system_fingerprint == before.system_fingerprint
    with pytest.raises(NotFoundError) as missing:
        own.adapters.load("experts", source="nowhere")
    assert missing.value.code == "adapter_not_found"
    assert own.adapters.retrieve("experts").source == "experts"


def test_compare_and_swap(own: Client) -> None:
    generation = complete(own, "experts").system_fingerprint
    with pytest.raises(ConflictError) as mismatch:
        own.adapters.load("experts", source="lora", expected_generation="0" * 16)
    assert mismatch.value.code == "generation_mismatch"
    assert complete(own, "experts").system_fingerprint == generation
    swapped = own.adapters.load("experts", source="lora", expected_generation=generation)
    assert swapped.generation not in (None, generation)
    back = own.adapters.load("experts", source="experts", expected_generation=swapped.generation)
    assert back.generation == generation


async def test_one_change_of_a_name_at_a_time(own_url: str) -> None:
    engines = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has ended
            if "malora_server.engine.process" in process.cmdline():
                engines.append(process)
    async with AsyncClient(base_url=own_url, max_retries=0) as client:
        changes = [client.adapters.load("lora") for _ in range(4)]
        tasks = [asyncio.ensure_future(each) for each in [*changes, client.adapters.unpin("lora")]]
        for engine in engines:
            engine.suspend()  # so that the first one lasts until all have come
        try:
            async with asyncio.timeout(20):
                while sum(task.done() for task in tasks) < 4:
                    await asyncio.sleep(0.01)
        finally:
            for engine in engines:
                engine.resume()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    codes = [getattr(result, "code", None) for result in results]
    assert codes.count("adapter_busy") == 4
    assert codes.count(None) == 1


def test_unloading_gives_memory_back_and_hides_the_folder(
    own: Client, root: Path, adapters: Path, own_url: str
) -> None:
    put_folder(adapters / "dense", root / "leaving")
    complete(own, "leaving")
    others = sum(a.host_bytes for a in own.adapters.list() if a.name != "leaving")
    assert own.adapters.unload("leaving").deleted
    with pytest.raises(NotFoundError):
        complete(own, "leaving")
    with pytest.raises(NotFoundError):
        own.adapters.unload("leaving")
    time.sleep(2.5)  # the folder is looked at meanwhile
    assert "leaving" not in {adapter.name for adapter in own.adapters.list()}
    # What earlier tests replaced may have been given up since, too.
    assert sum(adapter.host_bytes for adapter in own.adapters.list()) <= others
    assert (root / "leaving").is_dir()
    assert own.adapters.load("leaving").state in ("host", "device")
    assert complete(own, "leaving").choices[0].text


def test_vllms_routes(own_url: str, own: Client, root: Path, adapters: Path) -> None:
    put_folder(adapters / "compact", root / "team")
    load, unload = f"{own_url}/v1/load_lora_adapter", f"{own_url}/v1/unload_lora_adapter"
    body = {"lora_name": "vllms", "lora_path": str(root / "team")}
    reply = httpx.post(load, json=body, timeout=60)
    assert (reply.status_code, reply.json()["name"]) == (200, "vllms")
    assert complete(own, "vllms").choices[0].text == complete(own, "team").choices[0].text
    reply = httpx.post(load, json=body, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_exists")
    reply = httpx.post(load, json={**body, "lora_path": "lora", "load_inplace": True}, timeout=60)
    assert reply.json()["source"] == "lora"
    assert complete(own, "vllms").choices[0].text == complete(own, "lora").choices[0].text
    assert httpx.post(unload, json={"lora_name": "vllms"}, timeout=60).json()["deleted"] is True
    reply = httpx.post(unload, json={"lora_name": "vllms"}, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "source",
    [
        "..",
        "../lifecycle/lora",
        "lora/..",
        "lora/../lora",
        "/etc",
        "/",
        ".",
        "",
        ".hidden",
        "lora/.hidden",
        "linked",
        "linked/inner",
        "a\\b",
        "file:///etc",
    ],
)
def test_no_path_leads_out_of_the_folder(
    own: Client, root: Path, adapters: Path, source: str, tmp_path: Path
) -> None:
    (root / ".hidden").mkdir(exist_ok=True)
    if not (root / "linked").is_symlink():
        (root / "linked").symlink_to(adapters)
    with pytest.raises(BadRequestError) as refused:
        own.adapters.load("evil", source=source)
    wanted = "adapter_source_invalid" if "://" in source else "adapter_path_forbidden"
    assert refused.value.code == wanted
    assert str(root) not in str(refused.value)
    for name in ("linked", ".hidden"):
        with pytest.raises(NotFoundError):
            complete(own, name)


@pytest.mark.parametrize("name", [".x", "a%2Fb", "..", "base", "x" * 300, "a\\b"])
def test_no_name_is_more_than_a_folders(own_url: str, name: str) -> None:
    reply = httpx.put(f"{own_url}/v1/adapters/{name}", json={"source": "lora"}, timeout=60)
    assert reply.status_code in (400, 404, 405)
    assert reply.json()["error"]["code"]


def test_a_manifest_that_cannot_be_written_changes_nothing(own: Client, root: Path) -> None:
    before = complete(own, "lora").system_fingerprint
    manifest = root / MANIFEST
    kept = manifest.read_bytes() if manifest.exists() else None
    manifest.unlink(missing_ok=True)
    manifest.mkdir()  # which no file can replace
    (manifest / "full").touch()
    try:
        for change in (
            lambda: own.adapters.load("lora", source="experts"),
            lambda: own.adapters.unload("lora"),
            lambda: own.adapters.pin("lora"),
        ):
            with pytest.raises(InternalServerError) as failed:
                change()
            assert failed.value.code == "manifest_unwritable"
            assert complete(own, "lora").system_fingerprint == before
            assert not own.adapters.retrieve("lora").pinned
    finally:
        shutil.rmtree(manifest)
        if kept is not None:
            manifest.write_bytes(kept)


def test_a_restart_knows_what_was_loaded_pinned_and_removed(
    serve: Callable[..., Any], adapters: Path, tmp_path: Path
) -> None:
    root = tmp_path / "adapters"
    for name in ("experts", "lora", "compact"):
        shutil.copytree(adapters / name, root / name)
    shutil.copytree(adapters / "dense", root / "team" / "dense")
    with serve(*flags(root)) as url, Client(base_url=url, max_retries=0) as client:
        client.adapters.load("mine", source="team/dense")
        client.adapters.pin("lora")
        client.adapters.unload("compact")
        want = {name: text(client, name) for name in ("mine", "lora")}
    manifest = json.loads((root / MANIFEST).read_text())
    assert manifest["removed"] == ["compact"]
    with serve(*flags(root)) as url, Client(base_url=url, max_retries=0) as client:
        listed = {adapter.name: adapter for adapter in client.adapters.list()}
        assert {"experts", "lora", "mine"} <= set(listed)
        assert "compact" not in listed
        assert listed["mine"].source == "team/dense"
        wait_for(lambda: client.adapters.retrieve("lora").state == "device")
        assert client.adapters.retrieve("lora").pinned
        assert {name: text(client, name) for name in want} == want
        assert client.adapters.load("compact").source == "compact"
