import itertools

import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_close_enough, in_layout
from torch import nn

import semiseg_kernels
from semiseg.models.convolution import StridedConvolution3d, TransposedConvolution2d, TransposedConvolution3d
from semiseg_kernels import reference, strided_convolution, transposed_convolution, use_backend

OPERATION = "strided_convolution"  # that not every backend has

# B, coarse sides, channels of the fine and of the coarse voxels: fewer voxels than rows of a block, and blocks left over
CASES = {
    "3d": (2, (3, 4, 13), 16, 32),
    "2d": (3, (7, 9), 32, 16),
    "no batch": (0, (4, 4), 16, 16),
    "one voxel": (1, (1, 1, 1), 3, 1),
    "thin": (1, (2, 1, 5), 17, 5),
    "many channels": (1, (3, 7), 96, 160),
    "several sums": (2, (7, 9, 19), 16, 16),
}
DIRECTIONS = ("strided_convolution", "transposed_convolution")
NAMES = ("result", "gradient of x", "gradient of weight", "gradient of bias")


def make_inputs(direction, case, dtype=torch.float32, layout="contiguous"):
    batch, coarse, of_fine, of_coarse = CASES[case]
    fine = [2 * side for side in coarse]
    weight = torch.randn(of_coarse, of_fine, *[2] * len(coarse)) / 8
    sides, channels = ((fine, coarse), (of_fine, of_coarse))
    if direction == "transposed_convolution":
        sides, channels = sides[::-1], channels[::-1]
    x = in_layout(torch.randn(batch, channels[0], *sides[0]), layout).to(dtype)
    cotangent = torch.randint(-64, 65, (batch, channels[1], *sides[1])) / 64
    return x, in_layout(weight, layout), torch.randn(channels[1]), cotangent


def everything(kernel, direction, x, weight, bias, cotangent, negative_slope=1.0):
    given = [value.detach().requires_grad_() for value in (x, weight, bias) if value is not None]
    with use_backend(kernel):
        y = getattr(semiseg_kernels, direction)(*given, negative_slope=negative_slope)
        gradients = torch.autograd.grad(y, given, cotangent.to(y.dtype))
    return dict(zip(NAMES, (y.detach(), *gradients), strict=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_accuracy(kernel, direction, case, dtype, layout):
    x, weight, bias, cotangent = make_inputs(direction, case, dtype, layout)
    for offset in (bias, None):
        given = [x, weight, offset, cotangent]
        narrow = [value if value is None else value.to(dtype) for value in given]
        wide = [value if value is None else value.double() for value in narrow]
        actual, plain, exact = (
            everything(backend, direction, *values)
            for backend, values in ((kernel, narrow), ("reference", narrow), ("reference", wide))
        )
        for name, value in actual.items():
            assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
            assert_close_enough(name, value.double(), plain[name].double(), exact[name],
                                resolution=torch.finfo(dtype).eps)  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_accuracy_of_every_level(level, direction):
    for case in ("3d", "2d", "several sums"):
        given = make_inputs(direction, case, layout="channels_last")
        actual, exact = everything("cpu", direction, *given), everything("reference", direction, *given)
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_of_every_layout(kernel, direction):
    x, weight, bias, cotangent = make_inputs(direction, "3d")
    expected = everything(kernel, direction, x, weight, bias, cotangent)
    forms = [
        lambda x: in_layout(x, "channels_last"),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ]
    for of_x, of_weight, of_cotangent in itertools.product(forms, repeat=3):
        given = of_x(x), of_weight(weight), bias, of_cotangent(cotangent)
        torch.testing.assert_close(everything(kernel, direction, *given), expected, rtol=0, atol=0)


def test_worked_by_hand(backend):
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]], requires_grad=True)
    weight = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]], requires_grad=True)
    bias = torch.tensor([0.5], requires_grad=True)
    y = strided_convolution(x, weight, bias)
    assert y.tolist() == [[[[6521.5, 8743.5]]]]
    by_x, by_weight, by_bias = torch.autograd.grad(
        y, (x, weight, bias), torch.tensor([[[[1.0, 2.0]]]]), retain_graph=True
    )
    assert by_x.tolist() == [[[[1, 10, 2, 20], [100, 1000, 200, 2000]]]]
    assert by_weight.tolist() == [[[[1 + 6, 2 + 8], [5 + 14, 6 + 16]]]]
    assert by_bias.item() == 3
    back = transposed_convolution(torch.tensor([[[[1.0, 2.0]]]]), weight, bias)
    assert torch.equal(back, by_x + 0.5)


