"""Attention of decode steps by our own kernel; in Triton's interpreter where there is no GPU."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malora_server.model.attention import LARGEST, AttentionContext, LayerCache
from malora_server.model.decode_attention import NUM_COLUMNS, DecodeStep, divide

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The kernel is for 16-bit values, whose products the interpreter gets wrong.
DTYPE = torch.bfloat16 if GPU.type == "cuda" else torch.float32
TOLERANCE = {"atol": 2e-2, "rtol": 2**-7} if GPU.type == "cuda" else {"atol": 1e-5, "rtol": 1e-5}
RAGGED = [1, 15, 16, 17, 300, 64, 1000]


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPE).to(GPU)


@dataclass
class Rows:
    """Rows whose earlier keys are in the cache; the cache's last block is the spare one."""

    cache: LayerCache
    lengths: np.ndarray
    tables: list[list[int]]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(cls, lengths, kv_heads=2, group=4, dim=64, block_size=16, seed=0):
        used = [-(-n // block_size) for n in lengths]
        order = np.random.default_rng(seed).permutation(sum(used) + 3).tolist()
        tables = [[order.pop() for _ in range(n)] for n in used]
        cache = LayerCache(
            AttentionContext(), (sum(used) + 4, block_size, kv_heads, dim), DTYPE, GPU
        )
        # Also where no key is: whoever reads there is found out.
        cache.keys.copy_(randn(*cache.keys.shape, seed=seed + 1) * 2)
        cache.values.copy_(randn(*cache.values.shape, seed=seed + 2))
        return cls(
            cache,
            np.array(lengths),
            tables,
            randn(len(lengths), kv_heads * group, dim, seed=seed + 3),
            randn(len(lengths), kv_heads, dim, seed=seed + 4),
            randn(len(lengths), kv_heads, dim, seed=seed + 5),
        )

    @property
    def spare_block(self):
        return len(self.cache.keys) - 1

    def step(self, spare=0):
        rows = len(self.lengths) + spare
        blocks = sum(map(len, self.tables)) + spare
        _, block_size, kv_heads, _ = self.cache.keys.shape
        return DecodeStep(GPU, rows, blocks, block_size, kv_heads)

    def attend(self, step, spare=0, window=None, softcap=None):
        """What the kernel makes of them, with rows of the spare block after them."""
        lengths = np.concatenate([self.lengths, np.ones(spare, np.int64)])
        step.load(lengths, self.tables + [[self.spare_block]] * spare)
        inputs = [
            torch.cat([x, randn(spare, *x.shape[1:], seed=9)]) if spare else x
            for x in (self.query, self.key, self.value)
        ]
        out = step.attend(self.cache, *inputs, self.query.shape[-1] ** -0.5, window, softcap)
        assert out.is_contiguous()
        return out[: len(self.lengths)]

    def stored(self):
        """The cache's keys and values, the new ones among them."""
        pools = self.cache.keys.clone(), self.cache.values.clone()
        block_size = self.cache.keys.shape[1]
        for pool, new in zip(pools, (self.key, self.value), strict=True):
            new = torch.where(new.isfinite(), new.clamp(-LARGEST, LARGEST), 0)
            for row, (length, table) in enumerate(zip(self.lengths, self.tables, strict=True)):
                pool[table[(length - 1) // block_size], (length - 1) % block_size] = new[row]
        return pools

    def reference(self, window=None, softcap=None):
        """The same in float64."""
        outputs = []
        pools = [pool.double() for pool in self.stored()]
        group = self.query.shape[1] // self.key.shape[1]
        for query, length, table in zip(self.query, self.lengths, self.tables, strict=True):
            keys, values = (
                pool[table].flatten(0, 1)[:length].repeat_interleave(group, 1) for pool in pools
            )
            scores = torch.einsum("hd,khd->hk", query.double(), keys) * query.shape[-1] ** -0.5
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if window is not None:
                scores[:, : max(0, length - window)] = float("-inf")
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
        return torch.stack(outputs)

    def check(self, step=None, spare=0, window=None, softcap=None):
        want, pools = self.reference(window, softcap), self.stored()
        got = self.attend(step or self.step(spare), spare, window, softcap)
        torch.testing.assert_close(got.double(), want, **TOLERANCE)
        for pool, expected in zip((self.cache.keys, self.cache.values), pools, strict=True):
            # Rows that only fill the graph up may write to the spare block.
            assert torch.equal(pool[:-1], expected[:-1])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_it_equals_attention_in_float64(group, dim):
    Rows.of(RAGGED, group=group, dim=dim).check()


def test_one_long_row_is_divided():
    rows = Rows.of([1000], kv_heads=1)
    rows.check()
    assert len(divide(rows.lengths, np.zeros(1, np.int32), 8)) == 8


def test_many_queries_may_share_a_key_head():
    Rows.of([40, 9], kv_heads=1, group=33).check()


@pytest.mark.parametrize("window", [1, 30, 128, 200, 999, 5000])
def test_keys_before_the_window_count_for_nothing(window):
    Rows.of(RAGGED, kv_heads=1).check(window=window)


@pytest.mark.parametrize("window", [None, 100])
def test_scores_are_capped(window):
    rows = Rows.of(RAGGED)
    rows.query *= 8
    rows.check(window=window, softcap=5.0)


def test_inputs_may_have_any_strides():
    rows = Rows.of(RAGGED)
    count, kv_heads, dim = rows.key.shape
    heads = rows.query.shape[1]
    joined = randn(count, (heads + 2 * kv_heads), dim, seed=1)
    rows.query, rows.key, rows.value = joined.split([heads, kv_heads, kv_heads], 1)
    rows.check()
    rows.query, rows.key, rows.value = (
        x.transpose(0, 1).contiguous().transpose(0, 1) for x in (rows.query, rows.key, rows.value)
    )
    rows.check()


def test_what_others_read_is_finite():
    rows = Rows.of([20, 300, 20])
    rows.key[1, 0, 3], rows.key[1, 1, 5] = float("nan"), -1e30
    rows.value[1, 0, 3], rows.value[1, 1, 5] = float("inf"), 1e30
    rows.check()  # of what is stored instead
    assert rows.cache.keys.isfinite().all()
    assert rows.cache.values.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_row_that_fails_harms_no_other():
    rows = Rows.of([20, 1000, 20])
    want = rows.reference()
    rows.query[1] = float("nan")
    step = rows.step()
    for _ in range(2):
        got = rows.attend(step).double()
        torch.testing.assert_close(got[::2], want[::2], **TOLERANCE)
    assert got[1].isnan().all()


def test_rows_that_only_fill_a_graph_up():
    Rows.of(RAGGED).check(spare=9)


def test_a_step_is_loaded_again():
    long, short = Rows.of(RAGGED), Rows.of([2, 5, 400], seed=1)
    step = long.step()
    for rows in (long, short, long, long):
        rows.check(step, spare=len(long.lengths) - len(rows.lengths))


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(1, 700), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    block_size=st.sampled_from([1, 8, 12, 16, 32]),
    window=st.none() | st.integers(1, 700),
    softcap=st.none() | st.just(20.0),
    seed=st.integers(0, 9),
)
def test_whatever_the_rows(lengths, kv_heads, group, block_size, window, softcap, seed):
    rows = Rows.of(lengths, kv_heads, group, block_size=block_size, seed=seed)
    rows.check(window=window, softcap=softcap)


@given(
    lengths=st.lists(st.integers(1, 600) | st.integers(1, 20_000), min_size=1, max_size=70),
    num_parts=st.integers(1, 264),
)
def test_divisions_are_whole_and_fit(lengths, num_parts):
    firsts = np.arange(len(lengths), dtype=np.int32) * 7
    items = divide(np.array(lengths), firsts, num_parts)
    assert items.shape[1] == NUM_COLUMNS.value
    assert len(items) <= len(lengths) + num_parts
    slots = set()
    keys = items[:, 4] - items[:, 3]
    assert (np.diff(keys) <= 0).all()
    for row, length in enumerate(lengths):
        its = sorted(items[items[:, 0] == row].tolist(), key=lambda item: item[5])
        assert [item[5] for item in its] == list(range(its[0][6]))
        assert [item[3] for item in its] == [0, *(item[4] for item in its[:-1])]
        assert its[-1][4] == length
        assert {(item[1], item[2]) for item in its} == {(row * 7, length)}
        if len(its) > 1:
            assert its[0][4] >= 64
            its_slots = {item[7] + item[5] for item in its}
            assert len(its_slots) == len(its)
            assert not slots & its_slots
            slots |= its_slots
    assert max(slots, default=0) < 2 * num_parts
