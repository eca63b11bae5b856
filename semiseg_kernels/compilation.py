"""What torch.compile is told about functions in Python."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_while_compiling(function: Function) -> Function:
    """Mark a function whose result, while tracing, is a constant of the graph.

    As torch.compiler.assume_constant_result does, which imports the whole compiler: commands that compute nothing would
    wait seconds for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
