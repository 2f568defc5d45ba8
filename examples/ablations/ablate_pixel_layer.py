"""
Ablation: the encoder layer the pixel codes are made from, with the semantic codes kept at the deep layer.

    python examples/ablations/ablate_pixel_layer.py --output_dir ablations

trains every variant with three seeds, on two cores within 25 minutes and without a download, and writes
`pixel_layer.md` and `ablation_pixel_layer.png`. Started again, it skips what is finished. `--page docs/ablations.md`
puts the results into the documentation. With the same folder, it uses what `ablate_objectives.py` has left there.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from report import experiment_main  # noqa: E402


if __name__ == "__main__":
    experiment_main("pixel_layer", __doc__)
