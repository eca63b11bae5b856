"""What torch.compile is told about functions in Python."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_while_compiling(function: Function) -> Function:
    """As torch.compiler.assume_constant_result, which imports the whole compiler, two seconds of every command.

    What the function returned while tracing is a constant of the graph.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
