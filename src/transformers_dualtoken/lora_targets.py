"""Which layers of the unified model LoRA adapts. PEFT itself is not imported here."""

import re
import sys
from collections.abc import Sequence

from .configuration_dualtoken import DualTokenConfig


# The linear layers of a Qwen2 block.
BACKBONE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def backbone_targets(names: Sequence[str] = BACKBONE_PROJECTIONS) -> str:
    """
    PEFT's `target_modules` for linear layers of the language model's blocks, by their names: a regular expression, since
    a list or `"all-linear"` would adapt the vision tokenizer's layers of the same names as well.
    """
    return rf"(.*\.)?language_model\.layers\.\d+\.\w+\.({'|'.join(map(re.escape, names))})"


def register_lora_targets() -> None:
    """Make these layers the default of a `LoraConfig()` without `target_modules`, if PEFT is imported."""
    peft_utils = sys.modules.get("peft.utils")
    if peft_utils is not None:
        mapping = peft_utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        mapping[DualTokenConfig.model_type] = backbone_targets()
