"""What functions tell torch.compile about themselves."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """`torch.compiler.assume_constant_result`: torch.compile calls it once and keeps what it gets.

    That one imports all of the compiler to set this attribute: two seconds of every `import
    kdkernels`, for programs that compile nothing.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function
