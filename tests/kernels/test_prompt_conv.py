import warnings

import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_close_enough, in_layout, same_strides
from torch.nn.functional import conv3d
from torch.utils._python_dispatch import TorchDispatchMode

from semiseg_kernels import prompt_conv, prompt_mix, use_backend

# B, *S, F, C, E, O, *k, padding
CASES = {
    "3d": (2, (5, 7, 9), 16, 2, 16, 8, (3, 3, 3), 1),
    "3d 1x1": (2, (5, 7, 9), 16, 2, 16, 8, (1, 1, 1), 0),
    "2d": (3, (17, 19), 8, 4, 12, 6, (3, 3), 1),
    "2d 1x1": (3, (17, 19), 8, 4, 12, 6, (1, 1), 0),
    "1d": (2, (63,), 5, 3, 7, 4, (5,), 2),
    "no padding": (2, (5, 7, 9), 5, 3, 7, 4, (3, 3, 3), 0),
    "more padding than the kernel reaches": (2, (5, 7), 5, 3, 7, 4, (3, 3), 4),
    "padding of each axis": (2, (5, 7, 4), 5, 3, 7, 4, (3, 1, 5), (1, 0, 2)),
    "list": (2, (5, 7), 5, 3, 7, 4, (3, 3), [2, 1]),
    "same": (2, (5, 7, 4), 5, 3, 7, 4, (3, 1, 5), "same"),
    "same, even kernel": (2, (5, 7), 5, 3, 7, 4, (2, 4), "same"),
    "valid": (2, (5, 7), 5, 3, 7, 4, (3, 3), "valid"),
    "one voxel": (1, (1, 1, 1), 5, 3, 7, 4, (3, 3, 3), 1),
    "one of everything": (1, (3, 3), 1, 1, 1, 1, (3, 3), 1),
    "no batch": (0, (5, 7), 5, 3, 7, 4, (3, 3), 1),
    "many classes": (2, (5, 3, 4), 32, 14, 32, 16, (3, 3, 3), 1),
    "more classes than channels": (2, (5, 7), 3, 9, 2, 4, (3, 3), 1),
}
NAMES = ("features", "logits", "text", "weight", "bias")


@pytest.fixture(params=["auto", "reference"])
def form(request):
    """The folded form, then the concatenated one."""
    with use_backend(request.param):
        yield


@pytest.fixture(autouse=True)
def without_remarks_on_even_kernels():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        yield


def make_arguments(case, dtype=torch.float32, layout="contiguous"):
    batch, spatial, num_features, num_classes, width, outputs, kernel, padding = CASES[case]
    fan_in = (num_features + width) * torch.Size(kernel).numel()
    arguments = (
        in_layout(torch.randn(batch, num_features, *spatial), layout),
        in_layout(3 * torch.randn(batch, num_classes, *spatial), layout),
        torch.randn(num_classes, width),
        torch.randn(outputs, num_features + width, *kernel) / fan_in**0.5,
        torch.randn(outputs),
    )
    return [x.to(dtype) for x in arguments], padding


def evaluate(backend, arguments, padding, compute_dtype=None):
    """The result and the gradients of all arguments; backend "auto" is the folded form, "reference" the other."""
    arguments = [x.detach().requires_grad_() for x in arguments]
    autocast = torch.autocast("cpu", dtype=compute_dtype, enabled=compute_dtype is not None)
    with use_backend(backend), autocast:
        result = prompt_conv(*arguments, padding=padding)
    generator = torch.Generator().manual_seed(0)
    cotangent = (2 * torch.rand(result.shape, generator=generator) - 1).half().to(result.dtype)
    gradients = torch.autograd.grad(result, arguments, cotangent)
    return {"result": result.detach(), **dict(zip(NAMES, gradients, strict=True))}


def assert_accurate(arguments, padding, compute_dtype=None):
    folded, plain = (evaluate(name, arguments, padding, compute_dtype) for name in ("auto", "reference"))
    exact = evaluate("reference", [x.double() for x in arguments], padding)
    for name in folded:
        assert folded[name].dtype == plain[name].dtype and folded[name].shape == plain[name].shape, name
        resolution = torch.finfo(folded["result"].dtype).eps
        compared = (results[name].double() for results in (folded, plain, exact))
        assert_close_enough(name, *compared, resolution=resolution)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_convolution_of_the_concatenation(case):
    """To the tolerance of float64, borders and all gradients included."""
    arguments, padding = make_arguments(case, torch.float64)
    torch.testing.assert_close(
        evaluate("auto", arguments, padding), evaluate("reference", arguments, padding)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, dtype, layout):
    assert_accurate(*make_arguments(case, dtype, layout))


