from unittest import mock

import pytest
import torch

from semiseg.config import load_config
from semiseg.engine.precision import autocast, check_precision, precision

CPU = torch.device("cpu")
WITH, WITHOUT = {"avx512_bf16": True, "amx_bf16": True}, {"avx512_bf16": True, "amx_bf16": False}


def product_dtype(asked, capabilities, patch=(48, 48, 32), device=CPU):
    config = load_config(
        "phantom_supervised",
        [
            f"training.precision={asked}",
            f"training.patch_size={list(patch)}",
            f"evaluation.stride={list(patch)}",
        ],
    )
    with mock.patch("torch.cpu.get_capabilities", return_value=capabilities), autocast(config, device):
        dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        assert f"torch.{precision(config, device)}" == str(dtype)
    return dtype


@pytest.mark.parametrize("capabilities", [WITH, WITHOUT, {}])
def test_a_precision_that_is_asked_for_is_used(capabilities):
    assert product_dtype("float32", capabilities) == torch.float32
    assert product_dtype("bfloat16", capabilities) == torch.bfloat16


def test_auto_is_bfloat16_where_the_cpu_has_units_for_it():
    assert product_dtype("auto", WITH) == torch.bfloat16
    assert product_dtype("auto", WITHOUT) == product_dtype("auto", {}) == torch.float32


@pytest.mark.parametrize("first_side", [16, 32])
def test_patches_whose_bfloat16_gradients_are_wrong_on_the_cpu(first_side):
    assert product_dtype("auto", WITH, (first_side, 48, 48)) == torch.float32
    assert product_dtype("auto", WITH, (48, first_side, first_side)) == torch.bfloat16
    config = load_config(
        "phantom_supervised",
        ["training.precision=bfloat16", f"training.patch_size=[{first_side}, 48, 48]", "evaluation.stride=[8, 8, 8]"],
    )
    message = rf"bfloat16 and training.patch_size \[{first_side}, 48, 48\], accepted on the CPU are auto and float32"
    with pytest.raises(ValueError, match=message):
        check_precision(config, CPU)
    check_precision(config, torch.device("cuda"))


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16", False), reason="this CPU has no bfloat16 arithmetic"
)
@pytest.mark.parametrize("side", [1, 3, 4, 5, 6, 7, 12])
def test_bfloat16_gradients_are_finite_and_the_same_each_time(side):
    """Of a convolution on the sides that stages can meet, amid memory full of NaN; a first side of 2 fails this."""
    x, weight = torch.randn(2, 16, side, 4, 3).bfloat16(), torch.randn(16, 16, 3, 3, 3).bfloat16()
    upstream = torch.randn_like(x)
    gradients = []
    for _ in range(4):
        garbage = [torch.full((count,), torch.nan) for count in (300, 3000, 30_000, 300_000)]
        del garbage
        arguments = (None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1, [True, True, False])
        gradients.append(torch.ops.aten.convolution_backward(upstream, x, weight, *arguments)[:2])
    for gradient in gradients:
        assert all(part.isfinite().all() for part in gradient)
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_auto_on_a_gpu():
    device = torch.device("cuda")
    config = load_config("la_mper", ["training.precision=auto"])
    with autocast(config, device):
        product = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    assert product.dtype == expected
