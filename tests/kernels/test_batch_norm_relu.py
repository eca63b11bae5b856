import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_close_enough, in_layout, same_strides
from torch.nn import functional

from semiseg_kernels import batch_norm_relu, use_backend

RAW = torch.ops.semiseg_kernels
# B, *S, C: odd sizes, fewer and more channels than vectors have lanes, and such as do not divide them
CASES = {
    "3d": (2, (5, 7, 9), 16),
    "2d": (3, (17, 19), 32),
    "half a vector": (2, (6, 6, 5), 8),
    "odd channels": (2, (7, 9), 5),
    "prime channels": (1, (5, 6), 37),
    "one channel": (2, (63,), 1),
    "two voxels": (2, (1, 1, 1), 17),
    "three voxels": (1, (3,), 24),
    "vectors of voxels": (3, (8, 8, 9), 3),
    "several tiles": (2, (33, 41, 8), 4),
    "groups of channels": (3, (5, 7), 142),
    "many chunks": (1, (65537,), 7),
    "many channels": (2, (3, 4), 1021),
}


def make_inputs(case, dtype=torch.float32, layout="contiguous"):
    batch, spatial, C = CASES[case]
    weight, bias = torch.rand(C) + 0.5, torch.randn(C)
    x = torch.randn(batch, C, *spatial) * 2 + torch.randn(C, *[1] * len(spatial))
    return in_layout(x, layout).to(dtype), weight, bias


def everything(kernel, x, weight, bias, cotangent, slope=0.0):
    """Result, moved statistics and gradients, in float64 where x is."""
    with use_backend(kernel):
        given = [value.to(torch.promote_types(x.dtype, torch.float32)) for value in (weight, bias)]
        x, weight, bias = (value.detach().requires_grad_() for value in (x, *given))
        mean, variance = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()
        y = batch_norm_relu(x, weight, bias, mean, variance, momentum=0.3, negative_slope=slope)
        gradients = torch.autograd.grad(y, (x, weight, bias), cotangent.to(y.dtype))
    names = (
        "y",
        "running mean",
        "running variance",
        "gradient of x",
        "gradient of weight",
        "gradient of bias",
    )
    return dict(zip(names, (y.detach(), mean, variance, *gradients), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "slope"), [*((case, 0.01) for case in CASES), ("3d", 0.0), ("odd channels", 0.0)]
)
def test_accuracy(kernel, case, dtype, layout, slope):
    x, weight, bias = make_inputs(case, dtype, layout)
    cotangent = torch.randint(-128, 129, x.shape) / 256  # of so few digits that no dtype rounds it
    wide = x.double()
    actual, plain, exact = (
        everything(backend, given, weight, bias, in_layout(cotangent, layout), slope)
        for backend, given in ((kernel, x), ("reference", x), ("reference", wide))
    )
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        largest = max(exact[name].abs().max().item(), 1.0)
        assert_close_enough(name, value.double(), plain[name].double(), exact[name],
                            resolution=torch.finfo(value.dtype).eps, scale=largest)  # fmt: skip
    for name in ("y", "gradient of x"):
        assert same_strides(actual[name], x), f"{name} is not in x's memory format"


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_batch_normalisation_and_activation_of_pytorch(backend, layout, slope):
    x, weight, bias = make_inputs("2d", layout=layout)
    running = [torch.randn(32), torch.rand(32)]
    moved = [value.clone() for value in running]
    y = batch_norm_relu(x, weight, bias, *moved, momentum=0.4, epsilon=1e-3, negative_slope=slope)
    layer = torch.nn.BatchNorm2d(32, eps=1e-3, momentum=0.4)
    for own, value in zip((layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data),
                          (*running, weight, bias), strict=True):  # fmt: skip
        own.copy_(value)
    torch.testing.assert_close(y, functional.leaky_relu(layer(x), slope).detach())
    torch.testing.assert_close(moved, [layer.running_mean, layer.running_var])


