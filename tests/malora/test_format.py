"""Adapter folders: what is read, what is refused, and in which words."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from malora import MaloraConfig, files
from malora.digests import values_digest
from malora.format import (
    AdaptedLinear,
    Adapter,
    AdapterFormatError,
    BaseModelSpec,
    load_adapter,
    open_adapter,
    save_adapter,
)

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def an_adapter(dtype: torch.dtype = torch.float32) -> Adapter:
    config = MaloraConfig(
        r=2,
        num_experts=3,
        basis_dim=5,
        task_type="CAUSAL_LM",
        target_modules=r"model\.layers\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj)",
        alpha_pattern={"v_proj": 4},
    )
    return Adapter.of(
        config,
        {
            path: AdaptedLinear(
                basis=torch.randn(5, 16).to(dtype),
                up=torch.randn(3, out, 2).to(dtype),
                coefficients=torch.randn(3, 2, 5).to(dtype),
                router=torch.randn(3, 16).to(dtype),
                router_input="hidden",
                top_k=2,
                scaling=config.shape_of(path).scaling,
            )
            for path, out in ((Q, 16), (V, 8))
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(an_adapter(), tmp_path / "mine")
    return tmp_path / "mine"


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def code_of(folder: Path, base: BaseModelSpec | None = None, **kwargs: Any) -> tuple[str, str]:
    """The code and the sentence with which loading fails."""
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(folder, base, **kwargs)
    message = str(caught.value)
    assert str(folder.parent) not in message
    assert message.endswith(".")
    assert "\n" not in message
    return caught.value.code, message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_and_loaded_nothing_changes(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = an_adapter(dtype)
    save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a", BaseModelSpec.from_model(llama()))
    assert loaded.digest == adapter.digest
    assert loaded.linears.keys() == adapter.linears.keys()
    for path, linear in adapter.linears.items():
        for name, tensor in linear.tensors().items():
            assert torch.equal(loaded.linears[path].tensors()[name], tensor)
            assert loaded.linears[path].tensors()[name].dtype == dtype
    assert loaded.linears[Q].scaling == 8
    assert loaded.linears[V].scaling == 2
    assert loaded.num_parameters == 2 * (5 * 16 + 3 * 2 * 5 + 3 * 16) + 3 * 2 * (16 + 8)
    assert loaded.num_bytes == loaded.num_parameters * dtype.itemsize


def test_peft_reads_what_is_saved(folder: Path) -> None:
    model = PeftModel.from_pretrained(llama(), folder)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    kept = load_adapter(folder).linears[V]
    for name, tensor in layer.adapted_linear("default").tensors().items():
        assert torch.equal(kept.tensors()[name], tensor)
    assert layer.adapted_linear("default").scaling == kept.scaling


def test_the_weights_do_not_follow_the_file(folder: Path) -> None:
    loaded = load_adapter(folder)
    file = folder / "adapter_model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(-64, os.SEEK_END)
        handle.write(b"\xff" * 64)
    assert Adapter.of(loaded.config, loaded.linears).digest == loaded.digest


def test_the_digest_is_of_what_matters_for_results(tmp_path: Path) -> None:
    adapter = an_adapter()
    linear = adapter.linears[Q]
    variants = [
        adapter.linears,
        {**adapter.linears, Q: replace(linear, top_k=1)},
        {**adapter.linears, Q: replace(linear, scaling=1.0)},
        {**adapter.linears, Q: replace(linear, router_input="basis")},
        {**adapter.linears, Q: replace(linear, up=linear.up.bfloat16())},
        {**adapter.linears, Q: replace(linear, up=linear.up * 2)},
        {"model.layers.1.self_attn.q_proj": linear, V: adapter.linears[V]},
        {Q: linear},
    ]
    digests = {Adapter.of(adapter.config, each).digest for each in variants}
    assert len(digests) == len(variants)
    renamed = replace(adapter.config, base_model_name_or_path="elsewhere", lora_dropout=0.1)
    backwards = dict(reversed(adapter.linears.items()))
    assert Adapter.of(renamed, backwards).digest == adapter.digest


def test_fields_of_later_versions_are_ignored(folder: Path) -> None:
    digest = load_adapter(folder).digest
    change_config(folder, a_field_of_the_future=1)
    assert load_adapter(folder).digest == digest


def test_a_missing_folder(tmp_path: Path) -> None:
    code, message = code_of(tmp_path / "absent")
    assert code == "adapter_not_found"
    assert "absent" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    code, message = code_of(folder)
    assert code == "adapter_file_missing"
    assert name in message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"x"', "{}", '{"peft_type": 3}', "\x00", "[" * 100_000, " " * 2**20 + "{}"],
    ids=["empty", "cut", "list", "string", "no type", "odd type", "nul", "deep", "huge"],
)
def test_a_configuration_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert code_of(folder)[0] == "adapter_config_invalid"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k must lie in"),
        ({"r": "two"}, "r must be a positive integer, not 'two'"),
        ({"task_type": "NONE"}, "task type"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern or alpha_pattern holds a malformed"),
    ],
)
def test_a_configuration_that_makes_no_adapter(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    change_config(folder, **fields)
    code, text = code_of(folder)
    assert code == "adapter_config_invalid"
    assert message in text


def test_a_malformed_target_expression(folder: Path) -> None:
    change_config(folder, target_modules="(")
    assert code_of(folder, BaseModelSpec.from_model(llama()))[0] == "adapter_config_invalid"


def test_a_method_that_is_not_known(folder: Path) -> None:
    change_config(folder, peft_type="IA3")
    code, message = code_of(folder)
    assert code == "adapter_type_unsupported"
    assert "'IA3'" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")
    code, message = code_of(folder)
    assert code == "adapter_file_unsafe"
    assert name in message


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "step-3.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("step-3.safetensors")
    load_adapter(folder)


def test_a_pickle_is_never_read(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    code, message = code_of(folder)
    assert code == "adapter_file_unsafe"
    assert "adapter_model.bin is a pickle" in message


def test_a_file_that_is_too_large(folder: Path) -> None:
    size = (folder / "adapter_model.safetensors").stat().st_size
    load_adapter(folder, max_bytes=size)
    assert code_of(folder, max_bytes=size - 1)[0] == "adapter_too_large"


def test_values_come_in_parts_and_in_any_dtypes(folder: Path, monkeypatch) -> None:
    """Each in a memory of its own dtype, though single precision follows an odd number of bytes."""
    monkeypatch.setattr(files, "_BYTES_AT_A_TIME", 100)
    given = {
        "odd": torch.randn(7).bfloat16(),
        "none": torch.tensor(2.5),
        "wide": torch.randn(50, 3),
        "half": torch.randn(3).half(),
        "last": torch.randn(5),
    }
    save_file(given, folder / "adapter_model.safetensors")
    for num_threads in (1, 3):
        with files.open_weights(folder) as weights:
            digests = weights.read(files.threaded_map(num_threads))
            tensors = weights.tensors
        assert tensors.keys() == given.keys()
        for name, tensor in given.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
            assert digests[tensors[name].data_ptr()] == values_digest(tensor)


@pytest.mark.parametrize("size", [0, 9, -8, -1])
def test_a_file_that_is_cut_short_once_it_is_open(folder: Path, size: int) -> None:
    file = folder / "adapter_model.safetensors"
    with open_adapter(folder) as adapter:
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)
        with pytest.raises(AdapterFormatError) as info:
            adapter.read()
    assert info.value.code == "adapter_file_invalid"
    assert "shorter than its header says" in str(info.value)


def test_what_is_used_again_is_what_would_be_found_anew(folder: Path) -> None:
    """Of adapters that are opened one after the other, each in the last one's memory."""
    base = BaseModelSpec.from_model(llama())
    basis = f"base_model.model.{Q}.malora_basis"
    last = None
    reused = []

    def follows() -> Adapter:
        nonlocal last
        want = load_adapter(folder, base)
        with open_adapter(folder, base, last=last) as opened:
            got = opened.read()
            reused.append((last and last.weights is opened.weights, opened is last))
            last = opened
        assert got.config == want.config
        assert got.digest == want.digest
        assert got.basis_keys == want.basis_keys
        for path, linear in want.linears.items():
            assert got.linears[path].scaling == linear.scaling
            for name, tensor in linear.tensors().items():
                assert torch.equal(got.linears[path].tensors()[name], tensor)
        return want

    def is_refused(base: BaseModelSpec = base) -> None:
        code, _ = code_of(folder, base)
        with (
            pytest.raises(AdapterFormatError) as caught,
            open_adapter(folder, base, last=last) as a,
        ):
            a.read()
        assert caught.value.code == code

    first = follows()
    change_tensors(folder, lambda t: t[f"base_model.model.{Q}.malora_up"].mul_(2))
    assert follows().digest != first.digest
    change_tensors(folder, lambda t: t[basis].mul_(2))
    is_refused()
    change_config(folder, basis_digest=None)
    first = follows()
    change_tensors(folder, lambda t: t[basis].mul_(2))
    assert follows().digest != first.digest
    change_tensors(folder, lambda t: t[basis][0, :1].fill_(torch.nan))
    is_refused()
    change_tensors(folder, lambda t: t[basis][0, :1].fill_(1))
    follows()
    change_config(folder, lora_alpha=3)  # other words for the same tensors
    follows()
    change_config(folder, top_k=1)
    follows()
    change_config(folder, top_k=True)  # which is 1 to Python
    is_refused()
    change_config(folder, top_k=1)
    follows()
    change_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    follows()
    change_tensors(folder, lambda t: t.update({k: v.float() for k, v in t.items()}))
    follows()
    is_refused(replace(base, linears={Q: (16, 16)}))
    change_tensors(folder, lambda t: t.pop(basis))
    is_refused()
    assert reused == [
        (None, False),
        (True, True),
        (True, False),
        (True, True),
        (True, True),
        (True, False),
        (True, False),
        (True, True),
        (False, False),
        (False, False),
    ]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 13, 100])
