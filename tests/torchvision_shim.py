"""
Makes torchvision importable beside a CPU build of torch that it was not compiled for. For tests only.

Such a torchvision fails at import because its compiled operators are missing, and takes transformers, lpips and
torchmetrics with it. Two of them are all it asks for at import, and nothing here runs them. Where torchvision is absent
or works, this does nothing.

    PYTHONPATH=tests python -m pytest -p torchvision_shim ...
    PYTHONPATH=tests python -m torchvision_shim SCRIPT ARGUMENTS...
"""

import importlib.util
import runpy
import sys

import torch


def install() -> None:
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # Kept for the life of the process: a collected library takes its operators with it.
        install.library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            install.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


install()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