@pytest.mark.parametrize("negative_slope", [0.0, 0.25])
@pytest.mark.parametrize("case", ["3d", "2d", "thin", "no batch"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_relu_of_the_result(kernel, direction, case, negative_slope):
    given = make_inputs(direction, case)
    plain = everything(kernel, direction, *given)
    slopes = torch.where(plain["result"] > 0, 1.0, negative_slope)
    expected = everything(kernel, direction, *given[:3], given[3] * slopes)
    expected["result"] = plain["result"] * slopes
    actual = everything(kernel, direction, *given, negative_slope=negative_slope)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("negative_slope", [0.0, 0.25])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_relu_of_infinities(kernel, direction, negative_slope):
    x, weight, bias, _ = make_inputs(direction, "2d")
    x[1, 3, 4, 5] = torch.inf
    expected = getattr(reference, direction)(x, weight, bias, negative_slope)
    assert expected.isinf().any() and not expected.isnan().any()
    actual = getattr(semiseg_kernels, direction)(x, weight, bias, negative_slope)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["3d", "2d", "thin", "no batch"])
def test_added(kernel, case, dtype, layout):
    """To the result behind ReLU, whether or not a gradient is asked for."""
    x, weight, bias, cotangent = make_inputs("transposed_convolution", case, dtype)
    added = in_layout(torch.randn(cotangent.shape).to(dtype), layout)
    with use_backend(kernel):
        expected = transposed_convolution(x, weight, bias, 0.0) + added
        actual = transposed_convolution(x, weight, bias, 0.0, added)
        torch.testing.assert_close(actual, expected, rtol=0, atol=torch.finfo(dtype).eps * 8)
        given = [value.requires_grad_() for value in (x, weight, bias, added)]
        y = transposed_convolution(*given[:3], 0.0, added)
        assert torch.equal(y, expected)
        gradients = torch.autograd.grad(y, given, cotangent.to(dtype))
        without = torch.autograd.grad(transposed_convolution(*given[:3], 0.0), given[:3], cotangent.to(dtype))
    for gradient, other in zip(gradients, (*without, cotangent.to(dtype)), strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_stays_in_its_voxels(backend, direction):
    x, weight, bias, _ = make_inputs(direction, "2d")
    x[1, 3, 4, 5] = torch.nan
    finite = getattr(semiseg_kernels, direction)(x, weight, bias).isfinite().all(1)
    assert (~finite).sum() == (1 if direction == "strided_convolution" else 4)
    assert not finite[1, 2 if direction == "strided_convolution" else 8].all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_from_any_number_of_threads(kernel, direction, threads):
    given = make_inputs(direction, "several sums", layout="channels_last")
    runs = []
    for number in (1, 2, 3):
        threads(number)
        runs.append(everything(kernel, direction, *given))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


def test_opcheck(kernel):
    x, weight, bias, cotangent = make_inputs("strided_convolution", "2d")
    operations = torch.ops.semiseg_kernels
    torch.library.opcheck(operations.strided_convolution_forward, (x, weight, bias, 0.01, kernel))
    for added in (torch.randn(x.shape), None):
        torch.library.opcheck(
            operations.strided_convolution_transposed, (cotangent, weight, None, 1.0, added, kernel)
        )
    torch.library.opcheck(operations.strided_convolution_weight, (x, cotangent, weight, kernel))


def chosen(operation, x, weight):
    """Whether the kernel runs, by its node in the graph."""
    return operation(x.requires_grad_(), weight).grad_fn.name() == "KernelConvolutionBackward"


@pytest.mark.parametrize(("operation", "sides"), [(strided_convolution, (16, 16, 32)), (transposed_convolution, (8, 8, 16))])  # fmt: skip
def test_automatic_choice(operation, sides):
    if "cpu" not in semiseg_kernels.available_backends():
        pytest.skip("the C++ kernels are not built")
    weight = torch.randn(16, 16, 2, 2, 2)
    x = in_layout(torch.randn(1, 16, *sides), "channels_last")
    assert chosen(operation, x, weight)
    assert not chosen(operation, x.detach().contiguous(), weight)
    assert not chosen(operation, x.detach()[..., :8], weight)
    assert not chosen(operation, x.detach().double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not chosen(operation, x.detach(), weight)


def test_wrong_arguments(backend):
    x, weight, bias, _ = make_inputs("strided_convolution", "2d")
    with pytest.raises(ValueError, match=r"weight has shape \[16, 31, 2, 2\], accepted is \[O, 32, k, k\]"):
        strided_convolution(x, weight[:, :31], bias)
    with pytest.raises(
        ValueError, match=r"weight has shape \[16, 32, 1, 2\], accepted are kernels of side 2"
    ):
        strided_convolution(x, weight[:, :, :1], bias)
    with pytest.raises(ValueError, match=r"bias has shape \[15\], accepted is \[16\]"):
        strided_convolution(x, weight, bias[:15])
    with pytest.raises(ValueError, match=r"weight has shape \[16, 32, 2, 2\], accepted is \[32, O, k, k\]"):
        transposed_convolution(x, weight, bias)
    with pytest.raises(ValueError, match="accepted are 2 or 3 axes of voxels"):
        transposed_convolution(x[0], weight[0], bias)
    with pytest.raises(ValueError, match=r"negative_slope is -0.1, accepted are 0\.\.1"):
        strided_convolution(x, weight, bias, -0.1)
    with pytest.raises(ValueError, match=r"added has shape \[3, 16, 14, 18\], accepted is \[3, 16, 28, 36\]"):
        transposed_convolution(x, weight.transpose(0, 1), bias, added=torch.randn(3, 16, 14, 18))
    with pytest.raises(ValueError, match="added has dtype float64, accepted are float32"):
        transposed_convolution(x, weight.transpose(0, 1), bias, added=torch.randn(3, 16, 28, 36).double())
    with pytest.raises(ValueError, match="x has dtype int64"):
        transposed_convolution(x.long(), weight, bias)


def test_odd_sides():
    x, weight = torch.randn(1, 16, 5, 7), torch.randn(16, 16, 2, 2)
    assert torch.equal(strided_convolution(x, weight), reference.strided_convolution(x, weight))
    if "cpu" in semiseg_kernels.available_backends():
        with use_backend("cpu"), pytest.raises(ValueError, match="accepted by the kernel are even ones"):
            strided_convolution(x, weight)


@pytest.mark.parametrize(
    ("layer", "plain", "sides"),
    [
        (StridedConvolution3d, nn.Conv3d, (4, 6, 8)),
        (TransposedConvolution3d, nn.ConvTranspose3d, (3, 2, 4)),
        (TransposedConvolution2d, nn.ConvTranspose2d, (3, 5)),
    ],
)
def test_layers_are_pytorchs(layer, plain, sides):
    own, expected = layer(16, 32), plain(16, 32, kernel_size=2, stride=2)
    expected.load_state_dict(own.state_dict())
    x = torch.randn(2, 16, *sides)
    torch.testing.assert_close(own(x), expected(x))
