import pytest
import torch
from comparison import DTYPES, LAYOUTS, assert_accurate, in_layout
from test_determinism import launched

from semiseg_kernels import masked_class_mean, reference
from semiseg_kernels.checks import WEIGHT_DTYPES

# B, *S, d, C
CASES = {
    "3d": (2, (5, 7, 9), 16, 2),
    "2d": (3, (17, 19), 33, 4),
    "empty": (2, (0, 4, 4), 16, 3),
    "no batch": (0, (4, 4), 16, 3),
    "one voxel": (1, (1, 1, 1), 17, 4),
    "one class": (2, (63,), 16, 1),
    "one channel": (2, (63,), 1, 3),
    "63 voxels": (1, (7, 9), 5, 17),
    "many chunks": (1, (65537,), 7, 2),
    "bottleneck": (2, (7, 7, 5), 512, 2),
    "many classes": (1, (67,), 96, 104),
    "512 classes": (1, (33,), 40, 512),
    "widest": (1, (35,), 1024, 14),
}


def make_inputs(case, dtype=torch.float32, layout="contiguous", weight_layout="contiguous"):
    batch, spatial, d, num_classes = CASES[case]
    z = in_layout(torch.randn(batch, d, *spatial), layout).to(dtype)
    weight = torch.rand(batch, num_classes, *spatial)
    return z, in_layout(weight * torch.randint(0, 2, weight.shape), weight_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    z, weight = make_inputs(case, dtype, layout)
    assert_accurate(kernel, lambda x: {"mean": masked_class_mean(x, weight)}, z, unit=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_weight_dtypes(backend, dtype, weight_layout, layout):
    z, weight = make_inputs("2d", layout=layout, weight_layout=weight_layout)
    z.requires_grad_()
    given = (weight > 0).to(dtype) if dtype in (torch.bool, torch.uint8) else weight.to(dtype)
    means = [masked_class_mean(z, w) for w in (given, given.float())]
    torch.testing.assert_close(means[0], means[1])
    gradients = [torch.autograd.grad(mean.square().sum(), z)[0] for mean in means]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("of", ["channels", "voxels", "one voxel"])
def test_strided_inputs(kernel, of):
    """Neither contiguous nor channels-last: parts of other tensors, and one voxel in the place of all."""
    z, weight = make_inputs("2d")
    select = {
        "channels": lambda x: x[:, 1:4],
        "voxels": lambda x: x[:, 1:4, :, ::2],
        "one voxel": lambda x: x[:, :, :1, :1].expand(x.shape),
    }[of]
    results = []
    for lay_out in (lambda x: x, torch.Tensor.contiguous):
        x, w = lay_out(select(z)).detach().requires_grad_(), lay_out(select(weight + 0.1))
        mean = masked_class_mean(x, w)
        results.append((mean, torch.autograd.grad(mean.square().sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_worked_by_hand(backend):
    z = torch.tensor([[[1.0, 2.0, 6.0], [0.0, -4.0, 8.0]]], requires_grad=True)
    weight = torch.tensor([[[1.0, 0.0, 0.25], [0.0, 1.0, 1.0]]])
    mean = masked_class_mean(z, weight)
    torch.testing.assert_close(mean, torch.tensor([[2.5 / 1.25, 2 / 1.25], [4.0, 2.0]]))
    gradient = torch.autograd.grad(mean, z, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0]
    torch.testing.assert_close(gradient, torch.tensor([[[0.8, 0.0, 0.2], [0.0, 0.5, 0.5]]]))


def test_mean_is_over_the_whole_batch(backend):
    """Images with different numbers of voxels count by voxels, not by images."""
    z, weight = torch.tensor([[[1.0, 2.0, 3.0]], [[10.0, 0.0, 0.0]]]), torch.ones(2, 1, 3, dtype=torch.bool)
    weight[1, 0, 1:] = False
    assert masked_class_mean(z, weight).item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_class_without_weight_is_zero_and_sends_no_gradient(backend, dtype):
    z, weight = torch.randn(2, 16, 40, requires_grad=True), torch.rand(2, 3, 40)
    weight[:, 1] = 0
    mean = masked_class_mean(z, weight.to(dtype))
    assert mean[1].eq(0).all() and mean[[0, 2]].ne(0).all()
    gradient = torch.autograd.grad(mean[1].sum(), z, retain_graph=True)[0]
    assert gradient.eq(0).all()
    others, both = (torch.autograd.grad(m.sum(), z, retain_graph=True)[0] for m in (mean[[0, 2]], mean))
    assert torch.equal(others, both) and others.ne(0).all()


def test_no_weight_at_all(backend):
    z = torch.randn(2, 16, 40, requires_grad=True)
    mean = masked_class_mean(z, torch.zeros(2, 3, 40, dtype=torch.uint8))
    assert mean.eq(0).all() and torch.autograd.grad(mean.sum(), z)[0].eq(0).all()
    z = torch.full((2, 16, 40), torch.nan)
    assert masked_class_mean(z, torch.zeros(2, 3, 40)).eq(0).all()


def test_nan(backend):
    z, weight = torch.randn(2, 16, 63), torch.rand(2, 3, 63)
    weight[:, 1] = 0
    z[1, 4, 5] = torch.nan
    nan = masked_class_mean(z, weight).isnan()
    assert nan[[0, 2], 4].all() and nan.sum() == 2
    weight[1, 2, 5] = torch.nan
    assert masked_class_mean(z, weight)[2].isnan().all()


def test_four_million_voxels(kernel):
    n = 4_194_304 + 5
    z = torch.stack([torch.full((n,), 1.1), torch.rand(n)]).unsqueeze(0)
    mean = masked_class_mean(z, torch.ones(1, 1, n, dtype=torch.bool))
    expected = z.double().mean((0, 2)).float().unsqueeze(0)
    torch.testing.assert_close(mean, expected, rtol=torch.finfo(torch.float32).eps, atol=0)


def test_nothing_is_saved_but_the_inputs_and_a_sum_for_every_class(kernel):
    z, weight = torch.randn(2, 16, 40, requires_grad=True), torch.rand(2, 3, 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        masked_class_mean(z, weight)
    others = [x for x in saved if x.data_ptr() not in (z.data_ptr(), weight.data_ptr())]
    assert len(saved) == 3 and [tuple(x.shape) for x in others] == [(3,)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_inputs_are_never_copied(kernel, dtype, layout, monkeypatch):
    """Neither pass allocates anything of the size of the weights, or of z, but the gradient."""
    # On a GPU the sums of all blocks are small only beside many voxels; an emulated one has fewer blocks.
    num_voxels = 50_000 if torch.cuda.is_available() else 5000
    z = in_layout(torch.randn(2, 16, num_voxels), layout).requires_grad_()
    weight = in_layout(torch.rand(2, 4, num_voxels), layout).to(dtype)
    sizes = {}
    for direction in ("forward", "backward"):
        launched(kernel, "masked_class_mean", direction, monkeypatch, sizes)
    torch.autograd.grad(masked_class_mean(z, weight).square().sum(), z)
    large = {direction: [n for n in found if n >= weight.nbytes] for direction, found in sizes.items()}
    assert large == {"forward": [], "backward": [z.nbytes]}


def test_reference_gradient():
    z, weight = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, 4)
    weight[:, 1] = 0
    assert torch.autograd.gradcheck(lambda x: reference.masked_class_mean(x, weight), z)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel, dtype, layout):
    z, weight = make_inputs("63 voxels", dtype, layout, layout)
    raw = torch.ops.semiseg_kernels
    for given in (weight, weight > 0):
        torch.library.opcheck(raw.masked_class_mean_forward, (z, given, kernel))
        mean, total = raw.masked_class_mean_forward(z, given, kernel)
        torch.library.opcheck(raw.masked_class_mean_backward, (mean, total, z, given, kernel))


Z, WEIGHT = torch.randn(2, 16, 5, 7), torch.rand(2, 3, 5, 7)
WRONG = {
    "z has dtype int64, accepted are float32, bfloat16, float16, float64": (Z.long(), WEIGHT),
    "z has shape [2, 16], accepted is [B, channels, *S], *S 1 to 3 axes": (Z[..., 0, 0], WEIGHT),
    "weight has dtype int64, accepted are bool, uint8, float32, bfloat16, float16": (Z, WEIGHT.long()),
    "weight has dtype float64, accepted are bool, uint8, float32, bfloat16, float16": (Z, WEIGHT.double()),
    "weight has shape [2, 5, 7], accepted is [2, C, 5, 7] with C >= 1": (Z, WEIGHT[:, 0]),
    "weight has shape [2, 0, 5, 7], accepted is [2, C, 5, 7] with C >= 1": (Z, WEIGHT[:, :0]),
    "weight has shape [2, 3, 7, 5], accepted is [2, C, 5, 7] with C >= 1": (Z, WEIGHT.mT),
    "weight has shape [1, 3, 5, 7], accepted is [2, C, 5, 7] with C >= 1": (Z, WEIGHT[:1]),
    "weight is on meta, accepted is cpu": (Z, WEIGHT.to("meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError) as error:
        masked_class_mean(*WRONG[message])
    assert str(error.value) == message
