"""The engine with less memory than its adapters take: they come, go, fail and are replaced."""

import os
import shutil
import signal
import time
from collections import Counter

import psutil
import pytest
from safetensors.torch import load_file, save_file

from malora_server.adapters import loader_process
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    AdapterVersion,
    LoadAdapter,
    PinAdapter,
    RetireAdapter,
    SamplingParams,
    Submit,
)

SIZES = {"num_experts": 4, "top_k": 2, "r": 4, "basis_dim": 8}
NAMES = ["a", "b", "c", "d", "e"]
DEADLINE = 60


@pytest.fixture(scope="module")
def made(tiny_base, make_adapter, tmp_path_factory):
    base, root = tiny_base("llama"), tmp_path_factory.mktemp("tiers")
    for seed, name in enumerate(NAMES):
        make_adapter(base, root / name, seed, **SIZES)
    return base, root


@pytest.fixture
def root(made, tmp_path):
    """Folders of the test's own."""
    shutil.copytree(made[1], tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.fixture(scope="module")
def size(made):
    """Bytes that one of the adapters takes in a tier."""
    core = EngineCore(EngineConfig(base=str(made[0]), adapters=str(made[1]), num_threads=1))
    Requests(core, made[1]).run(["a"], tokens=1)
    return core.stats().adapters.device_bytes


def make(base, root, size, device=2.0, host=3.0, **options):
    config = EngineConfig(
        base=str(base),
        adapters=str(root),
        adapter_device_memory=int(device * size),
        adapter_host_memory=int(host * size),
        kv_cache_memory=2**23,
        num_threads=1,
        **options,
    )
    return EngineCore(config)


class Requests:
    """Requests to an engine, and what became of them."""

    def __init__(self, core, root):
        self.core, self.root = core, root
        self.tokens, self.ends, self.statuses = {}, {}, {}
        self.count = 0

    def version(self, name, number=0):
        return AdapterVersion(name, number, str(self.root / name))

    def add(self, name, tokens=6, number=0, prompt=None, priority=0):
        self.count += 1
        request_id = f"{name}-{self.count}"
        sampling = SamplingParams(max_tokens=tokens, seed=0, temperature=0.0, ignore_eos=True)
        submit = Submit(
            request_id=request_id,
            prompt_token_ids=prompt or [1, 2, 3, 4, 5],
            sampling=sampling,
            adapter=None if name is None else self.version(name, number),
            priority=priority,
        )
        self.tokens[request_id] = []
        failure = self.core.add(submit)
        if failure is not None:
            self.ends[request_id] = failure
        return request_id

    def step(self):
        if not self.core.is_runnable:
            self.core.wait(1.0)
        outputs = self.core.step()
        for status in outputs.adapters:
            self.statuses[status.name, status.number] = status
        for output in outputs.outputs:
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id] = output
        return outputs

    def finish(self, until=None):
        deadline = time.monotonic() + DEADLINE
        while self.core.has_work and (until is None or not until()):
            assert time.monotonic() < deadline, self.core._scheduler._sequences
            self.step()

    def run(self, names, **options):
        """Each name's tokens, all asked for at once."""
        ids = [self.add(name, **options) for name in names]
        self.finish()
        for i in ids:
            assert self.ends[i].finish_reason == "length", self.ends[i]
        return [self.tokens[i] for i in ids]


def check_empty(core):
    """Nothing is held by anyone."""
    stats = core.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
    assert stats.kv_cache_usage_ratio == 0
    assert all(a.num_requests == a.num_using == 0 for a in core.adapters._adapters.values())


@pytest.fixture(scope="module")
def truth(made):
    """What each adapter says, where there is room for all."""
    core = EngineCore(EngineConfig(base=str(made[0]), adapters=str(made[1]), num_threads=1))
    texts = Requests(core, made[1]).run(NAMES)
    assert len({tuple(text) for text in texts}) == len(NAMES)
    return dict(zip(NAMES, texts, strict=True))


@pytest.mark.parametrize(("device", "host"), [(1.0, 1.0), (1.0, 2.0), (2.0, 3.0), (2.5, 8.0)])
def test_more_adapters_than_memory_are_served_in_turns(made, size, truth, device, host):
    core = make(*made, size, device, host)
    requests = Requests(core, made[1])
    for _ in range(2):
        names = NAMES * 3
        assert requests.run(names) == [truth[name] for name in names]
        check_empty(core)
    stats = core.stats().adapters
    assert stats.device_bytes <= stats.device_capacity
    assert stats.host_bytes <= stats.host_capacity
    assert stats.num_device <= int(device)
    assert stats.device_evictions > 0
    assert (stats.host_evictions > 0) == (host < len(NAMES))
    assert stats.load_failures == 0
    assert stats.loads >= len(NAMES)


