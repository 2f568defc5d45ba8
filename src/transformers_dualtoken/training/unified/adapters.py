"""LoRA for the unified model: which weights it adapts, and merging an adapter back."""

import os
import re
from collections.abc import Sequence
from warnings import catch_warnings, filterwarnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.utils import cached_file

from ...checkpoints import checkpoint_errors, damage_errors, new_folder, read_json_object
from ...lora_targets import BACKBONE_PROJECTIONS, backbone_targets, register_lora_targets
from ...modeling_dualtoken import DualTokenForCausalLM
from ...optional_libraries import needed_libraries


with needed_libraries("A LoRA adapter"):
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.utils import ModulesToSaveWrapper


TRAINED_IN_FULL = ("projector", "heads", "image_tokens", "embeddings")
DEFAULT_TRAINED_IN_FULL = ("projector", "heads", "image_tokens")
_MODULES_IN_FULL = {"projector": "visual_projector", "heads": "depth_heads"}


register_lora_targets()


def lora_config(
    model: DualTokenForCausalLM,
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] | str | None = None,
    train_in_full: Sequence[str] = DEFAULT_TRAINED_IN_FULL,
    **kwargs,
) -> LoraConfig:
    """
    A `LoraConfig` for a unified model: low rank in the language model, everything new to it in full.

    Args:
        model ([`DualTokenForCausalLM`]): what the config is for; it is not changed.
        r, alpha, dropout: rank, scale (the change of a weight is `alpha / r` B A), and dropout of the branches' inputs.
        target_modules (`Sequence[str]` or `str`, *optional*): names of linear layers within the language model's
            blocks, all seven by default; a `str` goes to PEFT as it is.
        train_in_full (`Sequence[str]`): of `"projector"`, `"heads"`, `"image_tokens"` (the embeddings of
            `<image_start>`, `<image_pad>` and `<image_end>`, and their rows of the text head; TRL 1.16 cannot train
            them) and, for words new to the language model, `"embeddings"` (those of all tokens).
        kwargs: further fields of `LoraConfig` (`use_dora`, `use_rslora`, `init_lora_weights`, ...).

    Raises:
        ValueError: for unknown names, and what cannot be trained on tied embeddings or split weights.
    """
    is_tied = model.config.tie_word_embeddings
    unknown = sorted(set(train_in_full) - set(TRAINED_IN_FULL))
    if unknown:
        raise ValueError(f"`train_in_full` takes {', '.join(TRAINED_IN_FULL)}, got {', '.join(unknown)}.")
    if not isinstance(target_modules, str):
        target_modules = _target_modules(model, BACKBONE_PROJECTIONS if target_modules is None else target_modules)
    if "embeddings" in train_in_full and is_tied and _is_split():
        raise ValueError(
            "`train_in_full` names embeddings that are tied to the text head, which are not trained where weights are "
            "split (ZeRO-3, FSDP). Leave them out, or use ZeRO-2."
        )
    modules = [module for part, module in _MODULES_IN_FULL.items() if part in train_in_full]
    # PEFT ties to them what it makes of a tied head.
    layers = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    token_indices = None
    if "embeddings" in train_in_full:
        modules += layers
        kwargs = {"ensure_weight_tying": is_tied, **kwargs}
    elif "image_tokens" in train_in_full:
        token_indices = {layer: sorted(model.config.special_image_token_ids) for layer in layers}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=modules or None,
        trainable_token_indices=token_indices,
        **kwargs,
    )


def _is_split() -> bool:
    return is_deepspeed_zero3_enabled() or is_fsdp_enabled()


def _target_modules(model: DualTokenForCausalLM, names: Sequence[str]) -> str:
    modules = [name for name, _ in model.named_modules()]
    missing = [name for name in names if not any(re.fullmatch(backbone_targets([name]), m) for m in modules)]
    if missing or not names:
        raise ValueError(
            f"`target_modules` must name layers of the language model's blocks ({', '.join(BACKBONE_PROJECTIONS)}), got "
            f"{', '.join(missing) or 'none'}."
        )
    return backbone_targets(names)