def test_threads_keep_the_order_and_tell_of_errors(num_threads: int, count: int) -> None:
    work_in_threads = files.threaded_map(num_threads)
    assert list(work_in_threads(lambda x: x + 1, range(count))) == list(range(1, count + 1))
    if count:
        with pytest.raises(ZeroDivisionError):
            list(work_in_threads(lambda x: 1 / (x - count + 1), range(count)))


def test_an_error_is_told_when_no_thread_is_at_work_any_more() -> None:
    """Or it would go on writing to a memory that is used again."""
    both, let_go = Barrier(2), Event()
    begun, ended = [], []

    def work(item: int) -> None:
        begun.append(item)
        both.wait(10)
        if item == 0:
            raise ValueError
        let_go.wait(10)
        ended.append(item)

    with ThreadPoolExecutor() as pool:
        told = pool.submit(lambda: files.threaded_map(2)(work, range(100)))
        with pytest.raises(TimeoutError):
            told.result(timeout=0.05)
        let_go.set()
        assert isinstance(told.exception(), ValueError)
    assert sorted(begun) == [0, 1]
    assert ended == [1]


def header(document: Any, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 64,
        header(b"{"),
        header([1]),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, b"12345678"),
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"12345678"),
        header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"12345678"),
        header({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}}, b"12345678"),
        (2**40).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_malformed_header(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)
    assert code_of(folder)[0] == "adapter_file_invalid"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 900), st.binary(min_size=1, max_size=12))
