import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_accurate, in_layout, same_strides
from test_determinism import launched

from semiseg_kernels import linear_upsampling, reference, use_backend

OPERATION = "linear_upsampling"  # that not every backend has

# B, *S, C: odd sides, sides of one voxel, and channels that vectors divide or do not
CASES = {
    "3d": (2, (3, 5, 4), 16),
    "2d": (2, (7, 9), 32),
    "no batch": (0, (4, 4), 16),
    "one voxel": (2, (1, 1, 1), 8),
    "one slice": (1, (1, 6, 5), 4),
    "one row": (2, (1, 9), 12),
    "one channel": (2, (6, 7, 3), 1),
    "odd channels": (2, (3, 5, 4), 5),
    "many channels": (1, (3, 4), 1021),
}


def make_input(case, dtype=torch.float32, layout="contiguous"):
    batch, spatial, C = CASES[case]
    return in_layout(torch.randn(batch, C, *spatial), layout).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    x = make_input(case, dtype, layout)
    assert_accurate(kernel, lambda x: {"y": linear_upsampling(x)}, x, unit=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_has_the_memory_format_of_the_input(kernel, layout):
    for case in ("3d", "2d"):
        x = make_input(case, layout=layout)
        y = linear_upsampling(x)
        assert y.shape[2:] == tuple(2 * side for side in x.shape[2:])
        assert same_strides(y, in_layout(y.clone(), layout))


@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_every_layout(kernel, layout, upstream):
    x = make_input("2d", layout=layout).requires_grad_()
    cotangent = in_layout(torch.randn(2, 32, 14, 18), upstream)
    actual = torch.autograd.grad(linear_upsampling(x), x, cotangent)
    expected = torch.autograd.grad(
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), x, cotangent
    )
    torch.testing.assert_close(actual, expected)


def test_sliced_input(kernel):
    """Neither contiguous nor channels-last: the channels of another tensor, and every second voxel."""
    x = make_input("2d")
    for view in (x[:, 3:7], x[:, 3:7, :, ::2]):
        torch.testing.assert_close(linear_upsampling(view), linear_upsampling(view.contiguous()))


def test_worked_by_hand(backend):
    x = torch.tensor([[[[0.0, 4.0], [8.0, 16.0]]]], requires_grad=True)
    y = linear_upsampling(x)
    rows = [[0.0, 1.0, 3.0, 4.0], [2.0, 3.25, 5.75, 7.0], [6.0, 7.75, 11.25, 13.0], [8.0, 10.0, 14.0, 16.0]]
    torch.testing.assert_close(y.detach(), torch.tensor([[rows]]))
    cotangent = torch.zeros(1, 1, 4, 4)
    cotangent[0, 0, 0, 0], cotangent[0, 0, 1, 2] = 1.0, 16.0
    # y[1, 2] is 3/4 and 1/4 of the rows, and 1/4 and 3/4 of the columns.
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close(gradient, torch.tensor([[[[1.0 + 3.0, 9.0], [1.0, 3.0]]]]))


def test_nan_stays_near_its_voxel(backend):
    x = make_input("one slice")
    x[0, 2, 0, 3, 2] = torch.nan
    y = linear_upsampling(x)
    assert y[0, 2, :, 5:9, 3:7].isnan().all() and y.isnan().sum() == 32


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_kept_under_autocast(kernel, dtype):
    x = make_input("2d", dtype)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = linear_upsampling(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, linear_upsampling(x), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_input_is_never_copied(kernel, layout, monkeypatch):
    x, sizes = make_input("3d", layout=layout).requires_grad_(), {}
    for direction in ("forward", "backward"):
        launched(kernel, OPERATION, direction, monkeypatch, sizes)
    y = linear_upsampling(x)
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert {direction: [n for n in found if n > 1] for direction, found in sizes.items()} == {
        "forward": [y.nbytes],
        "backward": [x.nbytes],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel, dtype, layout):
    x = make_input("one slice", dtype, layout)
    operations = torch.ops.semiseg_kernels
    torch.library.opcheck(operations.linear_upsampling_forward, (x, kernel))
    gradient = in_layout(torch.randn(1, 4, 2, 12, 10), layout).to(dtype)
    for channels_last in (False, True):
        torch.library.opcheck(operations.linear_upsampling_backward, (gradient, channels_last, kernel))


def test_a_network_on_the_cpu_backend_can_upsample():
    x = make_input("3d")
    with use_backend("cpu"):
        torch.testing.assert_close(linear_upsampling(x), reference.linear_upsampling(x), rtol=0, atol=0)


def test_wrong_arguments(backend):
    for shape in ((2, 3, 5), (2, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"x has shape \[2, 3, .*accepted are 2 or 3 axes of voxels"):
            linear_upsampling(torch.zeros(shape))
    with pytest.raises(ValueError, match="x has dtype int64"):
        linear_upsampling(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
