"""Time on the GPU's own clock, with cold caches and without the host's share."""

from collections.abc import Callable
from typing import Any

import torch

HEAD_START = 10_000_000  # cycles, about five milliseconds, in which the host launches what is timed
MATRIX = 8192


class DeviceTimer:
    """Times calls between two events on the current stream."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.zeros(2 * cache // 4, dtype=torch.int32, device="cuda")

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds that a call takes when the L2 cache holds none of its inputs; and its result."""
        self.flush.zero_()
        self.flush.amax()  # leaves the cache clean: to write dirty lines back would count as the call's
        torch.cuda._sleep(HEAD_START)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result


def matmul_tflops(timer: Callable[[Callable[[], Any]], tuple[float, Any]], dtype: torch.dtype) -> float:
    """What a large matrix product reaches in TFLOP/s, the best of five."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / min(timer(lambda: a @ b)[0] for _ in range(5)) / 1e9
