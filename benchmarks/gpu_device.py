"""The GPU that a benchmark runs on: clocks, memory, what the machine can do at best; and the results as they grow."""

import gc
import json
import math
import statistics
import sys
import time
import warnings

import torch
import transformers


class Device:
    """The GPU, or for a trial the CPU, which measures no memory."""

    def __init__(self, small: bool):
        if not small and not torch.cuda.is_available():
            sys.exit("This benchmark needs a CUDA device; --small runs it on a CPU with a tiny model.")
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


class Report:
    """
    The results as they grow: notes on stderr, everything as JSON in the file `path`, if there is one.

    Args:
        columns: of the table that [`Report.print_head`] begins; the first `num_names` are words.
        machine: what else the results depend on, beside the device and the versions.
    """

    def __init__(self, path, device: Device, columns, num_names: int = 1, **machine):
        self.path, self.columns, self.num_names, self.results, self.notes = path, columns, num_names, [], []
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.machine = {"device": device.name, "versions": versions, **machine}

    def print_machine(self):
        versions = (" ".join(version) for version in self.machine["versions"].items())
        print(f"{self.machine['device']}, {', '.join(versions)}")

    def print_head(self):
        names, numbers = " --- |" * self.num_names, " ---: |" * (len(self.columns) - self.num_names)
        print(f"\n| {' | '.join(self.columns)} |\n|{names}{numbers}", flush=True)

    def print_row(self, *cells):
        """Words, and pairs of a number, or `None`, and its format."""
        shown = [cell if isinstance(cell, str) else "–" if cell[0] is None else format(*cell) for cell in cells]
        print(f"| {' | '.join(shown)} |", flush=True)

    def note(self, text: str):
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)
        self.write()

    def print_notes(self):
        for note in self.notes:
            print(f"- {note}")

    def write(self):
        if self.path is not None:
            self.path.write_text(json.dumps({**self.machine, "results": self.results, "notes": self.notes}, indent=1))
