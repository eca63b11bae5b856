import itertools

import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_close_enough, in_layout, same_strides
from test_determinism import launched
from torch.nn.functional import pad

from semiseg_kernels import convolution, reference, use_backend

OPERATION = "convolution"  # that not every backend has

# B, *S, I, O: odd and even sides, sides shorter than a tile's reach, channels that are padded
CASES = {
    "3d": (2, (5, 7, 9), 16, 32),
    "2d": (3, (17, 19), 32, 16),
    "no batch": (0, (4, 4), 16, 16),
    "one voxel": (1, (1, 1, 1), 3, 1),
    "two by three": (2, (2, 3), 1, 16),
    "thin": (1, (3, 1, 2), 17, 5),
    "even sides": (1, (4, 6, 2), 48, 33),
    "a plane": (2, (1, 9, 8), 16, 48),
    "many channels": (2, (7, 6), 96, 160),  # tiles of four lines
    "four lines": (2, (7, 11, 10), 48, 16),  # a tile, in a volume
    "turned": (3, (4, 7, 5), 32, 16),  # tiles lie along the last axis but one
    "turned images": (2, (7, 5), 32, 16),
    "several sums": (2, (13, 20, 34), 16, 16),  # more tiles than are summed in float32
    "four lines of sums": (2, (210, 170), 16, 16),  # of the weight's gradient, which so many voxels are needed for
    "first layer": (2, (9, 14, 21), 1, 16),  # more voxels than are summed in float32
    "first layer of images": (3, (37, 41), 3, 32),
    "two channels": (2, (9, 14, 21), 2, 16),
    "three channels": (2, (8, 9, 11), 3, 16),
    "four channels": (3, (19, 23), 4, 16),
    "five channels": (2, (7, 12, 10), 5, 48),
}
LARGE = ("3d", "2d", "four lines", "turned", "several sums", "four lines of sums", "first layer", "first layer of images",
         "two channels", "three channels", "four channels", "five channels")  # fmt: skip
NAMES = ("result", "gradient of x", "gradient of weight", "gradient of bias")


def make_inputs(case, dtype=torch.float32, layout="contiguous"):
    batch, spatial, I, O = CASES[case]
    taps = 3 ** len(spatial)
    x = in_layout(torch.randn(batch, I, *spatial), layout).to(dtype)
    weight = in_layout(torch.randn(O, I, *[3] * len(spatial)), layout) / (taps * I) ** 0.5
    cotangent = torch.randint(-64, 65, (batch, O, *spatial)) / 64  # rounded in no dtype
    return x, weight, torch.randn(O), cotangent


def everything(kernel, x, weight, bias, cotangent, negative_slope=1.0):
    """Result and gradients, of two tensors where the bias is None."""
    with use_backend(kernel):
        given = [value.detach().requires_grad_() for value in (x, weight, bias) if value is not None]
        y = convolution(*given, negative_slope=negative_slope)
        gradients = torch.autograd.grad(y, given, cotangent.to(y.dtype))
    return dict(zip(NAMES, (y.detach(), *gradients), strict=False))


def compared(kernel, x, weight, bias, cotangent):
    """Of the kernel, of PyTorch in the same dtypes, channels last as the kernel computes, and in float64."""
    alike = [in_layout(value, "channels_last") for value in (x, cotangent)]
    wide = [None if value is None else value.double() for value in (x, weight, bias)]
    return [everything(kernel, x, weight, bias, cotangent), everything("reference", alike[0], weight, bias, alike[1]),
            everything("reference", *wide, cotangent)]  # fmt: skip


def assert_accurate(kernel, x, weight, bias, cotangent):
    # Winograd's sums round more often than they have products: on images of a few voxels the weight's gradient, and
    # all else too where PyTorch sums few products, errs up to 4 times as much as PyTorch (a single voxel's up to 60
    # times, as other taps cancel). That is within the four roundings of the largest value that every kernel is allowed.
    actual, plain, exact = compared(kernel, x, weight, bias, cotangent)
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape, name
        assert_close_enough(name, value.double(), plain[name].double(), exact[name],
                            resolution=torch.finfo(value.dtype).eps)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    x, weight, bias, cotangent = make_inputs(case, dtype, layout)
    for given in (bias, None):
        assert_accurate(kernel, x, weight, given, cotangent)


@pytest.mark.parametrize("case", LARGE)
def test_accuracy_of_every_level(level, case):
    assert_accurate("cpu", *make_inputs(case, layout="channels_last"))