def add_lora(
    model: DualTokenForCausalLM, config: LoraConfig | None = None, *, revision: str | None = None, **kwargs
) -> PeftModel:
    """
    Give a unified model, quantised or not, a new, trainable adapter in place; everything else is frozen.

    What is trained is held in float32, whatever the base model's dtype: in bfloat16 most steps would round to nothing.
    Not so under DeepSpeed ZeRO-3, which keeps its own float32 copies, and FSDP, which wants one dtype.

    Args:
        config (`peft.LoraConfig`, *optional*): by default [`lora_config`] of `kwargs`.
        revision (`str`, *optional*): of the base model on the Hub; the adapter remembers it.
    """
    if config is not None and kwargs:
        raise ValueError(f"Give `add_lora` a config or its settings, not both; got also {', '.join(sorted(kwargs))}.")
    config = lora_config(model, **kwargs) if config is None else config
    is_split = _is_split()
    if is_split and config.trainable_token_indices:
        raise ValueError(
            "`train_in_full` names 'image_tokens', rows of the embeddings that PEFT cannot train where weights are split "
            "(ZeRO-3, FSDP). Leave them out (`--lora_train_in_full projector heads`), or use ZeRO-2."
        )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not is_split, revision=revision)
    if not is_split:
        for module in adapted.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save.float()
    if os.environ.get("RANK", "0") == "0":
        adapted.print_trainable_parameters()
    return adapted


def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> DualTokenForCausalLM:
    """
    Write a whole model, adapter included, that loads without PEFT; with the processor of the adapter's folder or of
    the base model.

    The sum is made in float32 and rounded once; `merge_and_unload()` on a bfloat16 model rounds the adapter's part too.

    Args:
        adapter, base (`str` or `os.PathLike`): folder or Hub name; the base model is by default what the adapter names.
        output (`str` or `os.PathLike`): a new or empty folder. It is written whole or not at all.
        dtype (`torch.dtype`, *optional*): of the written weights; the base model's by default.

    Raises:
        FileNotFoundError: if there is no such adapter or base model.
        ValueError: if `output` is not empty or lies in one of the two, if no base model is named, for damaged files,
            an adapter that does not fit, or values that are not finite.
    """
    with new_folder(output, adapter, *([] if base is None else [base])) as folder:
        config, revision = _adapter_config(adapter), None
        if base is None:
            base, revision = config.base_model_name_or_path, config.revision
        if not base or not isinstance(base, (str, os.PathLike)):
            raise ValueError(f"The adapter {adapter} names no base model; give the one it was trained on as `base`.")
        with checkpoint_errors(base):
            for name in ("config.json", "generation_config.json"):
                path = _file(base, name, revision=revision)
                if path is not None:
                    read_json_object(path)
            with damage_errors(f"The configuration of the base model {base}"):
                dtype = dtype or AutoConfig.from_pretrained(base, revision=revision).dtype or torch.float32
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, revision=revision)
        with damage_errors(f"The weights of the adapter {adapter}, for the base model {base},"), catch_warnings():
            # Or they would be left as new ones are.
            filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
        model = model.merge_and_unload().to(dtype)
        floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        wrong = [name for name, tensor in floats.items() if not torch.isfinite(tensor).all()]
        if wrong:
            raise ValueError(
                f"The base model {base} and the adapter {adapter} have a sum that is not finite in {dtype}: "
                f"{', '.join(wrong[:5])}."
            )
        model.save_pretrained(folder)
        source = next((place for place in (adapter, base) if _file(place, "processor_config.json")), None)
        if source is not None:
            with damage_errors(f"The processor of {source}"):
                processor = AutoProcessor.from_pretrained(source)
            processor.save_pretrained(folder)
    return model


def _file(checkpoint: str | os.PathLike, name: str, **kwargs) -> str | None:
    return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **kwargs)


def _adapter_config(adapter: str | os.PathLike) -> PeftConfig:
    with checkpoint_errors(adapter):
        path = cached_file(adapter, "adapter_config.json")
        names = ("adapter_model.safetensors", "adapter_model.bin")
        if all(_file(adapter, name) is None for name in names):
            raise FileNotFoundError(f"The adapter {adapter} holds no {names[0]}.")
    read_json_object(path)
    with damage_errors(f"The adapter's configuration {path}"):
        return PeftConfig.from_pretrained(adapter)
