import math

import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_accurate, in_layout, same_strides
from test_determinism import launched

from semiseg_kernels import prompt_mix, reference

OPERATION = "prompt_mix"  # that not every backend has

# B, *S, C, E
CASES = {
    "3d": (2, (5, 7, 9), 2, 16),
    "2d": (3, (17, 19), 4, 33),
    "empty": (2, (0, 4, 4), 3, 16),
    "no batch": (0, (4, 4), 3, 16),
    "one voxel": (1, (1, 1, 1), 4, 17),
    "one class": (2, (63,), 1, 16),
    "one channel": (2, (63,), 3, 1),
    "eight classes": (2, (131,), 8, 20),
    "63 voxels": (1, (7, 9), 17, 5),
    "many chunks": (1, (65537,), 2, 7),
    "bottleneck": (2, (7, 7, 5), 2, 256),
    "many classes": (1, (67,), 104, 96),
    "512 classes": (1, (33,), 512, 40),
    "widest": (1, (35,), 14, 1024),
}


def make_inputs(case, dtype=torch.float32, layout="contiguous"):
    batch, spatial, num_classes, width = CASES[case]
    logits = in_layout(3 * torch.randn(batch, num_classes, *spatial), layout).to(dtype)
    return logits, torch.randn(num_classes, width)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    logits, text = make_inputs(case, dtype, layout)
    scale = float(logits.abs().max()) if logits.numel() else 1
    assert_accurate(kernel, lambda x: {"prompt": prompt_mix(x, text)}, logits, scale, unit=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_accuracy_of_the_gradient_to_the_text(kernel, case, layout):
    logits, text = make_inputs(case, layout=layout)
    scale = float(logits.abs().max()) if logits.numel() else 1
    assert_accurate(kernel, lambda x: {"prompt": prompt_mix(logits.to(x.dtype), x)}, text, scale, unit=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_to_the_text_of_a_class_with_little_share(kernel, dtype, layout):
    """Some millionths of every voxel, which no sum of numbers of 16 bits has the digits for."""
    logits = in_layout(torch.zeros(2, 12, 400), layout).to(dtype)
    logits[:, 1] = -14
    text = torch.randn(12, 40, requires_grad=True)
    prompt = prompt_mix(logits, text)
    upstream = in_layout(torch.rand(prompt.shape), layout).to(dtype)
    (actual,) = torch.autograd.grad(prompt, text, upstream)
    share = logits.double().softmax(1)
    expected = torch.einsum("bcv,bev->ce", share, upstream.double())
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-5, atol=0)


def test_large_logits(kernel):
    logits, text = 300 * torch.randn(2, 5, 77), torch.randn(5, 16)
    scale = float(logits.abs().max())
    assert_accurate(kernel, lambda x: {"prompt": prompt_mix(x, text)}, logits, scale, unit=False)


@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_every_layout(kernel, layout, upstream):
    logits, text = (x.requires_grad_() for x in make_inputs("2d", layout=layout))
    cotangent = in_layout(torch.randn(3, 33, 17, 19), upstream)
    actual = torch.autograd.grad(prompt_mix(logits, text), (logits, text), cotangent)
    expected = torch.autograd.grad(reference.prompt_mix(logits, text), (logits, text), cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)  # text's: sums of a thousand products
    assert same_strides(actual[0], logits)


def test_sliced_logits(kernel):
    """Neither contiguous nor channels-last: the channels of another tensor, and every second voxel."""
    logits, text = make_inputs("2d")
    for view in (logits[:, 1:3], logits[:, 1:3, :, ::2]):
        torch.testing.assert_close(prompt_mix(view, text[:2]), prompt_mix(view.contiguous(), text[:2]))


def test_worked_by_hand(backend):
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]).T.unsqueeze(
        0
    )  # shares (1/4, 3/4) and (1/2, 1/2)
    text = torch.tensor([[4.0, 0.0, -8.0], [8.0, 4.0, 0.0]])
    expected = torch.tensor([[[7.0, 6.0], [3.0, 2.0], [-2.0, -4.0]]])
    torch.testing.assert_close(prompt_mix(logits, text), expected)


def test_gradient_worked_by_hand(backend):
    """With shares (1/4, 3/4) and text (4, 8): d prompt / d logits = 3/16 (4 - 8, 8 - 4)."""
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1).expand(1, 2, 5).clone().requires_grad_()
    text = torch.tensor([[4.0], [8.0]], requires_grad=True)
    by_logits, by_text = torch.autograd.grad(prompt_mix(logits, text).sum(), (logits, text))
    torch.testing.assert_close(by_logits, torch.tensor([-0.75, 0.75]).view(1, 2, 1).expand(1, 2, 5))
    torch.testing.assert_close(by_text, torch.tensor([[5 / 4], [15 / 4]]))


