"""What only the CUDA kernels have: a workspace, two kinds of tiles, vector loads, and no check of label range."""

import pytest
import torch
from comparison import LAYOUTS, in_layout

from semiseg_kernels import (
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    linear_classifier,
    masked_class_mean,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
    reference,
)
from semiseg_kernels.native import extension as launches
from semiseg_kernels.native.extension import extension

MEGABYTE = 1 << 20


pytestmark = pytest.mark.parametrize("kernel", ["cuda"], indirect=True)


@pytest.fixture
def cuda(kernel):
    """The compiled module; its backend is forced, on a GPU or emulated."""
    return extension(kernel)


def random_maps(num_voxels, num_classes, num_regions=2):
    labels = torch.randint(-1, num_classes, (2, num_voxels), dtype=torch.int16)
    regions = torch.randint(0, num_regions, (2, num_voxels), dtype=torch.uint8)
    return labels, regions, torch.rand(2, num_voxels)


def test_driver_problem(cuda):
    assert cuda.driver_problem() is None


def test_arguments_have_names(cuda):
    with pytest.raises(TypeError, match="argument missing: cluster_sum"):
        cuda.momentum_update_forward(prototypes=0)
    given = {"prototypes": 0, "cluster_sum": 0, "cluster_count": 0, "clusters": 0, "d": 0, "momentum": 0.5}
    with pytest.raises(TypeError, match="argument unknown: threads"):
        cuda.momentum_update_forward(**given, device=0, stream=0, workspace=0, threads=1)


def recorded_workspaces(cuda, monkeypatch, run):
    """The sizes that operations ask for while `run` runs."""
    sizes = []

    def recorded(name):
        def operation(**arguments):
            result = getattr(cuda, name)(**arguments)
            if arguments["workspace"] == 0:
                sizes.append(result)
            return result

        return operation

    class Recorder:
        def __getattr__(self, name):
            return recorded(name)

    with monkeypatch.context() as patch:
        patch.setattr(launches, "extension", lambda backend: Recorder())
        run()
    return sizes


@pytest.mark.parametrize(
    ("shape", "most_megabytes"), [((2, 3, 16), 5), ((4, 3, 16), 5), ((14, 8, 64), 10), ((128, 4, 1024), 60)]
)
def test_workspace_is_small(cuda, monkeypatch, shape, most_megabytes):
    num_classes, _, d = shape
    z, prototypes = torch.randn(2, d, 601, requires_grad=True), torch.randn(shape)
    labels, regions, weight = random_maps(601, num_classes)

    def run():
        head = prototype_head(z, prototypes, labels=labels, regions=regions, num_regions=2, weight=weight)
        head.info_nce.backward()

    sizes = recorded_workspaces(cuda, monkeypatch, run)
    assert len(sizes) == 2 and 0 < min(sizes) and max(sizes) < most_megabytes * MEGABYTE


def test_workspace_is_at_most_8_bytes_a_voxel(cuda, monkeypatch):
    """Beyond what does not grow with the number of voxels."""
    prototypes, n = torch.randn(3, 2, 16), 20000

    def workspace(num_voxels):
        z, (labels, _, _) = torch.randn(2, 16, num_voxels), random_maps(num_voxels, 3)
        return max(recorded_workspaces(cuda, monkeypatch, lambda: cluster_mean(z, prototypes, labels)))

    assert workspace(2 * n) - workspace(n) <= 8 * 2 * n


