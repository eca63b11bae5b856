"""The class that scores predict."""

from torch import Tensor


def predicted_class(
    scores: Tensor,  # [..., C, *S], logits or probabilities
    dim: int = 1,  # the axis of the classes
) -> Tensor:  # [..., *S] int64
    """The class of the largest score, the lowest of equal ones; one that is NaN counts as the largest."""
    return scores.max(dim).indices  # argmax takes ten times as long on a CPU