@pytest.mark.parametrize("case", LARGE)
def test_errors_are_as_small_as_pytorchs(kernel, case):
    """Over all values, with no allowance: PyTorch's errors are small where it adds few products, as here."""
    actual, plain, exact = compared(kernel, *make_inputs(case, layout="channels_last"))
    for name, factor in zip(NAMES, (2.0, 2.0, 3.0), strict=False):
        error, of_pytorch = (
            (results[name] - exact[name]).square().mean().sqrt() for results in (actual, plain)
        )
        assert error <= factor * of_pytorch, name


def test_errors_of_a_single_image(kernel):
    """PyTorch has a way of its own for these, whose errors are as small as a sixth of those of tiles of four lines."""
    x, weight, bias, cotangent = make_inputs("many channels")
    actual, _, exact = compared(kernel, x[:1], weight, bias, cotangent[:1])
    for name in ("result", "gradient of x"):
        assert (actual[name] - exact[name]).norm() <= 8 * torch.finfo(torch.float32).eps * exact[name].norm(), name


def every_second(x):
    """Neither contiguous nor channels-last, and NaN wherever it must not be read."""
    around = torch.full([2 * side for side in x.shape], torch.nan)
    return around[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


FORMS = {layout: lambda x, layout=layout: in_layout(x, layout) for layout in LAYOUTS} | {
    "every second": every_second,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("case", ["3d", "2d", "thin"])
def test_same_bits_of_every_layout(kernel, case):
    """Of x, weight and upstream gradient."""
    x, weight, bias, cotangent = make_inputs(case)
    expected = everything(kernel, x, weight, bias, cotangent)
    for of_x, of_weight, of_cotangent in itertools.product(FORMS.values(), repeat=3):
        laid_out = of_weight(weight)
        actual = everything(kernel, of_x(x), laid_out, bias, of_cotangent(cotangent))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert same_strides(actual["gradient of weight"], torch.empty_like(laid_out))
        for name in ("result", "gradient of x"):
            assert same_strides(actual[name], in_layout(actual[name], "channels_last")), name


@pytest.mark.parametrize(
    "bias", [torch.randn(32)[::2], torch.randn(1).expand(16)], ids=["strided", "expanded"]
)
def test_bias_of_other_strides(kernel, bias):
    x, weight, _, cotangent = make_inputs("2d")
    expected = everything(kernel, x, weight, bias.contiguous(), cotangent)
    torch.testing.assert_close(everything(kernel, x, weight, bias, cotangent), expected, rtol=0, atol=0)


def assert_equal_but_for_rounding(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_worked_by_hand(backend):
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3).requires_grad_()
    bias = torch.tensor([10.0], requires_grad=True)
    y = convolution(x, weight, bias)
    expected = [[5 + 12 + 24 + 36, 4 + 10 + 21 + 32], [2 + 6 + 15 + 24, 1 + 4 + 12 + 20]]
    assert_equal_but_for_rounding(y, torch.tensor([[expected]]) + 10.0)
    cotangent = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    by_x, by_weight, by_bias = torch.autograd.grad(y, (x, weight, bias), cotangent)
    assert_equal_but_for_rounding(by_x.flatten(), [5 + 2 * 1, 6 + 2 * 2, 8 + 2 * 4, 9 + 2 * 5])
    assert_equal_but_for_rounding(by_weight.flatten(), [2 * 1, 2 * 2, 0, 2 * 3, 1 + 2 * 4, 2, 0, 3, 4])
    assert by_bias.tolist() == [3]


@pytest.mark.parametrize("negative_slope", [0.0, 0.25])
@pytest.mark.parametrize("case", ["3d", "2d", "thin", "two by three", "no batch"])
def test_relu_of_the_result(kernel, case, negative_slope):
    given = make_inputs(case)
    plain = everything(kernel, *given)
    active = plain["result"] > 0
    slopes = torch.where(active, 1.0, negative_slope)
    expected = everything(kernel, *given[:3], given[3] * slopes)
    expected["result"] = plain["result"] * slopes
    actual = everything(kernel, *given, negative_slope=negative_slope)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    with torch.no_grad(), use_backend(kernel):
        assert torch.equal(convolution(*given[:3], negative_slope=negative_slope), actual["result"])


@pytest.mark.parametrize("negative_slope", [0.0, 0.25])
def test_relu_of_infinities(kernel, negative_slope):
    """Of few channels, which are multiplied without transforms; others are NaN near an infinity."""
    x, weight = torch.randn(2, 1, 5, 6), torch.randn(16, 1, 3, 3)
    x[1, 0, 2, 3] = torch.inf
    expected = reference.convolution(x, weight, negative_slope=negative_slope)
    assert expected.isinf().any() and not expected.isnan().any()
    torch.testing.assert_close(convolution(x, weight, negative_slope=negative_slope), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("case", ["3d", "2d"])
def test_no_gradient_passes_a_unit_that_is_off(backend, case, value):
    x, weight, bias, cotangent = make_inputs(case)
    with torch.no_grad():
        off = convolution(x, weight, bias) < -0.1
    results = []
    for there in (0.0, value):
        given = cotangent.where(~off, there)
        results.append(everything(backend, x, weight, bias, given, negative_slope=0.0))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("spatial", [(5, 4, 3), (6, 7)])
def test_every_tap_shifts_the_image(backend, spatial):
    """Gradients shift back."""
    taps = list(itertools.product(range(3), repeat=len(spatial)))
    weight = torch.eye(len(taps)).view(len(taps), 1, *[3] * len(spatial))
    x, cotangent = (torch.randint(-9, 10, (2, channels, *spatial)).float() for channels in (1, len(taps)))

    def shifted(x, tap):
        window = (slice(first, first + side) for first, side in zip(tap, spatial, strict=True))
        return pad(x, [1] * 2 * len(spatial))[(..., *window)]

    actual = everything(backend, x, weight, None, cotangent)
    back = [tuple(2 - place for place in tap) for tap in taps]
    parts = [shifted(cotangent[:, number], tap) for number, tap in enumerate(back)]
    expected = torch.cat([shifted(x, tap) for tap in taps], dim=1)
    assert_equal_but_for_rounding(actual["result"], expected)
    assert_equal_but_for_rounding(actual["gradient of x"], sum(parts).unsqueeze(1))
    correlations = torch.einsum("bo...,bt...->ot", cotangent, expected)
    assert_equal_but_for_rounding(actual["gradient of weight"].flatten(1), correlations)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("voxel", [(4, 5, 7), (0, 8, 3)])
def test_nan_and_inf_stay_within_reach_of_their_tiles(backend, voxel, value):
    """All that reads them is not finite; of the rest, only what shares a tile with it may be so too."""
    x, weight, cotangent = (
        torch.randn(2, 16, 9, 9, 10),
        torch.randn(17, 16, 3, 3, 3),
        torch.randn(2, 17, 9, 9, 10),
    )
    voxels = torch.stack(torch.meshgrid([torch.arange(side) for side in x.shape[2:]], indexing="ij"), dim=-1)
    distance = (voxels - torch.tensor(voxel)).abs()
    read = (distance <= 1).all(dim=-1)
    out_of_reach = (distance > torch.tensor([2, 2, 4])).any(dim=-1)  # of a tile of 2 x 2 x 4 voxels

    def with_value(y):
        y = y.clone()
        y[(1, 3, *voxel)] = value
        return y

    def assert_stays(finite):
        assert finite[0].all()
        assert not finite[1, :, read].any() and finite[1, :, out_of_reach].all()

    actual = everything(backend, with_value(x), weight, None, cotangent)
    assert_stays(actual["result"].isfinite())
    finite = actual["gradient of weight"].isfinite()
    assert not finite[:, 3, 1, 1, 1].any() and finite[:, torch.arange(16) != 3].all()

    actual = everything(backend, x, weight, None, with_value(cotangent))
    assert_stays(actual["gradient of x"].isfinite())
    finite = actual["gradient of weight"].isfinite()
    assert not finite[3, :, 1, 1, 1].any() and finite[torch.arange(17) != 3].all()


@pytest.mark.parametrize("case", ["2d", "thin", "several sums"])
def test_same_bits_from_any_number_of_threads(kernel, case, threads):
    inputs = make_inputs(case, layout="channels_last")
    runs = []
    for number in (1, 2, 3, 2):
        threads(number)
        runs.append(everything(kernel, *inputs))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("channels", [16, 1])
@pytest.mark.parametrize("sides", [(19, 40, 67), (200, 281)])
def test_batch_beyond_the_caches(kernel, sides, channels):
    """Its results are streamed, and its lines fetched ahead, as those of a single image are not."""
    x = in_layout(torch.randn(3, channels, *sides), "channels_last")
    weight = torch.randn(16, channels, *[3] * len(sides))
    with use_backend(kernel), torch.no_grad():
        y = convolution(x, weight)
        assert y.nbytes > 8 << 20 > y[0].nbytes
        torch.testing.assert_close(y, torch.cat([convolution(image, weight) for image in x.split(1)]), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["2d", "one voxel"])
def test_result_may_be_changed_in_place(kernel, case):
    """As activations behind it do."""
    x, weight, bias, cotangent = make_inputs(case)
    given = [value.requires_grad_() for value in (x, weight, bias)]
    actual = torch.autograd.grad(convolution(*given).relu_(), given, cotangent)
    expected = torch.autograd.grad(reference.convolution(*given).relu(), given, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_defaults_of_pytorch_change_nothing(kernel):
    """Neither the default dtype nor the default device is that of what the kernels write."""
    given = make_inputs("2d")
    expected = everything(kernel, *given)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = everything(kernel, *given)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_channels_last_is_never_copied(kernel, monkeypatch):
    x, weight, bias, cotangent = make_inputs("several sums", layout="channels_last")
    sizes = {}
    for direction in ("forward", "backward", "weight"):
        launched(kernel, OPERATION, direction, monkeypatch, sizes)
    everything(kernel, x, weight, bias, in_layout(cotangent, "channels_last"))
    large = {direction: [size for size in sizes[direction] if size >= x.nbytes // 2] for direction in sizes}
    assert large == {"forward": [x.nbytes], "backward": [x.nbytes], "weight": []}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["2d", "thin"])
def test_opcheck(kernel, case, dtype):
    x, weight, bias, cotangent = make_inputs(case, dtype)
    operations = torch.ops.semiseg_kernels
    for given, negative_slope in ((bias, 1.0), (None, 0.01)):
        torch.library.opcheck(operations.convolution_forward, (x, weight, given, negative_slope, kernel))
    torch.library.opcheck(operations.convolution_backward, (cotangent.to(dtype), weight, kernel))
    torch.library.opcheck(operations.convolution_weight, (cotangent.to(dtype), x, weight, kernel))


@pytest.mark.slow
def test_one_graph_for_every_number_of_voxels(kernel):
    torch._dynamo.reset()
    compiled = torch.compile(convolution, fullgraph=True, dynamic=True, backend="aot_eager")
    for spatial in ((5, 6, 7), (3, 9, 4), (11, 2, 13)):
        given = [torch.randn(2, 16, *spatial), torch.randn(17, 16, 3, 3, 3), torch.randn(17)]
        given = [value.requires_grad_() for value in given]
        results = []
        for run in (compiled, convolution):
            with torch._dynamo.config.patch(error_on_recompile=True):
                result = run(*given)
            results.append((result, torch.autograd.grad(result.square().mean(), given)))
        torch.testing.assert_close(results[0], results[1])


def names(calls):
    """Those of compiled functions, but for the one that only rearranges a weight."""
    return [name for name, _ in calls if name != "convolution_matrices"]


# Shape of x, O, layout, dtype
AUTOMATIC = {
    "2048 voxels of a volume": ((1, 32, 16, 16, 8), 16, "channels_last", torch.float32),
    "1024 pixels of images": ((4, 16, 16, 16), 48, "channels_last", torch.float32),
}
PYTORCHS = {
    "2040 voxels of a volume": ((1, 32, 15, 17, 8), 16, "channels_last", torch.float32),
    "1020 pixels of images": ((3, 16, 17, 20), 48, "channels_last", torch.float32),
    "contiguous": ((1, 32, 16, 16, 8), 16, "contiguous", torch.float32),
    "bfloat16": ((1, 32, 16, 16, 8), 16, "channels_last", torch.bfloat16),
    "float64": ((1, 32, 16, 16, 8), 16, "channels_last", torch.float64),
    "17 channels": ((1, 17, 16, 16, 8), 16, "channels_last", torch.float32),
    "17 results": ((1, 32, 16, 16, 8), 17, "channels_last", torch.float32),
}


@pytest.mark.parametrize("name", [*AUTOMATIC, *PYTORCHS])
def test_automatic_choice(convolution_calls, name):
    shape, O, layout, dtype = (AUTOMATIC | PYTORCHS)[name]
    x, weight = (
        in_layout(torch.randn(shape), layout).to(dtype),
        torch.randn(O, shape[1], *[3] * (len(shape) - 2)),
    )
    cotangent = torch.randn(shape[0], O, *shape[2:])
    actual = everything("auto", x, weight, torch.randn(O), cotangent)
    chosen = ["convolution_forward", "convolution_forward", "convolution_weight"]
    assert names(convolution_calls) == (chosen if name in AUTOMATIC else [])
    assert actual["result"].dtype == dtype


def test_few_channels_are_convolved_unless_x_needs_a_gradient(convolution_calls):
    """As those of the first layer; the gradient of x PyTorch computes without padding it."""
    x, contiguous = torch.randn(1, 1, 16, 16, 8), torch.randn(16, 1, 3, 3, 3)
    convolution(x, contiguous)
    assert names(convolution_calls) == []  # one channel comes in the format of the weight
    weight = contiguous.to(memory_format=torch.channels_last_3d).requires_grad_()
    y, expected = convolution(x, weight), reference.convolution(x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    actual_gradient, gradient = (torch.autograd.grad(value.sum(), weight)[0] for value in (y, expected))
    torch.testing.assert_close(actual_gradient, gradient, rtol=1e-4, atol=1e-3)
    assert names(convolution_calls) == ["convolution_forward", "convolution_weight"]
    convolution_calls.clear()
    convolution(x.requires_grad_(), weight)
    assert names(convolution_calls) == []
    with torch.no_grad():
        convolution(x, weight)
    assert names(convolution_calls) == ["convolution_forward"]


@pytest.mark.parametrize("sides", [(8, 12, 8), (24, 32)])
def test_fewer_voxels_are_enough_without_gradients(convolution_calls, sides):
    """The weight's gradient takes longest there."""
    axes = len(sides)
    x, weight = torch.randn(1, 16, *sides), torch.randn(32, 16, *[3] * axes, requires_grad=True)
    x, smaller = (in_layout(image, "channels_last") for image in (x, x[..., 1:]))
    convolution(x, weight)
    with torch.no_grad():
        convolution(smaller, weight)
        assert names(convolution_calls) == []
        expected = reference.convolution(x, weight)
        torch.testing.assert_close(convolution(x, weight), expected, rtol=1e-4, atol=1e-4)
    assert names(convolution_calls) == ["convolution_forward"]


def test_autocast_is_pytorchs(convolution_calls):
    shape, O, layout, _ = AUTOMATIC["2048 voxels of a volume"]
    x, weight, bias = in_layout(torch.randn(shape), layout), torch.randn(O, 32, 3, 3, 3), torch.randn(O)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = convolution(x, weight, bias)
        expected = reference.convolution(x, weight, bias)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected) and names(convolution_calls) == []


@pytest.mark.parametrize(
    ("needed", "expected"),
    [((0,), ["forward"]), ((1,), ["weight"]), ((2,), []), ((0, 1, 2), ["forward", "weight"])],
    ids=["x", "weight", "bias", "all"],
)
def test_only_needed_gradients_are_computed(convolution_calls, needed, expected):
    *given, cotangent = make_inputs("2d")
    with use_backend("cpu"):
        y = convolution(*(value.requires_grad_(place in needed) for place, value in enumerate(given)))
    convolution_calls.clear()
    y.backward(cotangent)
    assert names(convolution_calls) == [f"convolution_{name}" for name in expected]
    assert [place for place, value in enumerate(given) if value.grad is not None] == list(needed)


def test_wrong_arguments(backend):
    x, weight, bias, _ = make_inputs("2d")
    with pytest.raises(ValueError, match=r"x has shape \[3, 32, 17\], accepted are 2 or 3 axes of voxels"):
        convolution(x[..., 0], weight[..., 0], bias)
    with pytest.raises(
        ValueError, match=r"weight has shape \[16, 31, 3, 3\], accepted is \[O, 32, k, k\] with O, k"
    ):
        convolution(x, weight[:, :31], bias)
    with pytest.raises(
        ValueError, match=r"weight has shape \[16, 32, 3, 1\], accepted are kernels of side 3"
    ):
        convolution(x, weight[..., :1], bias)
    with pytest.raises(ValueError, match=r"bias has shape \[15\], accepted is \[16\]"):
        convolution(x, weight, bias[:15])
    with pytest.raises(ValueError, match="bias has dtype float64, accepted are float32"):
        convolution(x, weight, bias.double())
    with pytest.raises(ValueError, match="weight has dtype int64, accepted are float32"):
        convolution(x, weight.long(), bias)
    with pytest.raises(ValueError, match="x has dtype int64"):
        convolution(x.long(), weight, bias)
    with pytest.raises(ValueError, match="weight is on meta, accepted is cpu"):
        convolution(x, weight.to("meta"), bias)
    with pytest.raises(ValueError, match=r"negative_slope is 1.5, accepted are 0\.\.1"):
        convolution(x, weight, bias, 1.5)


def test_what_the_kernel_cannot_run(kernel):
    x, weight, bias, _ = make_inputs("2d")
    with pytest.raises(
        ValueError, match="cannot run convolution: it takes torch.float32, torch.bfloat16, torch.float16, the input is torch.float64"
    ):
        convolution(x.double(), weight, bias)
    with pytest.raises(
        ValueError, match="cannot run convolution: it takes at most 4096 channels, the input has 4097"
    ):
        convolution(x[:1, :1, :1, :1], torch.randn(4097, 1, 3, 3))
