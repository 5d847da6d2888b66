"""The mixed batch against the plain reference: any adapters, any tokens, any order.

The GPU's kernels run here too: on a GPU where there is one, in Triton's interpreter elsewhere.
"""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from malora.format import AdaptedLinear
from malora.kernels import large_batch, reference
from malora.kernels.batched import Routing, Run, plan_batch
from malora.kernels.beside import COMMON_COUNT
from malora.kernels.cpu import DENSE_TOKENS
from malora.kernels.resident import Group, ResidentAdapters, Site
from malora.kernels.small_batch import Capacity, SmallBatchPlan

CPU = torch.device("cpu")
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_IN = 24
GROUP = Group(0, N_IN, (Site("q", 0, 20), Site("k", 20, 12), Site("v", 32, 12)))
WIDTH = 44
RUN_LENGTHS = [1, 1, 1, 2, 3, DENSE_TOKENS + 1, 4 * DENSE_TOKENS]


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan():
    # What a kernel reads beside what was written, it must not take for numbers.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def memory(device):
    return torch.empty(1 << 22, dtype=torch.uint8, device=device)


def make_linear(generator, kind, out, experts, k, r, d, n_in=N_IN):
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "lora":
        experts, k, d = 1, 1, r
    elif kind == "hydra":
        k, d = experts, r
    elif kind == "molora":
        d = experts * r
    router_input = "basis" if kind == "malora-basis" else "hidden"
    router = None
    if experts > 1:
        router = rand(experts, d if router_input == "basis" else n_in)
    return AdaptedLinear(
        basis=rand(d, n_in) / 5,
        up=rand(experts, out, r),
        coefficients=rand(experts, r, d) / 5 if kind.startswith("malora") else None,
        router=router,
        router_input=router_input,
        top_k=min(k, experts),
        scaling=0.5,
    )


adapters_strategy = st.lists(
    st.tuples(
        st.sampled_from(["lora", "hydra", "molora", "malora", "malora-basis"]),
        st.integers(2, 5),  # experts
        st.integers(1, 3),  # k
        st.integers(1, 4),  # r
        st.one_of(st.integers(4, 9), st.integers(33, 40)),  # d
        st.sets(st.sampled_from("qkv"), min_size=1),
    ),
    min_size=1,
    max_size=5,
)


def expected(x, out, runs, linears, sites=GROUP.sites):
    want = out.double().clone()
    for start, stop, index in runs:
        if index is None:
            continue
        for site in sites:
            if site.path in linears[index]:
                delta, _ = reference.delta(x[start:stop], linears[index][site.path])
                want[start:stop, site.start : site.start + site.width] += delta
    return want


@settings(max_examples=40)
@given(
    specs=adapters_strategy,
    counts=st.lists(
        st.tuples(
            st.sampled_from([1, 1, 1, 2, 3, DENSE_TOKENS + 1, 4 * DENSE_TOKENS]), st.integers(-1, 4)
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**31),
)
def test_any_mix_equals_the_reference(specs, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    widths = {site.path: site.width for site in GROUP.sites}
    linears = [
        {path: make_linear(generator, kind, widths[path], n, k, r, d) for path in sorted(paths)}
        for kind, n, k, r, d, paths in specs
    ]
    adapters = ResidentAdapters([GROUP], torch.float32, memory(CPU))
    resident = [adapters.add(str(i), linear) for i, linear in enumerate(linears)]
    runs, position = [], 0
    for n, index in counts:
        runs.append((position, position + n, None if index < 0 else index % len(specs)))
        position += n
    x = torch.randn(position, N_IN, generator=generator)
    out = torch.randn(position, WIDTH, generator=generator)
    want = expected(x, out, runs, linears)
    plan = plan_batch(
        [Run(a, b, resident[i]) for a, b, i in runs if i is not None], position, adapters
    )
    got = out.clone()
    plan.add_to(got, x, GROUP)
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-4)
    again = out.clone()
    plan.add_to(again, x, GROUP)
    assert torch.equal(got, again)


def test_the_gates_a_token_took_are_reported():
    generator = torch.Generator().manual_seed(3)
    linears = {
        path: make_linear(generator, "malora", width, 4, 2, 3, 6)
        for path, width in (("q", 20), ("v", 12))
    }
    adapters = ResidentAdapters([GROUP], torch.float32, memory(CPU))
    adapter = adapters.add("a", linears)
    count = 2 * DENSE_TOKENS + 3
    x = torch.randn(count, N_IN, generator=generator)
    want = sum(reference.delta(x, linear)[1] for linear in linears.values())
    for runs in ([Run(0, count, adapter)], [Run(i, i + 1, adapter) for i in range(1, count)]):
        plan = plan_batch(runs, count, adapters)
        plan.routing = Routing(count, 1, 4, CPU)
        plan.add_to(torch.zeros(count, WIDTH), x, GROUP)
        first = runs[0].start
        torch.testing.assert_close(
            plan.routing.gates[first:, 0].double(), want[first:], atol=1e-5, rtol=1e-4
        )
        assert not plan.routing.gates[:first].any()


def test_a_token_does_not_see_its_batch_mates():
    generator = torch.Generator().manual_seed(5)
    adapters = ResidentAdapters([GROUP], torch.float32, memory(CPU))
    residents = [
        adapters.add(str(i), {"q": make_linear(generator, "malora", 20, 4, 2, 3, 6)})
        for i in range(6)
    ]
    x = torch.randn(6, N_IN, generator=generator)
    together = torch.zeros(6, WIDTH)
    plan_batch([Run(i, i + 1, residents[i]) for i in range(6)], 6, adapters).add_to(
        together, x, GROUP
    )
    for i in range(6):
        alone = torch.zeros(1, WIDTH)
        plan_batch([Run(0, 1, residents[i])], 1, adapters).add_to(alone, x[i : i + 1], GROUP)
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-5)


