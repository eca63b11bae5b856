"""The convolutions between two resolutions: to half the side, and back to twice the side."""

import torch
from torch import Tensor

from . import backends, checks, reference
from .convolution import KernelConvolution, check_side, fake_result, kernel_pays, needs_gradient

FEWEST_VOXELS = 1024  # coarse; for fewer, rearranging the weight takes longer than what it spares


def strided_convolution(
    x: Tensor,  # [B, I, *2S], *S 2 or 3 axes
    weight: Tensor,  # [O, I, *2]
    bias: Tensor | None = None,  # [O]
    negative_slope: float = 1.0,  # of a ReLU of the result; 1 leaves it out
) -> Tensor:  # [B, O, *S]
    """Convolution with a kernel of side 2 and stride 2, as `torch.nn.functional.conv3d` and `conv2d`.

        y[b, o, s] = bias[o] + sum_i sum_t weight[o, i, t] x[b, i, 2 s + t],  t in {0, 1}^axes
        then max(y, 0) + negative_slope min(y, 0)

    x: float32, bfloat16 or float16 (float64 runs on the reference).
    weight, bias: x's dtype, or any under autocast.

    The C++ kernel computes in float32 and needs even sides. Unless it is asked for by name it runs where it is faster, on
    the terms of `convolution` but from 1024 coarse voxels on; else PyTorch convolves. Differentiable in x, weight and
    bias. Raises ValueError on wrong shapes or dtypes, or a slope outside 0..1.
    """
    _check(x, weight, bias, negative_slope, transposed=False)
    backend = _select(x, weight, FEWEST_VOXELS * 2 ** (x.dim() - 2))
    if backend != "reference" and any(side % 2 for side in x.shape[2:]):
        if not backends.is_automatic():
            raise ValueError(f"x has sides {list(x.shape[2:])}, accepted by the kernel are even ones")
        backend = "reference"
    if backend == "reference":
        return reference.strided_convolution(x, weight, bias, negative_slope)
    return KernelConvolution.apply(x, weight, bias, negative_slope, backend, "strided_convolution")


def transposed_convolution(
    x: Tensor,  # [B, I, *S], *S 2 or 3 axes
    weight: Tensor,  # [I, O, *2]
    bias: Tensor | None = None,  # [O]
    negative_slope: float = 1.0,  # of a ReLU of the result; 1 leaves it out
    added: Tensor | None = None,  # [B, O, *2S], to the result, as a skip connection
) -> Tensor:  # [B, O, *2S]
    """The transposed `strided_convolution`, as `torch.nn.functional.conv_transpose3d` and `conv_transpose2d`.

        y[b, o, 2 s + t] = bias[o] + sum_i weight[i, o, t] x[b, i, s],  t in {0, 1}^axes
        then max(y, 0) + negative_slope min(y, 0) + added

    Dtypes, the kernel's terms, gradients and errors are those of `strided_convolution`; `added` has the dtype of x.
    """
    _check(x, weight, bias, negative_slope, transposed=True)
    if added is not None:
        checks.check_dtype("added", added, (x.dtype,))
        checks.check_shape("added", added, (x.shape[0], weight.shape[1], *(2 * side for side in x.shape[2:])))
        checks.check_device("added", added, x)
    backend = _select(x, weight, FEWEST_VOXELS)
    if backend == "reference":
        return reference.transposed_convolution(x, weight, bias, negative_slope, added)
    if added is None or needs_gradient(x, weight, bias, added):
        y = KernelConvolution.apply(x, weight, bias, negative_slope, backend, "transposed_convolution")
        return y if added is None else y + added
    return torch.ops.semiseg_kernels.strided_convolution_transposed(
        x, weight, bias, negative_slope, added, backend
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float, transposed: bool) -> None:
    checks.check_voxels("x", x)
    check_side(x, weight, 2)
    checks.check_convolution(weight, bias, 0, x, x.shape[1], transposed)
    checks.check_fraction("negative_slope", negative_slope)


def _select(x: Tensor, weight: Tensor, fewest: int) -> str:
    if x.device.type != "cpu" or (backends.is_automatic() and not kernel_pays(x, weight, fewest)):
        return "reference"
    return backends.select("strided_convolution", x, 1, 1, max(weight.shape[:2]))


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float, backend: str
) -> Tensor:
    return fake_result(x, weight.shape[0], [side // 2 for side in x.shape[2:]])


def _fake_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float, added: Tensor | None, backend: str
) -> Tensor:
    return fake_result(x, weight.shape[1], [2 * side for side in x.shape[2:]])


def _fake_weight(fine: Tensor, coarse: Tensor, weight: Tensor, backend: str) -> Tensor:
    return torch.empty_like(weight)


backends.register(
    "strided_convolution_forward(Tensor x, Tensor weight, Tensor? bias, float negative_slope, str backend) -> Tensor",
    _fake_forward,
)
backends.register(
    "strided_convolution_transposed(Tensor x, Tensor weight, Tensor? bias, float negative_slope, Tensor? added, "
    "str backend) -> Tensor",
    _fake_transposed,
)
backends.register(
    "strided_convolution_weight(Tensor fine, Tensor coarse, Tensor weight, str backend) -> Tensor",
    _fake_weight,
)