def test_a_single_class_is_its_text(backend):
    text = torch.randn(1, 20)
    assert torch.equal(prompt_mix(torch.randn(2, 1, 9), text), text.T.expand(2, 20, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_dtypes(backend, dtype):
    logits, text = torch.randn(2, 3, 70), torch.randn(3, 16).to(dtype).requires_grad_()
    prompt = prompt_mix(logits, text)
    torch.testing.assert_close(prompt, prompt_mix(logits, text.float()), rtol=0, atol=0)
    gradient = torch.autograd.grad(prompt.sum(), text)[0]
    assert gradient.dtype == dtype
    expected = logits.softmax(1).sum((0, 2)).to(dtype).unsqueeze(1).expand(3, 16)
    torch.testing.assert_close(gradient, expected)


def test_under_autocast(backend):
    logits, text = torch.randn(2, 3, 70), torch.randn(3, 16)
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(prompt_mix(logits, text), reference.prompt_mix(logits, text))


def test_nan_stays_in_its_voxel(backend):
    logits = torch.randn(2, 3, 40)
    logits[0, 0, 5], logits[1, 2, 7] = torch.nan, torch.inf
    nan = prompt_mix(logits, torch.randn(3, 16)).isnan()
    assert nan[0, :, 5].all() and nan[1, :, 7].all() and nan.sum() == 32


def test_nan_in_the_gradient(backend):
    logits, text = torch.randn(2, 3, 40, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    cotangent = torch.ones(2, 16, 40)
    cotangent[1, 4, 7] = torch.nan
    by_logits, by_text = torch.autograd.grad(prompt_mix(logits, text), (logits, text), cotangent)
    assert by_logits[1, :, 7].isnan().all() and by_logits.isnan().sum() == 3
    assert by_text[:, 4].isnan().all() and by_text.isnan().sum() == 3


def test_nothing_is_saved_but_the_inputs(kernel):
    logits, text = torch.randn(2, 3, 40, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        prompt_mix(logits, text)
    assert set(saved) == {logits.data_ptr(), text.data_ptr()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_never_copied(kernel, layout, monkeypatch):
    """Neither pass allocates anything of the logits' size but its results: no softmax, no second prompt."""
    logits = in_layout(torch.randn(2, 16, 5000), layout).requires_grad_()
    text = torch.randn(16, 12, requires_grad=True)
    sizes = {}
    for direction in ("forward", "backward"):
        launched(kernel, "prompt_mix", direction, monkeypatch, sizes)
    torch.autograd.grad(prompt_mix(logits, text).square().sum(), (logits, text))
    large = {direction: [n for n in found if n >= logits.nbytes // 2] for direction, found in sizes.items()}
    assert large == {"forward": [logits.nbytes * 12 // 16], "backward": [logits.nbytes]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_from_any_number_of_threads(kernel, layout, threads):
    logits = in_layout(torch.randn(2, 3, 65537), layout).requires_grad_()
    text = torch.randn(3, 16, requires_grad=True)
    runs = []
    for number in (1, 2, 3, 2):
        threads(number)
        prompt = prompt_mix(logits, text)
        runs.append((prompt, *torch.autograd.grad(prompt.square().sum(), (logits, text))))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


def test_reference_gradient():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    text = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.prompt_mix, (logits, text))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel, dtype, layout):
    logits, text = make_inputs("2d", dtype, layout)
    raw = torch.ops.semiseg_kernels
    torch.library.opcheck(raw.prompt_mix_forward, (logits, text, kernel))
    prompt = raw.prompt_mix_forward(logits, text, kernel)
    torch.library.opcheck(raw.prompt_mix_backward, (prompt, logits, text, kernel))


def test_one_graph_for_every_number_of_voxels(backend):
    torch._dynamo.reset()
    compiled = torch.compile(prompt_mix, fullgraph=True, dynamic=True, backend="aot_eager")
    text = torch.randn(3, 16, requires_grad=True)
    for spatial in ((5, 6, 7), (3, 9, 4), (11, 2, 13)):
        logits = in_layout(torch.randn(2, 3, *spatial), "channels_last").requires_grad_()
        results = []
        for run in (compiled, prompt_mix):
            with torch._dynamo.config.patch(error_on_recompile=True):
                prompt = run(logits, text)
            results.append((prompt, torch.autograd.grad(prompt.square().sum(), (logits, text))))
        torch.testing.assert_close(results[0], results[1])


LOGITS, TEXT = torch.randn(2, 3, 5, 7), torch.randn(3, 6)
WRONG = {
    "logits has dtype int64, accepted are float32, bfloat16, float16, float64": (LOGITS.long(), TEXT),
    "logits has shape [2, 3], accepted is [B, channels, *S], *S 1 to 3 axes": (LOGITS[..., 0, 0], TEXT),
    "logits has shape [2, 0, 5, 7], accepted is at least one channel": (LOGITS[:, :0], TEXT[:0]),
    "text has shape [2, 6], accepted is [3, E] with E >= 1": (LOGITS, TEXT[:2]),
    "text has shape [3], accepted is [3, E] with E >= 1": (LOGITS, TEXT[:, 0]),
    "text has shape [3, 0], accepted is [3, E] with E >= 1": (LOGITS, TEXT[:, :0]),
    "text has dtype float64, accepted are float32, bfloat16, float16": (LOGITS, TEXT.double()),
    "text is on meta, accepted is cpu": (LOGITS, TEXT.to("meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError) as error:
        prompt_mix(*WRONG[message])
    assert str(error.value) == message