def test_a_shared_basis_is_stored_once_and_kept_until_its_last_user_goes():
    generator = torch.Generator().manual_seed(7)
    one = make_linear(generator, "malora", 20, 4, 2, 3, 6)
    two = dataclasses.replace(one, up=torch.randn(4, 20, 3, generator=generator), scaling=1.0)
    adapters = ResidentAdapters([GROUP], torch.float32, memory(CPU))
    first = adapters.add("1", {"q": one})
    alone = adapters.num_bytes()
    second = adapters.add("2", {"q": two})
    assert adapters.num_bytes() == 2 * alone - one.basis.numel() * 4
    adapters.remove(first)
    assert adapters.num_bytes() == alone
    x = torch.randn(2, N_IN, generator=generator)
    out = torch.zeros(2, WIDTH)
    plan_batch([Run(0, 2, second)], 2, adapters).add_to(out, x, GROUP)
    torch.testing.assert_close(
        out[:, :20].double(), reference.delta(x, two)[0], atol=1e-4, rtol=1e-4
    )
    adapters.remove(second)
    assert adapters.num_bytes() == 0


def test_half_precision_inputs_are_widened():
    generator = torch.Generator().manual_seed(9)
    linear = make_linear(generator, "malora", 20, 4, 2, 3, 6)
    adapters = ResidentAdapters([GROUP], torch.float32, memory(CPU))
    adapter = adapters.add("a", {"q": linear})
    x = torch.randn(3, N_IN, generator=generator).bfloat16()
    out = torch.zeros(3, WIDTH, dtype=torch.bfloat16)
    plan_batch([Run(0, 3, adapter)], 3, adapters).add_to(out, x, GROUP)
    want = reference.delta(x.double(), linear)[0]
    error = (out[:, :20].double() - want).norm() / want.norm()
    assert 0 < error < 0.01