def shifted_by_one(x):
    """A copy in the same memory format that starts at no multiple of a vector."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].as_strided(x.shape, x.stride(), storage_offset=1).copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_voxels", [511, 512, 513, 1028])
def test_alignment_changes_nothing(cuda, num_voxels, dtype, layout):
    """Rows that no vector can read give the same bits as those that vectors do."""
    prototypes = torch.randn(2, 3, 16)
    aligned = in_layout(torch.randn(2, 16, num_voxels).to(dtype), layout)
    results = []
    for z in (aligned, shifted_by_one(aligned)):
        z = z.detach().requires_grad_()
        similarity, index = prototype_similarity(z, prototypes)
        mean = masked_class_mean(z, z.detach()[:, :5])
        gradients = [torch.autograd.grad(x.float().square().sum(), z)[0] for x in (similarity, mean)]
        results.append((similarity, index, mean, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 7, 16, 17])
def test_alignment_of_the_prompts_gradient(cuda, num_classes, dtype):
    logits, text = torch.randn(2, num_classes, 260).to(dtype), torch.randn(num_classes, 36)
    logits, text = logits.requires_grad_(), text.requires_grad_()
    prompt = prompt_mix(logits, text)
    aligned = torch.randn(prompt.shape).to(dtype)
    upstream = (aligned, shifted_by_one(aligned))
    results = [torch.autograd.grad(prompt, (logits, text), x, retain_graph=True) for x in upstream]
    (by_logits, by_text), (shifted_by_logits, shifted_by_text) = results
    torch.testing.assert_close(shifted_by_logits, by_logits, rtol=0, atol=0)
    torch.testing.assert_close(shifted_by_text, by_text)  # another order of the voxels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_of_batch_normalisation(cuda, dtype, layout):
    """Where any of the tensors cannot be read in vectors, none is; the sums are those of another order."""
    aligned, upstream = (in_layout(torch.randn(2, 16, 520).to(dtype), layout) for _ in range(2))
    weight, bias = torch.rand(16) + 0.5, torch.randn(16)
    results = []
    for given in (aligned, shifted_by_one(aligned)):
        for gradient in (upstream, shifted_by_one(upstream)):
            x, running = given.detach().requires_grad_(), (torch.zeros(16), torch.ones(16))
            y = batch_norm_relu(x, weight, bias, *running)
            results.append((y, *running, torch.autograd.grad(y, x, gradient)[0]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_narrow_and_wide_tiles_agree(cuda, num_classes, layout):
    """Three regions do not fit narrow tiles, nor does a 17th channel."""
    prototypes = torch.randn(num_classes, 3, 16)
    z = in_layout(torch.randn(2, 16, 700), layout)
    labels, regions, weight = random_maps(700, num_classes)
    targets = {"labels": labels, "regions": regions, "weight": weight}
    narrow, wide = (prototype_head(z, prototypes, **targets, num_regions=count) for count in (2, 3))
    torch.testing.assert_close(narrow.similarity, wide.similarity, rtol=0, atol=1e-6)
    for name in ("ce", "dice"):
        torch.testing.assert_close(getattr(narrow, name), getattr(wide, name)[:2])
    assert torch.equal(narrow.cluster_count > 0, wide.cluster_count > 0)
    torch.testing.assert_close(narrow.cluster_count, wide.cluster_count)
    torch.testing.assert_close(narrow.cluster_sum, wide.cluster_sum, rtol=1e-5, atol=1e-4)

    padded_z = in_layout(torch.cat([z, torch.zeros(2, 1, 700)], 1), layout)
    padded_prototypes = torch.cat([prototypes, torch.zeros(num_classes, 3, 1)], 2)
    gradients = []
    for x, p in ((z, prototypes), (padded_z, padded_prototypes)):
        x = x.detach().requires_grad_()
        gradients.append(torch.autograd.grad(prototype_info_nce(x, p, labels=labels), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1][:, :16], rtol=1e-4, atol=1e-6)


def test_logarithms_of_many_voxels(cuda):
    """A thread multiplies the sums that it takes logarithms of: those of equal logits are as large as sums can be."""
    labels = torch.randint(0, 4, (1, 60000), dtype=torch.uint8)
    ce, _ = dice_ce(torch.zeros(1, 4, 60000), labels)
    torch.testing.assert_close(ce, torch.tensor([4.0]).log(), rtol=1e-6, atol=0)
    z = torch.ones(1, 16, 60000)
    prototypes = torch.ones(4, 3, 16)
    head = prototype_head(z, prototypes, labels=labels)
    torch.testing.assert_close(head.info_nce, torch.tensor(12.0).log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(head.ce, torch.tensor([4.0]).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_negative_labels_are_none_of_many_classes(cuda, dtype):
    logits = torch.randn(1, 300, 40)  # in bytes, -1 is class 255
    labels = torch.randint(-2, 128, (1, 40))
    torch.testing.assert_close(
        tuple(dice_ce(logits, labels.to(dtype))), tuple(dice_ce(logits, labels)), rtol=0, atol=0
    )


@pytest.mark.parametrize("num_classes", [2, 3])
def test_labels_and_regions_out_of_range_are_ignored(cuda, num_classes):
    prototypes, z = torch.randn(num_classes, 3, 16), torch.randn(2, 16, 600)
    labels, regions, _ = random_maps(600, num_classes)
    wild = labels.to(torch.int64).where(labels >= 0, torch.randint(num_classes, 1 << 62, labels.shape))
    wrapping = labels.to(torch.int64).where(labels >= 0, 1 + (1 << 32))
    for large, small in ((wild, labels), (wild.to(torch.uint64), labels), (wrapping, labels)):
        expected = cluster_mean(z, prototypes, small)
        torch.testing.assert_close(cluster_mean(z, prototypes, large), expected, rtol=0, atol=0)
        torch.testing.assert_close(
            tuple(dice_ce(z[:, :num_classes].contiguous(), large)),
            tuple(dice_ce(z[:, :num_classes].contiguous(), small)),
            rtol=0,
            atol=0,
        )
    wild_regions = torch.where(regions == 1, torch.randint(1, 256, regions.shape, dtype=torch.uint8), regions)
    logits = z[:, :num_classes].contiguous()
    ignored = labels.where(regions == 0, -1)
    torch.testing.assert_close(
        tuple(dice_ce(logits, labels, regions=wild_regions, num_regions=1)), tuple(dice_ce(logits, ignored))
    )


@pytest.mark.parametrize("shape", [(512, 1, 3), (168, 3, 3), (2, 256, 3)])
@pytest.mark.parametrize("num_regions", [1, 2, 5])
def test_shared_memory_is_enough_for_the_largest_sizes(cuda, num_regions, shape):
    """A launch that needed more than 99 KB would raise."""
    z, prototypes = torch.randn(1, shape[2], 3, requires_grad=True), torch.randn(shape)
    labels = torch.zeros(1, 3, dtype=torch.uint8)
    head = prototype_head(z, prototypes, labels=labels, num_regions=num_regions)
    (head.info_nce + head.ce[0] + head.dice[0]).backward()
    assert z.grad.isfinite().all() and z.grad.ne(0).any()


# Classes and channels: the most classes, and sums over the voxels that just find room in shared memory and that do not.
@pytest.mark.parametrize("shape", [(512, 3), (16, 600), (16, 700), (14, 1024)])
def test_shared_memory_of_prompt_mixing(cuda, shape):
    num_classes, _ = shape
    logits, text = torch.randn(2, num_classes, 70, requires_grad=True), torch.randn(shape, requires_grad=True)
    actual = torch.autograd.grad(prompt_mix(logits, text).square().sum(), (logits, text))
    expected = torch.autograd.grad(reference.prompt_mix(logits, text).square().sum(), (logits, text))
    for result, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_more_images_than_a_grid_has_rows(cuda):
    x, weight, bias = torch.randn(65_536, 1, 1), torch.randn(1, 1).requires_grad_(), torch.zeros(1)
    (actual,) = torch.autograd.grad(linear_classifier(x, weight, bias).sum(), weight)
    torch.testing.assert_close(actual, x.sum().view(1, 1), rtol=1e-5, atol=1e-3)


def test_blocks_that_go_on_to_another_image(cuda):
    """Each image has a matrix of its own, and an emulated GPU fewer blocks than there are images."""
    x, weight, bias, scale = torch.randn(400, 3, 150), torch.randn(2, 3), torch.randn(2), torch.rand(400, 3)
    torch.testing.assert_close(
        linear_classifier(x, weight, bias, scale), reference.linear_classifier(x, weight, bias, scale)
    )
