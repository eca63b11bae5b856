import pytest
import torch
from torch import nn

from semiseg.models.dropout import ChannelDropout
from semiseg.models.linear_classifier import LinearClassifier2d, LinearClassifier3d

PLAIN = {  # dropout and convolution of PyTorch, the classifier, and an embedding's shape
    "2d": (nn.Dropout2d, nn.Conv2d, LinearClassifier2d, (3, 8, 9, 7)),
    "3d": (nn.Dropout3d, nn.Conv3d, LinearClassifier3d, (2, 8, 5, 6, 3)),
}


@pytest.mark.parametrize("after_dropout", [False, True])
@pytest.mark.parametrize("axes", PLAIN)
def test_dropout_and_classifier_are_pytorchs(axes, after_dropout):
    dropout, convolution, classifier, shape = PLAIN[axes]
    torch.manual_seed(0)
    plain = nn.Sequential(dropout(0.4), convolution(8, 3, kernel_size=1))
    torch.manual_seed(0)
    own, channels = classifier(8, 3), ChannelDropout(0.4)
    assert all(torch.equal(own.state_dict()[key], value) for key, value in plain[1].state_dict().items())

    embedding = torch.randn(shape)
    results = []
    for compute in (plain, lambda x: own(channels(x)) if after_dropout else own(x, channels.scale(x))):
        torch.manual_seed(1)
        x = embedding.clone().requires_grad_()
        logits = compute(x)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    torch.testing.assert_close(results[1], results[0])
    assert (results[0][1] == 0).any()  # something was dropped


def test_nothing_is_dropped_in_evaluation_or_at_0():
    x = torch.randn(2, 8, 4)
    for channels in (ChannelDropout(0.4).eval(), ChannelDropout(0.0)):
        assert channels.scale(x) is None and channels(x) is x


@pytest.mark.parametrize("probability", [-0.1, 1.0, 2.0, float("nan")])
def test_a_wrong_probability_is_refused(probability):
    with pytest.raises(ValueError, match="accepted are probabilities from 0 to below 1"):
        ChannelDropout(probability)
