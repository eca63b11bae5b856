"""The prototype classifier against the formulas, and that it hands its options on."""

import pytest
import torch

from semiseg.models import PrototypeClassifier
from semiseg_kernels import prototype_head


def classifier_and_voxels(**options):
    classifier = PrototypeClassifier(3, 2, 5, **options)
    classifier.prototypes.copy_(torch.randn(3, 2, 5))
    z = torch.randn(2, 5, 6, 7, 4)
    return classifier, z, torch.randint(-1, 3, (2, 6, 7, 4), dtype=torch.int8)


def test_prototypes_are_state_and_not_parameters():
    classifier = PrototypeClassifier(3, 2, 5)
    assert classifier.prototypes.shape == (3, 2, 5) and classifier.prototypes.dtype == torch.float32
    assert list(classifier.state_dict()) == ["prototypes"]
    assert list(classifier.parameters()) == []


@pytest.mark.parametrize("unit_length", [False, True])
def test_prototypes_start_as_they_are_kept(unit_length):
    classifier, centres = PrototypeClassifier(3, 2, 5, unit_length=unit_length), torch.randn(3, 2, 5)
    classifier.start_at_(centres)
    expected = centres / centres.norm(dim=-1, keepdim=True) if unit_length else centres
    torch.testing.assert_close(classifier.prototypes, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities(dtype):
    """Embeddings and prototypes that lie close together, as trained ones do, are told apart in every dtype."""
    classifier, z, _ = classifier_and_voxels(class_temperature=0.2)
    towards = torch.randn(5)
    classifier.prototypes.mul_(0.03).add_(towards)
    z = z.mul(0.03).add(towards.view(5, 1, 1, 1)).to(dtype)
    probabilities = classifier.predict(z)
    assert probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    cosine = torch.nn.functional.cosine_similarity(
        z.double()[:, None, None], classifier.prototypes.double()[None, ..., None, None, None], dim=3
    )
    expected = (cosine.amax(2) / 0.2).softmax(1)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-5, atol=0)


OPTIONS = {
    "class_temperature": 0.3,
    "temperature": 0.2,
    "positive": "label",
    "normalize": False,
    "ignore_prototype": 1,
    "unit_length": True,
    "require_agreement": True,
}


@pytest.mark.parametrize("names", [(), tuple(OPTIONS), *((name,) for name in OPTIONS)])
def test_options_reach_the_operation(names):
    options = {name: OPTIONS[name] for name in names}
    classifier, z, labels = classifier_and_voxels(**options)
    regions = (torch.rand(labels.shape) < 0.5).to(torch.uint8)
    weight = torch.rand(labels.shape)
    head = classifier(z, labels, regions, weight, num_regions=2)
    expected = prototype_head(
        z, classifier.prototypes, labels=labels, regions=regions, num_regions=2, weight=weight, **options
    )
    for name in ("ce", "dice", "info_nce", "cluster_sum", "cluster_count"):
        assert torch.equal(getattr(head, name), getattr(expected, name)), name
    assert head.similarity is None and head.index is None


def test_losses_have_a_gradient_in_the_embedding_alone():
    classifier, z, labels = classifier_and_voxels()
    z.requires_grad_()
    head = classifier(z, labels)
    (head.ce.sum() + head.dice.sum() + head.info_nce).backward()
    assert z.grad.isfinite().all() and z.grad.any()
    assert classifier.prototypes.grad is None


@pytest.mark.parametrize("foreground_only", [False, True])
@pytest.mark.parametrize("unit_length", [False, True])
def test_update(foreground_only, unit_length):
    classifier, z, labels = classifier_and_voxels(unit_length=unit_length)
    labels[labels == 2] = 1  # class 2 stays empty
    if unit_length:
        classifier.prototypes.copy_(torch.nn.functional.normalize(classifier.prototypes, dim=-1))
    before = classifier.prototypes.clone()
    buffer = classifier.prototypes
    head = classifier(z, labels)
    classifier.update_(head.cluster_sum, head.cluster_count, 0.9, foreground_only=foreground_only)
    assert classifier.prototypes is buffer
    expected = before.clone()
    for label in range(1 if foreground_only else 0, 2):
        for k in range(2):
            if head.cluster_count[label, k] > 0:
                mean = head.cluster_sum[label, k] / head.cluster_count[label, k].float()
                expected[label, k] = 0.9 * before[label, k] + 0.1 * mean
    if unit_length:
        expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(classifier.prototypes, expected)
    torch.testing.assert_close(classifier.prototypes[2], before[2])
    assert not torch.equal(classifier.prototypes[1], before[1])
    if foreground_only:
        torch.testing.assert_close(classifier.prototypes[0], before[0])