@pytest.mark.parametrize("case", ["3d", "2d 1x1"])
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16])
def test_accuracy_under_autocast(case, compute_dtype):
    arguments, padding = make_arguments(case)
    assert evaluate("auto", arguments, padding, compute_dtype)["result"].dtype == compute_dtype
    assert_accurate(arguments, padding, compute_dtype)


def test_folding_under_autocast_is_in_float32():
    """A prompt that cancels only if neither the text nor the weights were rounded before they met."""
    features, logits = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    text, weight = torch.tensor([[1 + 2.0**-12, 1.0]]), torch.tensor([[[0.0], [1.0], [-1.0]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prompt_conv(features, logits, text, weight).eq(2.0**-12).all()


def test_worked_by_hand(form):
    """Two classes with shares (1/4, 3/4) and embeddings (4, 8): the prompt is 7; features are 10."""
    features = torch.full((1, 1, 3), 10.0)
    logits = torch.tensor([0.0, torch.tensor(3.0).log()]).view(1, 2, 1).expand(1, 2, 3)
    text, weight = torch.tensor([[4.0], [8.0]]), torch.tensor([[[1.0, 0.0, 2.0], [1.0, 3.0, 5.0]]])
    # The kernel's first tap finds padding at the left border, its last at the right one.
    expected = torch.tensor([[[20 + 56, 30 + 63, 10 + 28]]]) + 0.5
    actual = prompt_conv(features, logits, text, weight, torch.tensor([0.5]), padding=1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", ["3d", "2d", "1d"])
def test_without_bias(case):
    (*arguments, bias), padding = make_arguments(case)
    expected = prompt_conv(*arguments, torch.zeros_like(bias), padding=padding)
    torch.testing.assert_close(prompt_conv(*arguments, padding=padding), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_may_be_mixed(form, dtype):
    """The result has the features' dtype, and every gradient that of its argument."""
    (features, *others), padding = make_arguments("2d")
    arguments = [x.requires_grad_() for x in (features.to(dtype), others[0].half(), *others[1:])]
    result = prompt_conv(*arguments, padding=padding)
    assert result.dtype == dtype
    gradients = torch.autograd.grad(result.sum(), arguments)
    assert [x.dtype for x in gradients] == [x.dtype for x in arguments]


@pytest.mark.parametrize("case", ["3d 1x1", "padding of each axis", "same, even kernel", "1d"])
def test_gradcheck(case):
    arguments, padding = make_arguments(case, torch.float64)
    arguments = [x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(lambda *x: prompt_conv(*x, padding=padding), arguments, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_is_that_of_a_plain_convolution(layout):
    (features, logits, text, weight, bias), padding = make_arguments("3d", layout=layout)
    expected = conv3d(features, weight[:, : features.shape[1]], bias, padding=padding)
    assert same_strides(prompt_conv(features, logits, text, weight, bias, padding=padding), expected)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returns inside, views excepted."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view:
            tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.numbers = max([self.numbers, *(x.numel() for x in tensors)])
        return result


def test_no_prompt_is_built():
    """Forward and backward of the folded form hold nothing as large as the prompt; the other form does."""
    features, logits = torch.randn(2, 4, 9, 9, 9), torch.randn(2, 2, 9, 9, 9)
    text, weight = torch.randn(2, 256), torch.randn(3, 260, 1, 1, 1)
    arguments = [x.requires_grad_() for x in (features, logits, text, weight)]
    prompt = 2 * 256 * 9**3
    largest = {}
    for backend in ("auto", "reference"):
        with use_backend(backend), LargestTensor() as seen:
            torch.autograd.grad(prompt_conv(*arguments).sum(), arguments)
        largest[backend] = seen.numbers
    assert largest["auto"] < prompt // 32 and largest["reference"] >= prompt


def test_nan_stays_within_reach_of_the_kernel(form):
    (features, logits, *others), padding = make_arguments("3d")
    logits[1, 0, 2, 3, 4] = torch.nan
    nan = prompt_conv(features, logits, *others, padding=padding).isnan()
    assert not nan[0].any() and nan[1, :, 1:4, 2:5, 3:6].all() and nan.sum() == nan.shape[1] * 27


def test_is_the_convolution_of_prompt_mix():
    (features, logits, text, weight, bias), padding = make_arguments("3d")
    joined = torch.cat([features, prompt_mix(logits, text)], dim=1)
    expected = conv3d(joined, weight, bias, padding=padding)
    torch.testing.assert_close(prompt_conv(features, logits, text, weight, bias, padding=padding), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_for_every_number_of_voxels(layout):
    torch._dynamo.reset()
    compiled = torch.compile(prompt_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    (_, _, *others), padding = make_arguments("3d")
    for spatial in ((5, 6, 7), (3, 9, 4), (11, 2, 13)):
        maps = [in_layout(torch.randn(2, channels, *spatial), layout) for channels in (16, 2)]
        arguments = [x.requires_grad_() for x in (*maps, *others)]
        results = []
        for run in (compiled, prompt_conv):
            with torch._dynamo.config.patch(error_on_recompile=True):
                result = run(*arguments, padding=padding)
            results.append((result, torch.autograd.grad(result.square().sum(), arguments)))
        torch.testing.assert_close(results[0], results[1])


FEATURES, LOGITS, TEXT = torch.randn(2, 4, 5, 7), torch.randn(2, 3, 5, 7), torch.randn(3, 6)
WEIGHT, BIAS = torch.randn(8, 10, 3, 3), torch.randn(8)
ACCEPTED_PADDING = "accepted are a number >= 0, 2 of them, 'same' and 'valid'"
WRONG = {
    "features has dtype int64, accepted are float32, bfloat16, float16, float64": {
        "features": FEATURES.long()},
    "logits has dtype float64, accepted are float32, bfloat16, float16": {"logits": LOGITS.double()},
    "logits has shape [2, 3, 5, 6], accepted is [2, C, 5, 7] with C >= 1": {"logits": LOGITS[..., :6]},
    "logits has shape [1, 3, 5, 7], accepted is [2, C, 5, 7] with C >= 1": {"logits": LOGITS[:1]},
    "logits is on meta, accepted is cpu": {"logits": LOGITS.to("meta")},
    "text has shape [2, 6], accepted is [3, E] with E >= 1": {"text": TEXT[:2]},
    "text has shape [3], accepted is [3, E] with E >= 1": {"text": TEXT[:, 0]},
    "text has shape [3, 0], accepted is [3, E] with E >= 1": {"text": TEXT[:, :0]},
    "text has dtype float64, accepted are float32, bfloat16, float16": {"text": TEXT.double()},
    "weight has shape [8, 9, 3, 3], accepted is [O, 10, k, k] with O, k >= 1": {"weight": WEIGHT[:, :9]},
    "weight has shape [8, 10, 3], accepted is [O, 10, k, k] with O, k >= 1": {"weight": WEIGHT[..., 0]},
    "weight has dtype float64, accepted are float32, bfloat16, float16": {"weight": WEIGHT.double()},
    "weight is on meta, accepted is cpu": {"weight": WEIGHT.to("meta")},
    "bias has shape [7], accepted is [8]": {"bias": BIAS[:7]},
    "bias has dtype int64, accepted are float32, bfloat16, float16": {"bias": BIAS.long()},
    f"padding is -1, {ACCEPTED_PADDING}": {"padding": -1},
    f"padding is None, {ACCEPTED_PADDING}": {"padding": None},
    f"padding is 1.5, {ACCEPTED_PADDING}": {"padding": 1.5},
    f"padding is True, {ACCEPTED_PADDING}": {"padding": True},
    f"padding is (1, 1, 1), {ACCEPTED_PADDING}": {"padding": (1, 1, 1)},
    f"padding is (1, -1), {ACCEPTED_PADDING}": {"padding": (1, -1)},
    f"padding is 'reflect', {ACCEPTED_PADDING}": {"padding": "reflect"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"features": FEATURES, "logits": LOGITS, "text": TEXT, "weight": WEIGHT, "bias": BIAS}
    with pytest.raises(ValueError) as error:
        prompt_conv(**{**arguments, **WRONG[message]})
    assert str(error.value) == message