@settings(max_examples=12)
@example(
    specs=[("malora-basis", 3, 2, 2, 5, frozenset("qk")), ("lora", 1, 1, 3, 3, frozenset("qv"))],
    counts=[(9, 0), (2, -1), (6, 1)],
    sizes=(1040, 24, 16, 8),  # in two parts
    form="large",
    num_sequences=1,
    seed=1,
)
@given(
    specs=adapters_strategy,
    counts=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 3, 9, 18]), st.integers(-1, 4)), min_size=1, max_size=4
    ),
    sizes=st.sampled_from(
        [
            (24, 20, 12, 12),
            (32, 24, 16, 16),
            (40, 600, 8, 8),
            (1040, 24, 16, 8),
            (32, 136, 136),
            (128, 80, 24, 24),
            (256, 64, 64),
        ]
    ),
    form=st.sampled_from(["small", "small, any mix", "small, prompts", "large", "large, any mix"]),
    num_sequences=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_the_gpu_kernels_equal_the_reference(specs, counts, sizes, form, num_sequences, seed):
    n, *widths = sizes
    starts = [sum(widths[:i]) for i in range(len(widths))]
    sites = [Site(*site) for site in zip("qkv", starts, widths, strict=False)]
    # Sites of another group lie before these in every header.
    group = Group(0, n, tuple(sites), first_site=1)
    before = Group(0, n, (Site("other", 0, 8),))
    generator = torch.Generator().manual_seed(seed)
    linears = [
        {
            site.path: make_linear(generator, kind, site.width, experts, k, r, d, n)
            for site in sites
            if site.path in paths or paths.isdisjoint("qkv"[: len(sites)])
        }
        for kind, experts, k, r, d, paths in specs
    ]
    adapters = ResidentAdapters([before, group], torch.float32, memory(GPU))
    residents = [adapters.add(str(i), linear) for i, linear in enumerate(linears)]
    runs, position = [], 0
    for length, index in counts:
        runs.append((position, position + length, None if index < 0 else index % len(specs)))
        position += length
    x = torch.randn(position, n, generator=generator)
    weight = torch.randn(sum(widths), n, generator=generator) / n**0.5
    want = expected(x, x @ weight.T, runs, linears, sites)
    on_gpu = x.to(GPU), weight.to(GPU)
    # Batches of prompts take another form than decoding ones; few tokens do here, to be quick, and
    # as many single-precision columns together as of sixteen bits.
    with mock.patch.multiple(large_batch, _MIN_PART=512, _READ_BYTES=512, _ADD_BYTES=256):
        if form.startswith("large"):
            many = 4 if form == "large, any mix" else None
            plan = large_batch.LargeBatchPlan(position, adapters, many)
        else:
            capacity = {
                "small, any mix": Capacity.of_any(position),
                "small, prompts": Capacity.of_prompts(position, num_sequences),
            }
            plan = SmallBatchPlan(position, adapters, capacity.get(form))
        plan.routing = Routing(position, 2, 5, GPU)
        runs_of = [Run(a, b, residents[i]) for a, b, i in runs if i is not None]
        if not plan.load(runs_of):
            assert form == "small, prompts"
            assert num_sequences < sum(run.stop - run.start for run in runs_of)
            return
        taken = plan.routing.gates
        for _ in range(2):  # a plan serves step after step
            taken.zero_()
            plan.start()
            got, delta = plan.apply(on_gpu[0], group, lambda linear: linear(*on_gpu, None))
            assert plan.separate == (not form.startswith("large")) == (delta is not None)
            got = got if delta is None else got + delta
            torch.testing.assert_close(got.double().cpu(), want, atol=2e-4, rtol=1e-4)
        if plan.activates and len(sites) == 2:
            taken.zero_()
            got = plan.activate(on_gpu[0], group, lambda linear: linear(*on_gpu, None))
            gate, up = want.chunk(2, 1)
            want = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(got.double().cpu(), want, atol=2e-4, rtol=1e-4)
    assert not taken[:, 1].any()
    for start, stop, index in runs:
        if index is not None:
            routed = [x for x in linears[index].values() if x.num_experts > 1]
            gates = torch.zeros(stop - start, 5, dtype=torch.float64)
            for linear in routed:
                gates[:, : linear.num_experts] += reference.delta(x[start:stop], linear)[1]
            torch.testing.assert_close(
                taken[start:stop, 0].double().cpu(), gates, atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    [("lora", 70), ("malora", 33), ("malora-basis", 64), ("malora-basis", 40)],
)
def test_the_base_product_makes_the_read_that_most_share(kind, num_tokens):
    # Of sixteen-bit values on a GPU, which the interpreter gets wrong.
    dtype = torch.bfloat16 if GPU.type == "cuda" else torch.float32
    # There more than two tiles for each multiprocessor too, which are wider ones.
    n, widths = 384, (16960 if GPU.type == "cuda" else 192, 64)
    sites = tuple(Site(path, sum(widths[:i]), widths[i]) for i, path in enumerate("qk"))
    group = Group(0, n, sites, first_site=1)
    generator = torch.Generator().manual_seed(num_tokens)
    linears = [
        {x.path: make_linear(generator, kind, x.width, 4, 2, 8, 24, n) for x in sites}
        for _ in range(4)
    ]
    for linear in linears:
        for path, x in linear.items():
            basis = (linears[0][path] if kind == "malora-basis" else x).basis  # of one family
            values = {"basis": basis / 2, "coefficients": x.coefficients, "router": x.router}
            linear[path] = dataclasses.replace(
                x,
                scaling=1.0,
                up=x.up.to(dtype).float(),
                **{name: v if v is None else v.to(dtype).float() for name, v in values.items()},
            )
    space = torch.empty(1 << 25, dtype=torch.uint8, device=GPU)
    adapters = ResidentAdapters([Group(0, n, (Site("other", 0, 8),)), group], dtype, space)
    residents = [adapters.add(str(i), linear) for i, linear in enumerate(linears)]
    x = torch.randn(num_tokens, n, generator=generator).to(dtype)
    weight = (torch.randn(sum(widths), n, generator=generator) / n**0.5).to(dtype)
    on_gpu = x.to(GPU), weight.to(GPU)
    plan = SmallBatchPlan(num_tokens, adapters, Capacity(alone=16, shared=8))
    for first in (0, 1):  # a plan serves mix after mix
        owners = [(3, None)[i % 3] if i % 3 < 2 else first for i in range(24)]
        owners += [i % 3 if kind == "malora-basis" else first for i in range(24, num_tokens)]
        runs = [(i, i + 1, owner) for i, owner in enumerate(owners)]
        want = expected(x.float(), x.double() @ weight.double().T, runs, linears, sites)
        assert plan.load([Run(a, b, residents[i]) for a, b, i in runs if i is not None])
        assert plan._table[COMMON_COUNT.value] >= 16
        plan.start()
        base, delta = plan.apply(on_gpu[0], group, lambda linear: linear(*on_gpu, None))
        error = ((base.double() + delta.double()).cpu() - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() < (0.01 if dtype == torch.bfloat16 else 1e-5)
