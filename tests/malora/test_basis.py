from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from malora import basis
from malora.digests import tensor_digest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_orthonormal_rows() -> None:
    rows = basis.orthonormal_basis(5, 12)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5))


@pytest.mark.parametrize("basis_dim", [4, 11])
def test_svd_rows_are_orthonormal_whatever_the_width(basis_dim: int) -> None:
    rows = basis.svd_basis(num_experts=3, r=2, basis_dim=basis_dim, in_features=16)
    assert rows.shape == (basis_dim, 16)
    torch.testing.assert_close(rows @ rows.T, torch.eye(basis_dim), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_products_have_the_row_norms_of_a_kaiming_draw(orthonormal: bool) -> None:
    torch.manual_seed(0)
    rows = basis.orthonormal_basis(32, 256) if orthonormal else torch.randn(32, 256) * 7
    products = basis.kaiming_coefficients(8, 16, rows) @ rows
    kaiming = torch.nn.init.kaiming_uniform_(torch.empty(128, 256), a=5**0.5)
    expected = kaiming.norm(dim=-1).mean()
    assert products.norm(dim=-1).mean() == pytest.approx(expected.item(), rel=0.05)


def test_a_basis_file_round_trips(tmp_path: Path) -> None:
    bases = {"model.layers.0.q_proj": torch.randn(3, 8), "model.layers.1.q_proj": torch.randn(3, 8)}
    basis.save_basis(bases, tmp_path / "basis.safetensors")
    loaded = basis.load_basis(tmp_path / "basis.safetensors")
    assert loaded.keys() == bases.keys()
    assert all(torch.equal(loaded[name], bases[name]) for name in bases)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "there is no file"),
        (lambda file: file.write_bytes(b"not safetensors"), "not a readable safetensors file"),
        (lambda file: save_file({}, file), "holds no basis"),
        (lambda file: save_file({"q": torch.randn(4)}, file), "should be a floating-point matrix"),
        (lambda file: save_file({"q": torch.ones(2, 2).int()}, file), "floating-point matrix"),
    ],
)
def test_what_is_no_basis_is_refused(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "basis.safetensors")
    with pytest.raises(ValueError, match=message):
        basis.load_basis(tmp_path / "basis.safetensors")


def test_digests_tell_names_shapes_dtypes_and_bytes_apart() -> None:
    rows = torch.randn(4, 6)
    changed = rows.clone()
    changed[0, 0] += 1e-6
    variants = [
        {"a": rows},
        {"b": rows},
        {"a": rows.reshape(6, 4)},
        {"a": rows.bfloat16()},
        {"a": changed},
        {"a": rows, "b": rows},
    ]
    digests = [basis.basis_digest(each) for each in variants]
    assert len(set(digests)) == len(variants)
    assert basis.basis_digest({"b": rows, "a": changed}) == basis.basis_digest(
        {"a": changed, "b": rows}
    )
    assert tensor_digest(rows.T) == tensor_digest(rows.T.contiguous())
