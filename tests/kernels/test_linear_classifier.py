import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_accurate, in_layout, same_strides
from test_determinism import launched

from semiseg_kernels import linear_classifier, reference

OPERATION = "linear_classifier"  # that not every backend has

# B, *S, d, C
CASES = {
    "3d": (2, (5, 7, 9), 16, 2),
    "2d": (3, (17, 19), 16, 4),
    "empty": (2, (0, 4, 4), 16, 3),
    "no batch": (0, (4, 4), 16, 3),
    "one voxel": (1, (1, 1, 1), 17, 4),
    "one class": (2, (63,), 16, 1),
    "one channel": (2, (63,), 1, 3),
    "63 voxels": (1, (7, 9), 5, 17),
    "many images": (37, (3, 3), 8, 2),
    "many chunks": (1, (65537,), 7, 2),
    "chunks across images": (5, (13001,), 16, 2),
    "many classes": (1, (67,), 96, 104),
    "512 classes": (1, (33,), 40, 512),
    "widest": (1, (35,), 1024, 14),
}


def make_inputs(case, dtype=torch.float32, layout="contiguous"):
    batch, spatial, d, num_classes = CASES[case]
    x = in_layout(torch.randn(batch, d, *spatial), layout).to(dtype)
    scale = torch.randint(0, 2, (batch, d)) * 2.0
    return x, torch.randn(num_classes, d), torch.randn(num_classes), scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    x, weight, bias, scale = make_inputs(case, dtype, layout)
    for given in (scale, None):
        assert_accurate(
            kernel, lambda x, given=given: {"logits": linear_classifier(x, weight, bias, given)}, x, unit=False
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_accuracy_of_the_gradients_to_weight_and_bias(kernel, case, layout):
    x, weight, bias, scale = make_inputs(case, layout=layout)

    def of_both(both):
        return {"logits": linear_classifier(x.to(both.dtype), both[:, :-1], both[:, -1], scale)}

    assert_accurate(kernel, of_both, torch.cat([weight, bias.unsqueeze(1)], dim=1), unit=False)


@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_every_layout(kernel, layout, upstream):
    x, weight, bias, scale = make_inputs("2d", layout=layout)
    given = [value.requires_grad_() for value in (x, weight, bias)]
    cotangent = in_layout(torch.randn(3, 4, 17, 19), upstream)
    actual = torch.autograd.grad(linear_classifier(*given, scale), given, cotangent)
    expected = torch.autograd.grad(reference.linear_classifier(*given, scale), given, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert same_strides(actual[0], x)


def test_sliced_embedding(kernel):
    """Neither contiguous nor channels-last: the channels of another tensor, and every second voxel."""
    x, weight, bias, _ = make_inputs("2d")
    for view in (x[:, 3:7], x[:, 3:7, :, ::2]):
        actual = linear_classifier(view, weight[:, 3:7], bias)
        torch.testing.assert_close(actual, linear_classifier(view.contiguous(), weight[:, 3:7], bias))


def test_worked_by_hand(backend):
    x = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[0.0, 1.0], [2.0, 2.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 10.0], [-1.0, 2.0]], requires_grad=True)
    bias = torch.tensor([0.5, -0.5], requires_grad=True)
    scale = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    logits = linear_classifier(x, weight, bias, scale)
    expected = torch.tensor([[[2.5, 4.5], [-2.5, -4.5]], [[60.5, 61.5], [11.5, 10.5]]])
    torch.testing.assert_close(logits, expected)
    cotangent = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]])
    by_x, by_weight, by_bias = torch.autograd.grad(logits, (x, weight, bias), cotangent)
    torch.testing.assert_close(by_x, torch.tensor([[[2.0, -4.0], [0.0, 0.0]], [[-1.0, 1.0], [6.0, 30.0]]]))
    torch.testing.assert_close(by_weight, torch.tensor([[2.0 + 1, 0 + 6.0], [8.0 + 0, 0 + 6.0]]))
    torch.testing.assert_close(by_bias, torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_float32_also_under_autocast(backend, dtype):
    x, weight, bias, scale = make_inputs("2d", dtype)
    expected = linear_classifier(x, weight, bias, scale)
    assert expected.dtype == torch.float32
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        actual = linear_classifier(x, weight, bias, scale)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.2)


def test_nan_stays_in_its_voxel(backend):
    x, weight, bias, _ = make_inputs("one class")
    x[0, 3, 5], x[1, 7, 40] = torch.nan, torch.inf
    finite = linear_classifier(x, weight, bias).isfinite()
    assert not finite[0, :, 5].any() and not finite[1, :, 40].any() and (~finite).sum() == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["3d", "many chunks", "chunks across images"])
def test_same_bits_from_any_number_of_threads(kernel, case, layout, threads):
    x, weight, bias, scale = make_inputs(case, layout=layout)
    given = [value.requires_grad_() for value in (x, weight, bias)]
    runs = []
    for number in (1, 2, 3, 2):
        threads(number)
        logits = linear_classifier(*given, scale)
        runs.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), given)])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_embedding_is_never_copied(kernel, layout, monkeypatch):
    x, weight, bias, scale = make_inputs("chunks across images", layout=layout)
    sizes = {}
    launched(kernel, OPERATION, "forward", monkeypatch, sizes)
    launched(kernel, OPERATION, "backward", monkeypatch, sizes)
    logits = linear_classifier(x.requires_grad_(), weight, bias, scale)
    torch.autograd.grad(logits.square().mean(), x)
    assert max(sizes["forward"]) == logits.nbytes
    assert [size for size in sizes["backward"] if size >= x.nbytes // 2] == [x.nbytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel, dtype):
    x, weight, bias, _ = make_inputs("2d", dtype)
    matrix = torch.cat([weight, bias.unsqueeze(1)], dim=1).repeat(3, 1, 1)
    operations = torch.ops.semiseg_kernels
    torch.library.opcheck(operations.linear_classifier_forward, (x, matrix, kernel))
    gradient = torch.randn(3, 4, 17, 19)
    torch.library.opcheck(operations.linear_classifier_backward, (gradient, x, matrix, kernel))


def test_wrong_arguments(backend):
    x, weight, bias, scale = make_inputs("2d")
    with pytest.raises(ValueError, match=r"weight has shape \[4, 15\], accepted is \[C, 16\] with C >= 1"):
        linear_classifier(x, weight[:, :15], bias)
    with pytest.raises(ValueError, match=r"bias has shape \[3\], accepted is \[4\]"):
        linear_classifier(x, weight, bias[:3])
    with pytest.raises(ValueError, match=r"channel_scale has shape \[2, 16\], accepted is \[3, 16\]"):
        linear_classifier(x, weight, bias, scale[:2])
    with pytest.raises(ValueError, match="channel_scale has dtype bool, accepted are float32"):
        linear_classifier(x, weight, bias, scale.bool())
    with pytest.raises(ValueError, match="x has dtype int64"):
        linear_classifier(x.long(), weight, bias)
    with pytest.raises(ValueError, match="weight has dtype bfloat16, accepted are float32"):
        linear_classifier(x, weight.bfloat16(), bias)
