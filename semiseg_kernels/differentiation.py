"""Gradients without derivatives of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(
    backward: Callable[..., tuple[Tensor | None, ...]],  # of an autograd function
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Make the derivative of what backward returns an error.

    PyTorch's decorator of this name returns constants where the incoming gradient is one, as that of a loss is: a
    gradient penalty would be left out without a word.
    """
    operation = backward.__qualname__.split(".")[-2].lstrip("_")

    @functools.wraps(backward)
    def first_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        # A compiled graph refuses by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        sources = [x for x in (*ctx.saved_tensors, *gradients) if x is not None and x.requires_grad]
        return _SecondDerivative.apply(operation, results, *sources)

    return first_derivative


class _SecondDerivative(torch.autograd.Function):
    """The results as they are, for the graph a function of the sources."""

    @staticmethod
    def forward(
        ctx: Any, operation: str, results: tuple[Tensor | None, ...], *sources: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.operation = operation
        return results

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.operation} has no second derivatives")