def test_worked_by_hand(backend):
    x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]], [[1.0, 3.0], [5.0, 5.0]]], requires_grad=True)
    weight, bias = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -4.0])
    mean, variance = torch.tensor([10.0, 5.0]), torch.tensor([0.0, 4.0])
    y = batch_norm_relu(x, weight, bias, mean, variance, momentum=0.5, epsilon=3.0, negative_slope=0.5)
    # channel 0: mean 2, mean square deviation 1, so h = 2 (x - 2) / 2 + 1; channel 1 does not vary: h is the bias
    torch.testing.assert_close(y, torch.tensor([[[0.0, 2.0], [-2.0, -2.0]]] * 2))
    torch.testing.assert_close(mean, torch.tensor([6.0, 5.0]))
    torch.testing.assert_close(variance, torch.tensor([2 / 3, 2.0]))
    (gradient,) = torch.autograd.grad(
        y, x, torch.tensor([[[0.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    )
    # g = 4 at one voxel: mean 1, and its mean product with x - 2 is 1, over 1 + 3
    third = 3**0.5 / 24
    expected = [[[-0.75, 2.75], [3 * third, -third]], [[-0.75, -1.25], [-third, -third]]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


def test_a_large_mean_costs_no_digits(kernel):
    x, weight, bias = make_inputs("3d")
    cotangent = torch.rand(x.shape) - 0.5
    far = (x * 64).round() / 64 + 4096.0  # so that nothing is rounded
    near = everything("reference", (far - 4096.0).double(), weight, bias, cotangent)
    for layout in LAYOUTS:
        actual = everything(kernel, in_layout(far, layout), weight, bias, cotangent)
        for name in ("y", "running variance", "gradient of x", "gradient of weight"):
            torch.testing.assert_close(actual[name].double(), near[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_costs_no_digits(kernel, layout):
    """Of a channel that is constant but for its first voxel, far away, all squares of distances are as large."""
    x, weight, bias = make_inputs("several tiles", layout=layout)
    x[:] = 1.1
    x[0, :, 0, 0, 0] = 1000.3
    cotangent = torch.rand(x.shape) - 0.5
    actual = everything(kernel, x, weight, bias, cotangent)
    exact = everything("reference", x.double(), weight, bias, cotangent)
    for name in ("running mean", "running variance", "y"):
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-3, atol=1e-3)


def test_nan_stays_in_its_channel(backend):
    for layout in LAYOUTS:
        x, weight, bias = make_inputs("odd channels", layout=layout)
        x[1, 3, 2, 4] = torch.nan
        running = torch.zeros(5), torch.ones(5)
        y = batch_norm_relu(x, weight, bias, *running)
        assert y[:, 3].isnan().all() and y[:, [0, 1, 2, 4]].isfinite().all()
        assert [values.isnan().tolist() for values in running] == [[False, False, False, True, False]] * 2


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_passes_a_unit_that_is_off(backend, layout, value):
    """Not even what is not finite; through a slope it reaches all of its channel, and no other."""
    x, weight, bias = make_inputs("odd channels", layout=layout)
    cotangent = torch.rand(x.shape) - 0.5
    with torch.no_grad():
        off = (batch_norm_relu(x, weight, bias, torch.zeros(5), torch.ones(5)) == 0).nonzero()
    place = tuple(off[len(off) // 2])
    expected, changed = cotangent.clone(), cotangent.clone()
    expected[place], changed[place] = 0.0, value
    actual, expected = (everything(backend, x, weight, bias, given) for given in (changed, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaky = everything(backend, x, weight, bias, changed, slope=0.1)
    reached = torch.arange(5) == place[1]
    for gradient in (leaky["gradient of x"].movedim(1, 0).flatten(1).T, leaky["gradient of weight"]):
        assert torch.equal(gradient.isfinite(), (~reached).expand_as(gradient))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_strides(kernel, layout):
    """Channels of a wider tensor, and every second voxel of a row; a gradient in the other memory format."""
    x, weight, bias = make_inputs("2d", layout=layout)
    for part in (x[:, 3:11], x[:, :8, :, ::2], x.transpose(2, 3)[:, :8]):
        cotangent = torch.rand(part.shape) - 0.5
        results = [everything(kernel, given, weight[:8], bias[:8], upstream)
                   for given in (part, part.contiguous())
                   for upstream in (cotangent, in_layout(cotangent, "channels_last"))]  # fmt: skip
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_of_any_strides_and_dtype(kernel, dtype):
    x, weight, bias = make_inputs("3d", dtype)
    running = torch.rand(16, 2)
    moved, expected = running.to(dtype), running.to(dtype).float().T.contiguous()
    with use_backend(kernel):
        y = batch_norm_relu(x, weight.to(dtype), bias.to(dtype), *moved.T, momentum=0.3)
        z = batch_norm_relu(x, weight.to(dtype).float(), bias.to(dtype).float(), *expected, momentum=0.3)
    torch.testing.assert_close(y, z, rtol=0, atol=0)
    # The interpreter of Triton does not round to the nearest bfloat16.
    torch.testing.assert_close(moved.float(), expected.T, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("changed", [0, 1], ids=["mean", "variance"])
def test_moved_statistics_are_noticed_between_forward_and_backward(kernel, changed):
    x, weight, bias = make_inputs("odd channels")
    statistics, factor = (torch.zeros(5), torch.ones(5)), torch.rand(5, requires_grad=True)
    product = factor * statistics[changed]
    batch_norm_relu(x, weight, bias, *statistics)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("narrow", range(16))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_takes_parameters_of_any_two_dtypes(dtype, narrow):
    x = make_inputs("3d", dtype)[0]
    values = torch.rand(4, 16)
    given = [row.to(dtype if narrow >> number & 1 else torch.float32) for number, row in enumerate(values)]
    wide = [row.double() for row in given]
    with use_backend("reference"):
        y = batch_norm_relu(x, *given, momentum=0.3)
        expected = batch_norm_relu(x.double(), *wide, momentum=0.3)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))
    for moved, running in zip(given[2:], wide[2:], strict=True):
        torch.testing.assert_close(moved, running.to(moved.dtype))


@pytest.mark.parametrize("in_group", [False, True])
def test_numbers_of_channels(kernel, in_group):
    """With the digits of float64, also of the options; in a group the voxels and the sums are those of all processes."""
    C, voxels, momentum, epsilon = 300, 40, 0.3, 1e-3
    count = torch.tensor(70.0, dtype=torch.float64) if in_group else None
    number = 70 if in_group else voxels
    mean, variance = torch.randn(C, dtype=torch.float64), torch.rand(C, dtype=torch.float64)
    weight, bias, running_mean, running_variance = torch.rand(4, C)
    moved = running_mean.clone(), running_variance.clone()
    parameters, exact = RAW.batch_norm_relu_parameters(
        mean, variance, weight, bias, *moved, count, voxels, momentum, epsilon, kernel
    )
    rounding, inverse = mean - mean.float(), (variance + epsilon).rsqrt()
    scale = weight * inverse
    digits = {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(exact, torch.stack([rounding, inverse]), **digits)
    torch.testing.assert_close(parameters, torch.stack([mean, scale, bias - scale * rounding]).float())
    torch.testing.assert_close(moved[0], running_mean.lerp(mean.float(), momentum))
    unbiased = variance * number / (number - 1)
    torch.testing.assert_close(moved[1], running_variance.lerp(unbiased.float(), momentum))

    sums = torch.randn(2, C, dtype=torch.float64)
    joined = sums + torch.randn(2, C, dtype=torch.float64) if in_group else sums
    far = exact + torch.tensor([[1.0], [0.0]])  # a rounding that shows
    correction, grad_weight, grad_bias = RAW.batch_norm_relu_correction(
        sums, joined, far, count, voxels, kernel
    )
    product, product_of_all = (values[1] - values[0] * far[0] for values in (sums, joined))
    tilt = product_of_all / number * inverse.square()
    torch.testing.assert_close(correction, torch.stack([joined[0] / number - tilt * far[0], tilt]).float())
    torch.testing.assert_close(grad_weight, (product * inverse).float())
    torch.testing.assert_close(grad_bias, sums[0].float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["3d", "prime channels", "many chunks"])
def test_same_bits_from_any_number_of_threads(kernel, case, layout, threads):
    x, weight, bias = make_inputs(case, layout=layout)
    cotangent = torch.rand(x.shape) - 0.5
    runs = []
    for number in (1, 2, 3, 2):
        threads(number)
        runs.append(everything(kernel, x, weight, bias, cotangent))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


def test_wrong_arguments(backend):
    x, weight, bias = make_inputs("2d")
    running = torch.zeros(32), torch.ones(32)
    with pytest.raises(ValueError, match=r"x has shape \[1, 32, 1\], accepted are at least two voxels"):
        batch_norm_relu(x[:1, :, :1, 0], weight, bias, *running)
    with pytest.raises(ValueError, match=r"bias has shape \[31\], accepted is \[32\]"):
        batch_norm_relu(x, weight, bias[:31], *running)
    with pytest.raises(ValueError, match=r"running_mean has strides \[0\], accepted are elements with memory"):
        batch_norm_relu(x, weight, bias, running[0][:1].expand(32), running[1])
    with pytest.raises(ValueError, match="running_mean has dtype int64, accepted are float32"):
        batch_norm_relu(x, weight, bias, running[0].long(), running[1])
    with pytest.raises(ValueError, match="x has dtype int64"):
        batch_norm_relu(x.long(), weight, bias, *running)
    for name, value in (("momentum", 7.0), ("epsilon", -1.0), ("negative_slope", -3.0), ("negative_slope", torch.nan)):
        with pytest.raises(ValueError, match=f"{name} is {value}, accepted are "):
            batch_norm_relu(x, weight, bias, *running, **{name: value})
    assert not running[0].any()
