"""What the loader process does: one adapter after the other, and one made to keep it busy."""

import json
import mmap
import os
import socket

import msgspec
import peft
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from malora.format import BaseModelSpec, load_adapter
from malora.kernels.packed import pack_whole
from malora_server.adapters import loader
from malora_server.adapters.loading import (
    MAX_MESSAGE_BYTES,
    Answer,
    Configure,
    Open,
    Opened,
    Pack,
    Packed,
    Refused,
)

CAPACITY = 2**20


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def save_lora(folder, r, **fields):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=r, **fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 2**20], ids=["none kept", "all kept"])
def test_each_adapter_is_packed_as_if_it_were_the_only_one(tmp_path, monkeypatch, kept):
    """Large and small ones, whole and broken ones, in whatever memory the last one left."""
    monkeypatch.setattr(loader, "_KEPT_BYTES", kept)
    torch.manual_seed(0)
    spec = BaseModelSpec.from_model(llama())
    paths = sorted(spec.linears)
    for name, r in (("a", 4), ("b", 8), ("c", 4)):
        save_lora(tmp_path / name, r, lora_alpha=2 * r, target_modules="all-linear")
    broken = tmp_path / "broken" / "adapter_model.safetensors"
    save_lora(broken.parent, 4, target_modules=["q_proj"])
    broken.write_bytes(broken.read_bytes()[:-4] + b"\xff" * 4)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.memfd_create("host")
    os.ftruncate(fd, CAPACITY)
    host = torch.frombuffer(mmap.mmap(fd, CAPACITY), dtype=torch.uint8)
    session = loader._Session(theirs, fd)

    def ask(command):
        ours.sendall(msgspec.msgpack.encode(command))
        assert session.serve()
        return msgspec.msgpack.decode(ours.recv(MAX_MESSAGE_BYTES), type=Answer)

    try:
        ours.sendall(msgspec.msgpack.encode(Configure(spec, paths, "float32", CAPACITY, False, 2)))
        assert session.serve()
        for name in ("a", "b", "a", "c", "broken", "b", "c", "a"):
            opened = ask(Open(str(tmp_path / name)))
            assert isinstance(opened, Opened)
            answer = ask(Pack(0, opened.basis_bytes))
            if name == "broken":
                assert isinstance(answer, Refused)
                assert answer.code == "adapter_not_finite"
                continue
            assert isinstance(answer, Packed)
            adapter = load_adapter(tmp_path / name)
            want, basis, own = pack_whole(adapter.digest, adapter.linears, paths, torch.float32)
            assert answer.packed == want
            end = want.num_bytes
            got = want.views(host[: want.basis_bytes], host[want.basis_bytes : end], torch.float32)
            for path, linear in want.views(basis, own, torch.float32).items():
                assert torch.equal(got[path].basis, linear.basis)
                assert torch.equal(got[path].up, linear.up)
    finally:
        session.close()
        ours.close()


@pytest.mark.parametrize("is_pinned", [False, True])
def test_pages_that_are_there_are_mapped_at_once_and_no_others(is_pinned):
    capacity = 64 * 2**20
    fd = os.memfd_create("host")
    os.ftruncate(fd, capacity)
    ours, theirs = socket.socketpair()
    session = loader._Session(theirs, fd)
    before = psutil.Process().memory_info().rss
    spec = BaseModelSpec("", {}, "")
    session._configure(Configure(spec, [], "float32", capacity, is_pinned, 1))
    mapped = psutil.Process().memory_info().rss - before
    session.close()
    ours.close()
    assert (mapped > capacity * 0.9) == is_pinned


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.|.)*(.|.)*!"},
        {"exclude_modules": "(.|.)*(.|.)*!"},
        {"rank_pattern": {"((.|.)*)*!": 2}},
    ],
    ids=str,
)
def test_an_expression_that_takes_for_ever(tmp_path, monkeypatch, fields):
    spec = BaseModelSpec.from_model(llama())
    save_lora(tmp_path, 2, target_modules=["q_proj"])
    configuration = Configure(spec, sorted(spec.linears), "float32", 0, False, 1)

    def open_it():
        load = loader._Load(tmp_path)
        try:
            return load.attempt(lambda: load.open(configuration))
        finally:
            load.close()

    assert isinstance(open_it(), Opened)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    monkeypatch.setattr(loader, "_MAX_CHECK_SECONDS", 0.2)
    refusal = open_it()
    assert isinstance(refusal, Refused)
    assert refusal.code == "adapter_too_complex"
