"""
transformers' own conventions for model files, by its linter `mlinter`: a part of `make lint`.

What is not followed stands here by rule, with the reason; an exception for one place stands in the code, as
`# trf-ignore: RULE reason`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "src" / "transformers_dualtoken"
EXCEPTIONS = {
    "TRF057": "@auto_docstring is made for folders of transformers itself: elsewhere it finds no checkpoint and no "
    "example, prints an error at import for every argument it does not know, and drops what a docstring says around its "
    "arguments. It is used where its texts say what is so (processors); models and configs write theirs out, with shapes, "
    "ranges and errors.",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "findings.json")
        command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", "--output-json", report, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.is_file():
            print(done.stdout + done.stderr)
            return 1
        findings = json.loads(report.read_text())["findings"]
    broken = [finding for finding in findings if finding["rule"] not in EXCEPTIONS]
    for finding in broken:
        print(f"{finding['path']}:{finding['line']}: {finding['message']}")
    print(f"{len(broken)} findings in model files; excepted by rule: {', '.join(EXCEPTIONS)}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
