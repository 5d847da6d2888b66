"""The loader process from its start to its end."""

import os
import subprocess
import sys

import psutil
import pytest

from malora_server.adapters import loader_process


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """A loader beside the one that other tests' engines have."""
    monkeypatch.setattr(loader_process, "_current", None)
    yield
    loader_process.stop()


def test_there_is_one_until_it_ends():
    first = loader_process.start()
    assert loader_process.start() is first
    first.popen.kill()
    first.popen.wait()
    assert loader_process.start() is not first


def test_a_link_is_to_one_that_lives():
    first = loader_process.start()
    first.control.close()  # it is ending, and nobody has seen it yet
    first.popen.kill()
    with open(os.memfd_create("memory")) as memory:
        process, link = loader_process.connect(memory.fileno())
    with link:
        assert process is loader_process.start()
        assert process.popen.poll() is None


def test_stopped_it_is_gone_at_once():
    pid = loader_process.start().popen.pid
    loader_process.stop()
    assert not psutil.pid_exists(pid), "a process that is not waited for is left"
    loader_process.stop()  # nothing to do


def test_an_engines_process_comes_to_start_it_without_imports_that_take_seconds():
    code = "import sys, malora_server.engine.process; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft"} & set(run.stdout.split())
