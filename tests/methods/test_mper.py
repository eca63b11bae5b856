"""MPER: mixes, pseudo-labels, losses, the prototypes' step and the teacher's, against formulas written out here."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg.data import Case
from semiseg.methods import prototype_initialisation
from semiseg.methods.method import Batch
from semiseg.methods.mper import MPER, MPERConfig
from semiseg.methods.prototype_initialisation import cluster_embeddings, even_window
from semiseg_kernels import largest_components

CLASSES, WIDTH, PATCH = 3, 4, (6, 5, 4)


class SmallNetwork(nn.Module):
    """One convolution and a classifier, with BatchNorm, whose statistics make teacher and student differ."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, WIDTH, 3, padding=1), nn.BatchNorm3d(WIDTH))
        self.classifier = nn.Conv3d(WIDTH, CLASSES, 1)

    def forward(self, x):
        embedding = self.body(x)
        return self.classifier(embedding), embedding


def build(**options):
    torch.manual_seed(options.pop("seed", 0))
    settings = {
        "name": "mper",
        "pretraining_iterations": 1,
        "iterations": 1,
        "zero_box": (4, 3, 2),
        "contrast_weight": 0.3,
        "ramp_up_iterations": 10,
        "confidence": 0.4,
    }
    method = MPER(MPERConfig(**{**settings, **options}), SmallNetwork(), CLASSES)
    method.classifier.prototypes.normal_()
    pretraining, self_training = method.stages(torch.Generator().manual_seed(1))
    return method, pretraining, self_training


def batch(images=2):
    return Batch(
        torch.randn(images, 1, *PATCH),
        torch.randint(CLASSES, (images, *PATCH), dtype=torch.uint8),
        torch.randn(images, 1, *PATCH),
    )


def consistency(probabilities, label, region, config, weights=None):
    """(CE + Dice) / 2 of eq. 4, region by region, written out."""
    weights = weights or (1.0, config.pseudo_label_weight)
    if config.dice_per_image and len(label) > 1:
        images = zip(probabilities.split(1), label.split(1), region.split(1), strict=True)
        return sum(consistency(*image, config, weights) for image in images) / len(label)
    truth = F.one_hot(label.long(), CLASSES).movedim(-1, 1).to(probabilities.dtype)
    total = 0.0
    for r, weight in enumerate(weights):
        inside = (region == r)[:, None]
        entropy = -(truth * probabilities.log() * inside).sum() / inside.sum()
        overlap = (truth * probabilities * inside).sum((0, 2, 3, 4))
        power = 2 if config.dice_squared else 1
        sizes = ((truth**power + probabilities**power) * inside).sum((0, 2, 3, 4))
        total = total + weight * (entropy + 1 - ((2 * overlap + 1e-5) / (sizes + 1e-5)).mean()) / 2
    return total


def similarities(embedding, prototypes):
    z, p = F.normalize(embedding.double(), dim=1), F.normalize(prototypes.double(), dim=-1)
    return torch.einsum("bdxyz,ckd->bckxyz", z, p)


def test_mixes_are_bidirectional_copy_paste():
    _, _, stage = build()
    data = batch()
    mix_1, mix_2 = stage.mix(data, stage.inputs(data, 0)["mask"])
    pseudo = mix_1.region.bool()  # inside the zero box, the same in both mixes but for the direction
    assert pseudo.sum() == 4 * 3 * 2
    assert torch.equal(mix_2.region.bool(), ~pseudo)
    labelled_a, labelled_b = data.labelled_image.chunk(2)
    unlabelled_a, unlabelled_b = data.unlabelled_image.chunk(2)
    assert torch.equal(mix_1.image, torch.where(pseudo[:, None], unlabelled_a, labelled_a))
    assert torch.equal(mix_2.image, torch.where(pseudo[:, None], labelled_b, unlabelled_b))
    label_a, label_b = data.labelled_label.chunk(2)
    assert torch.equal(mix_1.label[~pseudo], label_a[~pseudo])
    assert torch.equal(mix_2.label[pseudo], label_b[pseudo])
    assert mix_1.reliable[~pseudo].all() and mix_2.reliable[pseudo].all()
    assert mix_1.label.dtype == torch.uint8


