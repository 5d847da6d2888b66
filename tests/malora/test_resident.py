"""Adapters packed as bytes and moved into one memory: values, addresses, room, shared bases."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malora.format import AdaptedLinear
from malora.kernels.arena import ALIGNMENT
from malora.kernels.packed import FIELDS, pack_whole
from malora.kernels.resident import Group, NoRoomError, ResidentAdapters, Site

N_IN = 24
GROUPS = [
    Group(0, N_IN, (Site("q", 0, 20), Site("v", 20, 12))),
    Group(0, N_IN, (Site("o", 0, 16),), first_site=2),
]
WIDTHS = {"q": 20, "v": 12, "o": 16}


def make_linears(seed, kind="malora", paths="qv", dtype=torch.float32, basis_seed=None, r=3):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(seed if basis_seed is None else basis_seed)
    experts, top_k, d = (1, 1, r) if kind == "lora" else (4, 2, 6)

    def rand(*shape, of=generator):
        return torch.randn(shape, generator=of).to(dtype)

    return {
        path: AdaptedLinear(
            basis=rand(d, N_IN, of=shared),
            up=rand(experts, WIDTHS[path], r),
            coefficients=rand(experts, r, d) if kind != "lora" else None,
            router=None if kind == "lora" else rand(experts, d if kind == "malora-basis" else N_IN),
            router_input="basis" if kind == "malora-basis" else "hidden",
            top_k=top_k,
            scaling=0.37,
        )
        for path in paths
    }


def resident(capacity=1 << 16, dtype=torch.float32):
    return ResidentAdapters(GROUPS, dtype, torch.full((capacity,), 255, dtype=torch.uint8))


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["lora", "malora", "malora-basis"]),
    paths=st.sampled_from(["q", "o", "vq", "oqv"]),
    saved=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    served=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_what_lies_on_the_device_is_the_adapter_scaled(kind, paths, saved, served, seed):
    linears = make_linears(seed, kind, paths, saved)
    adapters = resident(dtype=served)
    adapters.add("before", make_linears(seed + 1))
    got = adapters.add("it", linears)
    assert list(got.linears) == list(linears)
    for path, linear in linears.items():
        view = got.linears[path]
        want = (linear.up.double() * linear.scaling).to(served)
        if saved != served:  # the product may round once before it is stored
            want = (linear.up.float() * linear.scaling).to(served)
            torch.testing.assert_close(view.up, want, rtol=0, atol=0)
        torch.testing.assert_close(view.up.double(), want.double(), rtol=1e-2, atol=1e-6)
        for name in ("basis", "router", "coefficients"):
            have, given_ = getattr(view, name), getattr(linear, name)
            assert (have is None) == (given_ is None)
            if given_ is not None:
                assert torch.equal(have, given_.to(served))
        row = dict(zip(FIELDS, got.headers[adapters.paths.index(path)].tolist(), strict=True))
        assert row["basis"] == view.basis.data_ptr()
        assert row["up"] == view.up.data_ptr()
        assert row["router"] == (0 if view.router is None else view.router.data_ptr())
        assert row["coefficients"] == (
            0 if view.coefficients is None else view.coefficients.data_ptr()
        )
        assert [row[f] for f in ("num_experts", "top_k", "r", "basis_dim")] == [
            linear.num_experts,
            linear.top_k,
            linear.r,
            linear.basis_dim,
        ]
        assert row["router_reads_basis"] == (kind == "malora-basis")
        offset = view.basis.data_ptr() - adapters._memory.data_ptr()
        assert offset % ALIGNMENT == 0
    absent = [path for path in adapters.paths if path not in linears]
    assert not any(got.headers[adapters.paths.index(path)].any() for path in absent)


@given(
    ops=st.lists(
        st.tuples(st.sampled_from(["lora", "malora"]), st.integers(0, 2), st.booleans()),
        max_size=40,
    ),
    capacity=st.integers(3_000, 30_000),
)
def test_room_is_as_it_says_and_nothing_leaks_or_is_overwritten(ops, capacity):
    """Each op adds an adapter (in one of three bases), or removes the oldest first."""
    adapters = resident(capacity)
    held = []
    for number, (kind, basis, remove) in enumerate(ops):
        if remove and held:
            adapters.remove(held.pop(0)[0])
        linears = make_linears(number, kind, basis_seed=basis)
        packed, _, _ = pack_whole(str(number), linears, adapters.paths, torch.float32)
        fits = adapters.fits(packed)
        for count in range(len(held) + 1):
            gone = [adapter for adapter, _ in held[:count]]
            assert adapters.fits(packed, gone) or not fits
        if fits:
            held.append((adapters.add(str(number), linears), linears))
        else:
            with pytest.raises(NoRoomError):
                adapters.add(str(number), linears)
        assert adapters.num_bytes() <= capacity
        for adapter, of in held:
            for path, linear in of.items():
                view = adapter.linears[path]
                assert torch.equal(view.basis, linear.basis)
                torch.testing.assert_close(view.up, linear.up * linear.scaling)
    for adapter, _ in held:
        adapters.remove(adapter)
    assert adapters.num_bytes() == 0


def test_a_basis_is_shared_by_content_and_place():
    adapters = resident()
    one = adapters.add("1", make_linears(1, basis_seed=5))
    first = adapters.num_bytes()
    two = adapters.add("2", make_linears(2, basis_seed=5))
    assert two.basis.data_ptr() == one.basis.data_ptr()
    assert adapters.num_bytes() == 2 * first - one.packed.basis_bytes
    other = adapters.add("3", make_linears(3, paths="vq", basis_seed=5))
    assert other.basis.data_ptr() != one.basis.data_ptr()
    freed = adapters.remove(one)
    assert [size for _, size in freed] == [one.packed.own_bytes]
    freed = adapters.remove(two)
    assert sorted(size for _, size in freed) == sorted(
        [two.packed.own_bytes, two.packed.basis_bytes]
    )


def test_a_large_upload_on_the_cpu_goes_in_parts():
    generator = torch.Generator().manual_seed(0)
    group = Group(0, 1024, (Site("q", 0, 2048),))
    linear = AdaptedLinear(
        basis=torch.randn(512, 1024, generator=generator),
        up=torch.randn(1, 2048, 512, generator=generator),
        coefficients=None,
        router=None,
        router_input="hidden",
        top_k=1,
        scaling=1.0,
    )
    adapters = ResidentAdapters([group], torch.float32, torch.zeros(1 << 23, dtype=torch.uint8))
    packed, basis, own = pack_whole("a", {"q": linear}, adapters.paths, torch.float32)
    adapter = adapters.place(packed)
    upload = adapters.upload(adapter, basis, own)
    assert not upload.done()
    assert upload.done()
    assert torch.equal(adapter.linears["q"].basis, linear.basis)
    assert torch.equal(adapter.linears["q"].up, linear.up)


def test_sizes_grow_to_the_largest():
    adapters = resident()
    adapters.add("a", make_linears(1))
    assert dataclasses.astuple(adapters.sizes) == (24, 8, 64)
    adapters.add("b", make_linears(2, "lora", r=90))
    assert dataclasses.astuple(adapters.sizes) == (90, 8, 90)
    # Of an input, a router is read together with the basis, but for one that reads the basis.
    for kind, reads in (("malora-basis", 26), ("malora", 30)):
        linears = make_linears(3, kind)
        wide = {
            path: dataclasses.replace(
                x,
                basis=torch.zeros(26, N_IN),
                coefficients=torch.zeros(4, 3, 26),
                router=torch.zeros(4, 26) if kind == "malora-basis" else x.router,
            )
            for path, x in linears.items()
        }
        others = resident()
        others.add("a", wide)
        assert others.sizes.reads == reads