def test_with_memory_for_two_three_floods_progress_alike(made, size):
    core = make(*made, size, 2.0, 3.0, max_num_seqs=6)
    requests = Requests(core, made[1])
    requests.run("abc")  # reads them
    served = Counter()
    for name in "abc" * 4:
        requests.add(name, tokens=150)
    deadline = time.monotonic() + DEADLINE
    while sum(served.values()) < 3000:
        assert time.monotonic() < deadline, served
        for output in requests.step().outputs:
            name = output.request_id[0]
            served[name] += len(output.token_ids)
            assert output.error is None
            if output.finish_reason is not None:
                requests.add(name, tokens=150)
        spread = max(served[name] for name in "abc") - min(served[name] for name in "abc")
        # The quantum in tokens, and what a batch adds until the next turn.
        assert spread < 256 + 150, served
    assert core.stats().adapters.device_evictions > 2
    core.abort_all()
    check_empty(core)


def test_host_memory_for_two_lets_three_floods_progress_too(made, size):
    core = make(*made, size, 1.0, 2.0, max_num_seqs=4)
    requests = Requests(core, made[1])
    served = Counter()
    for name in "abc" * 3:
        requests.add(name, tokens=100)
    deadline = time.monotonic() + DEADLINE
    while min(served[name] for name in "abc") < 400:
        assert time.monotonic() < deadline, served
        for output in requests.step().outputs:
            assert output.error is None
            served[output.request_id[0]] += len(output.token_ids)
            if output.finish_reason is not None:
                requests.add(output.request_id[0], tokens=100)
    assert core.stats().adapters.host_evictions > 0
    core.abort_all()
    check_empty(core)


def test_priority_takes_a_place_at_once(made, size):
    core = make(*made, size, 1.0, 2.0)
    requests = Requests(core, made[1])
    slow = requests.add("a", tokens=200)
    requests.finish(until=lambda: len(requests.tokens[slow]) > 3)
    fast = requests.add("b", tokens=3, priority=-1)
    requests.finish(until=lambda: fast in requests.ends)
    assert slow not in requests.ends
    requests.finish()
    assert requests.ends[slow].finish_reason == "length"
    assert len(requests.tokens[slow]) == 200


def test_others_run_on_while_an_adapter_is_read(made, size):
    core = make(*made, size, 2.0, 3.0)
    requests = Requests(core, made[1])
    requests.run(["a"])
    process = psutil.Process(loader_process.start().popen.pid)
    process.suspend()
    try:
        waits = requests.add("b")
        runs = requests.add("a", tokens=20)
        plain = requests.add(None, tokens=20)
        requests.finish(until=lambda: runs in requests.ends and plain in requests.ends)
        assert waits not in requests.ends
        assert not core.is_runnable, "the loop would spin while all wait for the loader"
        assert core.has_work
        assert core.stats().num_requests_waiting == 1
    finally:
        process.resume()
    requests.finish()
    assert requests.ends[waits].finish_reason == "length"


def test_a_loader_that_dies_fails_one_load_and_is_started_again(made, size, truth):
    core = make(*made, size, 2.0, 3.0)
    requests = Requests(core, made[1])
    assert requests.run(["a"]) == [truth["a"]]
    pid = loader_process.start().popen.pid
    psutil.Process(pid).suspend()
    doomed = requests.add("b")
    alive = requests.add("a")
    os.kill(pid, signal.SIGKILL)
    requests.finish()
    assert requests.ends[doomed].error_code == "adapter_load_failed"
    assert "signal 9" in requests.ends[doomed].error
    assert requests.ends[alive].finish_reason == "length"
    assert requests.run(["b", "c"]) == [truth["b"], truth["c"]]
    assert loader_process.start().popen.pid != pid
    assert core.stats().adapters.load_failures == 1
    # It may end while nobody needs it, too.
    process = loader_process.start().popen
    process.kill()
    process.wait()
    assert requests.run(["d"]) == [truth["d"]]
    check_empty(core)


def test_a_replaced_adapter_finishes_what_it_began(made, root, size, truth):
    core = make(made[0], root, size, 3.0, 4.0)
    requests = Requests(core, root)
    prompt = list(range(40))
    want = {n: requests.run([n], tokens=40, prompt=prompt)[0] for n in "ab"}
    old = requests.add("a", tokens=40, prompt=prompt)
    requests.finish(until=lambda: len(requests.tokens[old]) > 5)
    shutil.rmtree(root / "a")
    shutil.copytree(root / "b", root / "a")
    core.manage(RetireAdapter(requests.version("a")))
    new = requests.add("a", tokens=40, prompt=prompt, number=1)
    requests.finish()
    assert requests.tokens[old] == want["a"]
    assert requests.tokens[new] == want["b"], "it has another's keys and values, or weights"
    assert requests.statuses["a", 0].tier == "unloaded"
    assert ("a", 0) not in core.adapters._adapters
    assert requests.statuses["a", 1].digest == requests.statuses["b", 0].digest
    assert requests.statuses["a", 1].digest != requests.statuses["a", 0].digest


