"""
Ablation: where the two losses act. One deep codebook for both, reconstruction only (deep, shallow), and dual.

    python examples/ablations/ablate_objectives.py --output_dir ablations

trains every variant with three seeds, on two cores within 25 minutes and without a download, and writes
`objectives.md` and `ablation_objectives.png`. Started again, it skips what is finished. `--page docs/ablations.md` puts
the results into the documentation. With the same folder, `ablate_pixel_layer.py` uses what the two have in common.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from report import experiment_main  # noqa: E402


if __name__ == "__main__":
    experiment_main("objectives", __doc__)
