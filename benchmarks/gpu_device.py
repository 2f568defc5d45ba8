"""The GPU that a benchmark runs on: clocks, memory and what the machine can do at best."""

import gc
import math
import statistics
import time
import warnings

import torch


class Device:
    """The GPU, or for a trial the CPU, which measures no memory."""

    def __init__(self, small: bool):
        self.is_gpu = not small
        self.device = torch.device("cuda" if self.is_gpu else "cpu")
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.name = torch.cuda.get_device_name() if self.is_gpu else "CPU"

    def synchronize(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def free(self):
        torch._dynamo.reset()
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def seconds(self, function, repeats: int, most_seconds: float) -> float:
        """Median of at most `repeats` runs of `function()`, of one at least; none begins after `most_seconds`."""
        times = []
        while len(times) < repeats and sum(times) < most_seconds:
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def seconds_in_a_row(self, function, budget: float = 2.0) -> float:
        """
        Median seconds of a call among others without a wait between them, after three to warm up: as many as fit
        `budget` seconds, 5 to 50.
        """
        if not self.is_gpu:
            budget = 0.0
        for _ in range(3):
            start = time.perf_counter()
            function()
            self.synchronize()
        calls = min(50, max(5, round(budget / (time.perf_counter() - start))))
        if not self.is_gpu:
            return self.seconds(function, calls, math.inf)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in zip(events, events[1:])) / 1e3

    def peak_gib(self, function) -> float | None:
        """The most memory that is held at once while `function()` runs, weights included."""
        if not self.is_gpu:
            function()
            return None
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30

    def count_waits(self, function) -> int | None:
        """How often the host waits for the GPU within `function()`."""
        if not self.is_gpu:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of one large copy."""
        size, times = (1 << 30, 20) if self.is_gpu else (1 << 22, 2)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)

        def copies():
            for _ in range(times):
                target.copy_(source)

        self.seconds(copies, 1, 1.0)
        return 2 * size * times / self.seconds(copies, 3, 10.0)

    def product_flops(self) -> float:
        """FLOPs a second of one large product in bfloat16."""
        size, times = (8192, 20) if self.is_gpu else (256, 1)
        left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=self.device)

        def products():
            for _ in range(times):
                left @ right

        self.seconds(products, 1, 1.0)
        return 2 * size**3 * times / self.seconds(products, 3, 10.0)
