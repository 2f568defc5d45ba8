"""What the benchmarks share: peak memory in a child process, times of alternating runs, and how results are printed."""

import json
import os
import statistics
import subprocess
import sys
import time

import torch


# With glibc's thresholds fixed, freed blocks go back to the system at once: a peak is then what was held together.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory_bytes(field):
    """A field of /proc/self/status: VmRSS is the memory held now, VmHWM its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def transient_bytes(function):
    """Peak memory of this process while `function()` runs, beyond what it held before; Linux."""
    # Importing torch peaks higher than what it leaves: start a new peak here.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = memory_bytes("VmRSS")
    function()
    return memory_bytes("VmHWM") - before


def run_child(script, *arguments):
    """Run a script in a process of its own; returns the JSON on its output."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = {**os.environ, **_MALLOC}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def alternating_medians(functions, repeats, clock=time.perf_counter):
    """
    Median seconds of every function of a dict. Each round runs all of them, so that drift strikes all alike.

    With `clock=time.process_time` it is the processor's time for this process, whatever else the machine does.
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative_error(value, reference):
    """Largest absolute difference over the largest absolute value."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


def cpu_name():
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")


def print_machine():
    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} thread, float32")


def print_head(names):
    print(f"{'':46}{names[0]:>14}{names[1]:>14}{'ratio':>8}")


def print_row(label, values, unit, places):
    """A row of the table: the two values and the first divided by the second."""
    first, second = values
    print(f"{label:46}{first:>11.{places}f} {unit:2}{second:>11.{places}f} {unit:2}{first / second:>8.2f}")