def test_weights_are_not_exchanged_under_a_request_that_lost_its_place(made, root, size):
    core = make(made[0], root, size, 1.0, 1.0)
    requests = Requests(core, root)
    begun = requests.add("a", tokens=100)
    requests.finish(until=lambda: len(requests.tokens[begun]) > 5)
    other = requests.add("b", tokens=5, priority=-1)
    shutil.rmtree(root / "a")
    shutil.copytree(root / "c", root / "a")
    requests.finish()
    assert requests.ends[other].finish_reason == "length"
    assert requests.ends[begun].error_code == "adapter_changed"
    check_empty(core)


def test_unloading_gives_the_memory_back(made, root):
    core = EngineCore(EngineConfig(base=str(made[0]), adapters=str(root), num_threads=1))
    requests = Requests(core, root)
    weights = root / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    requests.run(["a", "b"])
    before = core.stats().adapters
    running = requests.add("a", tokens=30)
    requests.step()
    core.manage(RetireAdapter(requests.version("a")))
    assert core.stats().adapters == before, "a request is in flight"
    requests.finish()
    assert requests.ends[running].finish_reason == "length"
    after = core.stats().adapters
    assert (after.num_device, after.num_host) == (1, 1)
    assert after.device_bytes == before.device_bytes // 2
    assert after.host_bytes == before.host_bytes // 2
    core.manage(RetireAdapter(requests.version("b")))
    assert core.stats().adapters.device_bytes == core.stats().adapters.host_bytes == 0
    save_file(tensors, weights)
    assert requests.run(["a"])


def test_pinned_adapters_stay_and_leave_room_or_say_so(made, size):
    core = make(*made, size, 2.0, 3.0)
    requests = Requests(core, made[1])

    def pin(name, pinned=True):
        core.manage(LoadAdapter(requests.version(name)))
        core.manage(PinAdapter(requests.version(name), pinned))
        requests.step()
        requests.finish()
        return requests.statuses[name, 0]

    assert pin("a").pinned
    assert requests.statuses["a", 0].tier == "device"
    requests.run(NAMES[1:] * 2)
    assert requests.statuses["a", 0].tier == "device"
    assert requests.statuses["a", 0].pinned
    assert pin("b").pinned
    refused = pin("c")
    assert (refused.pinned, refused.error_code) == (False, "adapter_no_room")
    alone = requests.add("c")
    requests.finish()
    assert requests.ends[alone].error_code == "adapter_no_room"
    pin("b", False)
    requests.run(["c"])
    check_empty(core)


def test_an_adapter_larger_than_memory_is_refused(made, size):
    core = make(*made, size, 0.5, 3.0)
    requests = Requests(core, made[1])
    refused = requests.add("a")
    requests.finish()
    assert requests.ends[refused].error_code == "adapter_too_large"
    assert "--adapter-device-memory" in requests.ends[refused].error
    with pytest.raises(ValueError, match="--adapter-host-memory"):
        make(*made, size, 2.0, 1.0)


def test_a_shared_basis_is_once_in_each_tier(made, tmp_path):
    for number, name in enumerate("xyz"):
        shutil.copytree(made[1] / "a", tmp_path / name)
        weights = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(weights)
        scaled = {k: v * (1 + number) if k.endswith("up") else v for k, v in tensors.items()}
        save_file(scaled, weights)
    core = EngineCore(EngineConfig(base=str(made[0]), adapters=str(tmp_path), num_threads=1))
    requests = Requests(core, tmp_path)
    texts = requests.run(["x", "y", "z"])
    assert len({tuple(text) for text in texts}) > 1
    packed = core.adapters._adapters["x", 0].packed
    stats = core.stats().adapters
    assert stats.device_bytes == 3 * packed.own_bytes + packed.basis_bytes
    assert stats.host_bytes == stats.device_bytes
    for name in "xy":
        core.manage(RetireAdapter(requests.version(name)))
    assert core.stats().adapters.host_bytes == packed.own_bytes + packed.basis_bytes
    assert requests.run(["z"]) == texts[2:]


def test_a_request_that_leaves_while_its_adapter_loads_holds_nothing(made, size):
    core = make(*made, size, 2.0, 3.0)
    requests = Requests(core, made[1])
    core.abort([requests.add("a"), requests.add("b")])
    requests.finish()
    requests.run(["c"])
    check_empty(core)