def test_pseudo_label_is_the_largest_component_and_reliable_where_confident():
    method, _, stage = build()
    image = torch.randn(2, 1, *PATCH)
    method.teacher.train()
    reference = copy.deepcopy(method.teacher)
    pseudo_label, reliable = stage.pseudo_label(image)
    confidence, prediction = reference(image)[0].softmax(1).max(1)
    expected = largest_components(prediction.byte(), CLASSES)
    assert torch.equal(pseudo_label, expected)
    assert torch.equal(reliable, (confidence > 0.4) & (prediction == expected))
    assert 0 < reliable.sum() < reliable.numel()


@pytest.mark.parametrize(
    "options",
    [{}, {"dice_squared": False}, {"dice_per_image": True}, {"contrast_reduction": "sum", "pseudo_label_weight": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("join", [False, True])
def test_losses_are_equations_4_to_6(join, options):
    method, _, stage = build(join_mixes=join, **options)
    data, iteration = batch(images=4), 4
    twin = copy.deepcopy(method.network)
    inputs = stage.inputs(data, iteration)
    mixes = stage.mix(data, inputs["mask"])
    method.teacher.load_state_dict(build()[0].teacher.state_dict())  # its running statistics moved
    losses = stage.losses(data, inputs)

    if join:
        outputs = list(zip(*(o.chunk(2) for o in twin(torch.cat([m.image for m in mixes]))), strict=True))
    else:
        outputs = [twin(mix.image) for mix in mixes]
    linear = prototype = contrastive = 0.0
    for mix, (logits, embedding) in zip(mixes, outputs, strict=True):
        linear += consistency(logits.double().softmax(1), mix.label, mix.region, method.config)
        similarity = similarities(embedding, method.classifier.prototypes)
        of_classes = (similarity.amax(2) / 0.1).softmax(1)
        prototype += consistency(of_classes, mix.label, mix.region, method.config)
        flat = similarity.flatten(1, 2) / 0.1
        contrastive += (flat.logsumexp(1) - flat.amax(1)).mean()
    if options.get("contrast_reduction") != "sum":
        contrastive = contrastive / 2
    ramp_up = math.exp(-5 * (1 - iteration / 10) ** 2)
    total = linear + ramp_up * (prototype + 0.3 * contrastive)
    expected = {
        "consistency_linear": linear,
        "consistency_prototype": prototype,
        "contrastive": contrastive,
        "ramp_up": torch.tensor(ramp_up),
        "total": total,
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    losses["total"].backward()
    total.backward()
    for ours, theirs in zip(method.network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    assert method.classifier.prototypes.grad is None
    assert all(p.grad is None for p in method.teacher.parameters())


def clusters(embedding, label, weight, prototypes, unit_length, requires_agreement):
    """Sums and counts of eq. 2, one voxel at a time."""
    sums, counts = (
        torch.zeros(prototypes.shape, dtype=torch.float64),
        torch.zeros(prototypes.shape[:2], dtype=torch.float64),
    )
    z = embedding.detach().double().movedim(1, -1).reshape(-1, WIDTH)
    similarity = similarities(embedding.detach(), prototypes).movedim((1, 2), (-2, -1)).flatten(0, -3)
    nearest, predicted = similarity.argmax(2), similarity.amax(2).argmax(1)
    if unit_length:
        z = F.normalize(z, dim=1)
    for i, (c, kept) in enumerate(zip(label.flatten().tolist(), weight.flatten().tolist(), strict=True)):
        if kept and (predicted[i] == c or not requires_agreement):
            sums[c, nearest[i, c]] += z[i]
            counts[c, nearest[i, c]] += 1
    return sums, counts


@pytest.mark.parametrize(("unit_length", "requires_agreement"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("steps", "classes"), [("one", "all"), ("four", "foreground")])
def test_update_moves_prototypes_then_teacher(steps, classes, unit_length, requires_agreement):
    method, _, stage = build(
        prototype_steps=steps,
        update_classes=classes,
        update_unit_length=unit_length,
        update_requires_agreement=requires_agreement,
        prototype_momentum=0.8,
        teacher_decay=0.9,
    )
    data = batch()
    prototypes = method.classifier.prototypes.double().clone()
    start = prototypes.clone()
    twin = copy.deepcopy(method.network)
    inputs = stage.inputs(data, 0)
    mixes = stage.mix(data, inputs["mask"])
    method.teacher.load_state_dict(build()[0].teacher.state_dict())
    stage.losses(data, inputs)
    teacher, student = copy.deepcopy(method.teacher.state_dict()), method.network.state_dict()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter += 0.5  # what an optimiser step would do
    stage.update()

    parts = []
    for mix in mixes:
        embedding = twin(mix.image)[1]
        for region in (0, 1):
            trusted = mix.reliable & (mix.region == region)
            parts.append(clusters(embedding, mix.label, trusted, start, unit_length, requires_agreement))
    if steps == "one":
        parts = [tuple(sum(part) for part in zip(*parts, strict=True))]
    for sums, counts in parts:
        moved = (counts > 0) & ((classes == "all") | (torch.arange(CLASSES)[:, None] > 0))
        mean = sums / counts.clamp_min(1)[..., None]
        prototypes = torch.where(moved[..., None], 0.8 * prototypes + 0.2 * mean, prototypes)
        if unit_length:
            prototypes = F.normalize(prototypes, dim=2)
    assert torch.allclose(method.classifier.prototypes.double(), prototypes, atol=1e-5)
    assert not torch.allclose(method.classifier.prototypes.double(), start, atol=1e-3)
    for name, value in method.teacher.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.9 * teacher[name] + 0.1 * student[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("option", "given", "name", "value"),
    [
        ("class_temperature", 0.3, "class_temperature", 0.3),
        ("temperature", 0.2, "temperature", 0.2),
        ("dice_squared", False, "squared", False),
        ("contrast_positive", "label", "positive", "label"),
        ("contrast_normalize", False, "normalize", False),
        ("contrast_ignore_first", True, "ignore_prototype", 0),
        ("update_unit_length", True, "unit_length", True),
        ("update_requires_agreement", True, "require_agreement", True),
    ],
)
def test_options_reach_the_classifier(option, given, name, value):
    assert getattr(build()[0].classifier, name) != value
    assert getattr(build(**{option: given})[0].classifier, name) == value


def test_teacher_buffers_stay_its_own_by_option():
    method, _, stage = build(teacher_buffers=False)
    data = batch()
    stage.losses(data, stage.inputs(data, 0))
    before = copy.deepcopy(dict(method.teacher.named_buffers()))
    method.network.body[1].running_mean += 1
    stage.update()
    for name, value in method.teacher.named_buffers():
        assert torch.equal(value, before[name])


def test_pretraining_uses_labelled_images_in_both_directions():
    method, stage, _ = build()
    seen = []
    method.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    data = batch()
    stage.losses(data, stage.inputs(data, 0))["total"].backward()
    (image,) = seen
    assert image.shape == data.labelled_image.shape
    from_other = image[0] != data.labelled_image[0]
    assert from_other.sum() == 4 * 3 * 2
    assert torch.equal(image[0][from_other], data.labelled_image[1][from_other])
    assert torch.equal(image[1][from_other], data.labelled_image[0][from_other])


@pytest.mark.parametrize("dice", [{}, {"dice_squared": False, "dice_per_image": True}], ids=str)
def test_pretraining_loss(dice):
    method, stage, _ = build(**dice)
    twin, data = copy.deepcopy(method.network), batch(images=4)
    inputs = stage.inputs(data, 0)
    image, label = (
        torch.cat([torch.where(inputs["mask"], a, b), torch.where(inputs["mask"], b, a)])
        for a, b in (data.labelled_image.chunk(2), data.labelled_label.chunk(2))
    )
    probabilities = twin(image)[0].double().softmax(1)
    expected = consistency(probabilities, label, torch.zeros_like(label), method.config, weights=(1.0,))
    assert stage.losses(data, inputs)["total"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_ramp_up_steps_and_weight():
    _, _, stage = build(ramp_up_step=4, ramp_up_weight=0.5)
    data = batch()
    values = [stage.inputs(data, iteration)["ramp_up"].item() for iteration in (0, 3, 4, 7, 20)]
    expected = [0.5 * math.exp(-5 * (1 - min(t / 10, 1)) ** 2) for t in (0, 0, 4, 4, 20)]
    assert values == pytest.approx(expected)


def test_teacher_starts_as_the_student_in_the_configured_mode():
    cases = [Case("a", np.random.default_rng(0).normal(size=(1, *PATCH)).astype(np.float32),
                  np.random.default_rng(1).integers(0, CLASSES, PATCH).astype(np.uint8), None)]  # fmt: skip
    for mode in ("train", "eval"):
        method, _, stage = build(teacher_mode=mode)
        with torch.no_grad():
            method.network.classifier.weight += 1
        stage.prepare(cases, PATCH)
        assert torch.equal(method.teacher.classifier.weight, method.network.classifier.weight)
        assert method.teacher.training == (mode == "train") and method.network.training


def test_mixed_heads_average():
    method, _, _ = build()
    image = torch.randn(1, 1, *PATCH)
    method.eval()
    linear, prototype, mean = (method.probabilities(image, head) for head in ("linear", "prototype", "mean"))
    assert torch.allclose(mean, (linear + prototype) / 2)
    logits, embedding = method.network(image)
    assert torch.allclose(linear, logits.softmax(1))
    expected = (similarities(embedding, method.classifier.prototypes).amax(2) / 0.1).softmax(1)
    assert torch.allclose(prototype.double(), expected, atol=1e-5)


class Identity(nn.Module):
    """A network whose embedding is the image, so that its clusters are known."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x, torch.cat([x, -x], 1)


def intensity_case(values, label, seed):
    generator = np.random.default_rng(seed)
    label = np.asarray(label, dtype=np.uint8)
    image = np.choose(
        generator.integers(0, 2, label.shape), [np.choose(label, [v[i] for v in values]) for i in (0, 1)]
    )
    image = image + 0.01 * generator.normal(size=label.shape)
    return Case(f"case{seed}", image.astype(np.float32)[np.newaxis], label, None)


def test_clustering_finds_the_groups_of_every_class():
    label = np.zeros((20, 11, 9))
    label[5:] = 1
    values = [(-3.0, 5.0), (1.0, 9.0)]
    cases = [intensity_case(values, label, seed) for seed in range(3)]
    network = Identity().train()
    prototypes = cluster_embeddings(network, cases, 2, 2, (16, 16, 16), batch=500, seed=0)
    assert network.training
    assert prototypes.shape == (2, 2, 2) and prototypes.dtype == torch.float32
    for c in (0, 1):
        assert prototypes[c, :, 0].sort().values.tolist() == pytest.approx(values[c], abs=0.05)
    assert torch.allclose(prototypes[..., 0], -prototypes[..., 1])
    again = cluster_embeddings(network, cases, 2, 2, (16, 16, 16), batch=500, seed=0)
    assert torch.equal(prototypes, again)


@pytest.mark.parametrize(("shape", "patch"), [((20, 11, 9), (16, 16, 16)), ((20, 24), (32, 32))])
def test_every_channel_is_clustered(shape, patch):
    """The second is a function of the first, as so are its means."""
    label = np.zeros(shape)
    label[5:] = 1
    cases = [intensity_case([(-3.0, 5.0), (1.0, 9.0)], label, seed) for seed in range(3)]
    alone = cluster_embeddings(Identity(), cases, 2, 2, patch, batch=500, seed=0)
    both = [replace(case, image=np.concatenate([case.image, 3 - 2 * case.image])) for case in cases]
    prototypes = cluster_embeddings(Identity(), both, 2, 2, patch, batch=500, seed=0)
    assert prototypes.shape == (2, 2, 4) and torch.equal(prototypes[..., 2:], -prototypes[..., :2])
    torch.testing.assert_close(prototypes[..., 1], 3 - 2 * prototypes[..., 0], rtol=1e-4, atol=1e-4)
    if len(shape) == 3:
        torch.testing.assert_close(prototypes[..., 0].sort().values, alone[..., 0].sort().values, rtol=0, atol=0.05)


def test_the_network_is_in_evaluation_mode_while_its_embeddings_are_clustered():
    network, modes = Identity().train(), []
    network.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    case = intensity_case([(-3.0, 5.0)], np.zeros((8, 8, 8)), 0)
    cluster_embeddings(network, [case], 1, 2, (16, 16, 16), batch=500, seed=0)
    assert modes and not any(modes)


def test_the_clustering_has_the_seed_of_the_run_and_its_options(monkeypatch):
    given = []

    def centres(network, labelled, num_classes, num_prototypes, *others):
        given.append((network, labelled, num_classes, num_prototypes, *others))
        return torch.zeros(num_classes, num_prototypes, WIDTH)

    monkeypatch.setattr("semiseg.methods.mper.cluster_embeddings", centres)
    method, _, _ = build(num_prototypes=5, kmeans_batch=70)
    for seed in (3, 2**63 - 1):
        method.stages(torch.Generator().manual_seed(seed))[1].prepare([], PATCH)
    assert given == [(method.network, [], CLASSES, 5, PATCH, 70, seed) for seed in (3, 2**32 - 1)]


@pytest.mark.parametrize("batch", [500, 2_000], ids=["a sample", "all voxels"])
@pytest.mark.parametrize("apart", ["layers of every case", "cases"])
def test_clustering_finds_groups_that_come_one_after_the_other(apart, batch):
    """Whatever comes first must not take all centres."""
    values, label = (-3.0, 0.0, 5.0), np.zeros((24, 32, 32), dtype=np.uint8)
    rng = np.random.default_rng(0)
    cases = []
    for number in range(3):
        group = np.arange(24) // 8 if apart == "layers of every case" else np.full(24, number)
        image = np.asarray(values)[group][:, None, None] + 0.05 * rng.standard_normal(label.shape)
        cases.append(Case(f"case {number}", image.astype(np.float32)[np.newaxis], label, None))
    (centres,) = cluster_embeddings(Identity(), cases, 1, 3, (16, 16, 16), batch=batch, seed=0)
    assert centres[:, 0].sort().values.tolist() == pytest.approx(values, abs=0.1)


def test_clustering_samples_all_voxels_alike(monkeypatch):
    monkeypatch.setattr(prototype_initialisation, "BATCHES_KEPT", 2)
    clustering = prototype_initialisation._ClassClustering(num_prototypes=1, batch=500, seed=0)
    for part in np.split(np.arange(50_000, dtype=np.float32)[:, None], [10, 700, 1_800, 1_800, 30_000]):
        clustering.add(part)
    (sample,) = clustering.sample.T
    assert len(np.unique(sample)) == 1_000
    # Of 1,000 uniform numbers, the mean's standard deviation is 456, and a fifth holds 200 +- 13.
    assert abs(sample.mean() - 25_000) < 5 * 456
    assert all(abs(count - 200) < 65 for count in np.histogram(sample, 5, (0, 50_000))[0])


def test_clustering_duplicates_few_voxels_and_names_a_missing_class():
    label = np.zeros((8, 8, 8))
    label[0, 0, :2] = 1
    case = intensity_case([(-3.0, 5.0), (1.0, 9.0)], label, 0)
    with pytest.warns(UserWarning, match="class 1 has 2 labelled voxels for 3 prototypes"):
        prototypes = cluster_embeddings(Identity(), [case], 2, 3, (16, 16, 16), batch=500, seed=0)
    assert torch.isfinite(prototypes).all() and len(torch.unique(prototypes[1, :, 0])) == 3
    with pytest.raises(ValueError, match="no voxel of class 2"):
        cluster_embeddings(Identity(), [case], 3, 1, (16, 16, 16), batch=500, seed=0)


def test_clustering_resizes_slices_to_the_patch():
    case = Case("slice", np.full((1, 10, 14), 2.0, np.float32), np.zeros((10, 14), np.uint8), None)
    prototypes = cluster_embeddings(Identity(), [case], 1, 1, (8, 8), batch=16, seed=0)
    assert prototypes.flatten().tolist() == pytest.approx([2.0, -2.0])


@pytest.mark.parametrize(
    ("shape", "patch", "window"),
    [
        ((194, 142, 88), (112, 112, 80), (112, 80, 48)),
        ((224, 112, 80), (112, 112, 80), (112, 112, 80)),
        ((225, 5, 81), (112, 112, 80), (80, 16, 48)),
    ],
)
def test_even_windows_cover_a_volume_within_the_patch(shape, patch, window):
    assert even_window(shape, patch) == window
    counts = [-(-side // length) for side, length in zip(shape, window, strict=True)]
    assert counts == [-(-side // length) for side, length in zip(shape, patch, strict=True)]
