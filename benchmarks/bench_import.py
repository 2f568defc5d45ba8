"""Time of `import transformers_dualtoken` beyond what it stands on: transformers, diffusers, torch.

    python benchmarks/bench_import.py                # a minute, or three on a busy machine

Every import happens in a fresh process; the two kinds alternate, and times are medians. What the package stands on are
the very import statements of its files, read from their source and run without the package. The last line is the same
quantity measured in another way: the package's import in a process that has already run those statements.
"""

import argparse
import ast
import os
import platform
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


PACKAGE = "transformers_dualtoken"
GOAL_SECONDS = 0.5
TIMED = "import time\nstart = time.perf_counter()\n{}\nprint(time.perf_counter() - start)\n"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default %(default)s)")
    return parser.parse_args()


def run(code):
    """Output of code in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def foundation():
    """The imports from elsewhere of all files that `import transformers_dualtoken` loads, as code."""
    folder = Path(find_spec(PACKAGE).origin).parent
    listing = f"import sys, {PACKAGE}\nprint(*(name for name in sys.modules if name.startswith('{PACKAGE}.')))"
    files = ["__init__", *(name.removeprefix(f"{PACKAGE}.").replace(".", "/") for name in run(listing).split())]
    statements = {}
    for file in files:
        for node in ast.parse((folder / f"{file}.py").read_text()).body:
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
                statements[ast.unparse(node)] = None
    return "\n".join(statements)


def main():
    args = parse_args()
    below = foundation()
    codes = {
        "package": TIMED.format(f"import {PACKAGE}"),
        "below": TIMED.format(below),
        "rest": f"{below}\n" + TIMED.format(f"import {PACKAGE}"),
    }
    seconds = {name: [] for name in codes}
    for repeat in range(args.repeats + 1):
        for name, code in codes.items():
            measured = float(run(code))
            if repeat:  # the first round fills the file cache
                seconds[name].append(measured)
    package, below, rest = (statistics.median(seconds[name]) for name in codes)
    print(f"Python {platform.python_version()}, medians of {args.repeats} fresh processes, one thread\n")
    print(f"import {PACKAGE:34}{package:>8.3f} s")
    print(f"{'what it stands on':41}{below:>8.3f} s")
    print(f"{'difference':41}{package - below:>8.3f} s   (goal: at most {GOAL_SECONDS} s)")
    print(f"{'the package after what it stands on':41}{rest:>8.3f} s")


if __name__ == "__main__":
    main()