def test_damage_is_an_error_or_another_adapter_but_no_crash(
    folder: Path, offset: int, noise: bytes
) -> None:
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:offset] + noise + content[offset + len(noise) :])
    with suppress(AdapterFormatError):
        load_adapter(folder)
    file.write_bytes(content)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{new}"] = tensors.pop(f"base_model.model.{old}")

    return change


def reshape(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.randn(*shape)})


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda t: t.clear(), "adapter_tensor_missing", "no adapted linear"),
        (lambda t: t.pop(f"base_model.model.{Q}.malora_up"), "adapter_tensor_missing", f"{Q}.mal"),
        (lambda t: t.update(other=torch.ones(1)), "adapter_tensor_unexpected", "other"),
        (rename(f"{Q}.malora_up", f"{Q}.lora_B"), "adapter_tensor_unexpected", "lora_B"),
        (reshape(f"{Q}.malora_basis", 6, 16), "adapter_shape_mismatch", f"{Q}.malora_basis"),
        (reshape(f"{Q}.malora_basis", 80), "adapter_shape_mismatch", "malora_basis"),
        (reshape(f"{Q}.malora_basis", 5, 0), "adapter_shape_mismatch", "malora_basis"),
        (reshape(f"{Q}.malora_basis", 5, 15), "adapter_shape_mismatch", "malora_router"),
        (reshape(f"{Q}.malora_up", 3, 16, 3), "adapter_shape_mismatch", "malora_up"),
        (reshape(f"{Q}.malora_up", 4, 16, 2), "adapter_shape_mismatch", "malora_up"),
        (reshape(f"{Q}.malora_up", 3), "adapter_shape_mismatch", "malora_up"),
        (reshape(f"{Q}.malora_router", 3, 5), "adapter_shape_mismatch", "malora_router"),
        (reshape(f"{V}.malora_coefficients", 3, 2, 4), "adapter_shape_mismatch", f"{V}.malora_co"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], code: str, named: str
) -> None:
    change_tensors(folder, change)
    actual, message = code_of(folder)
    assert actual == code
    assert named in message


