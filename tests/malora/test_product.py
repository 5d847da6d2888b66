"""The GPU's product of few tokens; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from malora.kernels import product

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The kernel is for 16-bit values, whose products the interpreter gets wrong.
DTYPE = torch.bfloat16 if GPU.type == "cuda" else torch.float32
TOLERANCE = {"atol": 0.1, "rtol": 2**-8} if GPU.type == "cuda" else {"atol": 2e-4, "rtol": 1e-5}


@pytest.mark.parametrize(
    ("tokens", "m", "n"),
    [
        (1, 64, 128),
        (3, 192, 256),
        (5, 640, 128),
        (17, 64, 1152),
        (33, 128, 2304),
        (100, 128, 2048),
        (128, 256, 128),
        # More than two tiles for each multiprocessor.
        (64, 17024 if GPU.type == "cuda" else 640, 256),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_equals_the_product(tokens, m, n, has_bias):
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(DTYPE) for shape in ((tokens, n), (m, n), (m,))
    )
    given = [t.to(GPU) for t in (x, weight, bias)]
    assert product.fits(tokens, given[1])
    want = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    for _ in range(2):  # what it counts with is as it was after each launch
        got = product.multiply(given[0], given[1], given[2] if has_bias else None)
        torch.testing.assert_close(got.double().cpu(), want, **TOLERANCE)


def test_what_its_tiles_do_not_divide_does_not_fit():
    weight = torch.empty(64, 128)
    assert not product.fits(129, weight)
    assert not product.fits(1, torch.empty(65, 128))
    assert not product.fits(1, torch.empty(64, 192))
    assert not product.fits(1, torch.empty(64, 128, dtype=torch.int8))