def test_a_dtype_that_is_not_supported(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({k: v.double() for k, v in t.items()}))
    code, message = code_of(folder)
    assert code == "adapter_dtype_unsupported"
    assert "F64" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    save_adapter(an_adapter(dtype), tmp_path / "mine")
    name = f"base_model.model.{V}.malora_up"
    change_tensors(tmp_path / "mine", lambda t: t[name].view(-1)[3:4].fill_(value))
    code, message = code_of(tmp_path / "mine")
    assert code == "adapter_not_finite"
    assert name in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_value_hides_among_others(dtype: torch.dtype) -> None:
    """Whatever vectors the processor takes them in."""
    for size in (*range(1, 70), 1000):
        values = torch.randn(size).to(dtype)
        assert files._is_finite(values)
        for at in {*range(min(size, 70)), size - 1}:
            for value in (float("nan"), float("inf"), float("-inf")):
                before = values[at].item()
                values[at] = value
                assert not files._is_finite(values)
                values[at] = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_as_large_as_they_can_be_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(an_adapter(dtype), tmp_path / "mine")
    name = f"base_model.model.{V}.malora_up"
    most = torch.finfo(dtype).max
    change_tensors(tmp_path / "mine", lambda t: t[name].fill_(most)[0].neg_())
    assert load_adapter(tmp_path / "mine").linears[V].up.abs().eq(most).all()


def test_a_basis_that_belongs_to_another_configuration(folder: Path) -> None:
    change_tensors(folder, lambda t: t[f"base_model.model.{Q}.malora_basis"].mul_(2))
    assert code_of(folder)[0] == "adapter_basis_mismatch"


def test_limits_of_rank_and_experts(folder: Path) -> None:
    change_config(folder, r=1025, basis_dim=1025)
    assert code_of(folder)[0] == "adapter_rank_too_large"
    change_config(folder, r=2, basis_dim=5, num_experts=257)
    assert code_of(folder)[0] == "adapter_too_many_experts"
    change_config(
        folder, num_experts=3, coefficients="block", basis_dim=6, rank_pattern={"x": 2000}
    )
    change_tensors(folder, lambda t: [t.pop(k) for k in list(t) if "coefficients" in k])
    assert code_of(folder)[0] == "adapter_rank_too_large"


def test_a_base_model_with_other_sizes_or_names(folder: Path) -> None:
    base = BaseModelSpec.from_model(llama())
    sizes = replace(base, linears={**base.linears, Q: (16, 12)})
    code, message = code_of(folder, sizes)
    assert code == "adapter_base_mismatch"
    assert f"{Q} maps 16 to 16 features, but the base model's maps 16 to 12" in message
    names = replace(base, linears={k: v for k, v in base.linears.items() if k != Q})
    code, message = code_of(folder, names)
    assert code == "adapter_base_mismatch"
    assert Q in message


def test_a_linear_that_is_targeted_but_has_no_tensors(folder: Path) -> None:
    change_config(folder, target_modules=["q_proj"])
    code, message = code_of(folder, BaseModelSpec.from_model(llama()))
    assert code == "adapter_tensor_missing"
    assert "model.layers.1.self_attn.q_proj" in message


def test_another_base_model_of_the_same_sizes(folder: Path) -> None:
    mine, other = BaseModelSpec.from_model(llama()), BaseModelSpec.from_model(llama(seed=1))
    load_adapter(folder, other)  # no fingerprint: the sizes are all there is to compare
    change_config(folder, base_model_fingerprint=mine.fingerprint)
    load_adapter(folder, mine)
    code, message = code_of(folder, other)
    assert code == "adapter_base_mismatch"
    assert "base_model_fingerprint" in message


def test_the_fingerprint_is_of_weights_and_sizes_but_not_of_the_dtype(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    wide = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    narrow = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mark = BaseModelSpec.from_model(wide).fingerprint
    assert BaseModelSpec.from_model(narrow).fingerprint == mark
    narrow.model.norm.weight.data[0] = 0.5
    assert BaseModelSpec.from_model(narrow).fingerprint != mark
    wide.config.num_attention_heads = 1
    assert BaseModelSpec.from_model(wide).fingerprint != mark
    with pytest.raises(ValueError, match="cannot be recognised as a base model"):
        BaseModelSpec.from_model(torch.nn.Linear(2, 2))
