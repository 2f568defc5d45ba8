"""Texts as SigLIP's and SigLIP 2's text towers were trained on them."""

import string

from tokenizers import Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# What SigLIP 2's folders name. `SiglipTokenizer`, of SigLIP, does all this by itself.
_SIGLIP_2_TOKENIZERS = {"GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"}


def as_trained(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a SigLIP 2 folder, made to see texts as SigLIP 2's training did: lower case, without punctuation,
    every blank one space, padded on the right; special tokens in a text are text. Any other tokenizer is returned as
    it is.

    The rule is part of the tokenizer that is returned and saved with it, so that whatever loads a checkpoint's
    tokenizer, pipelines included, has it.
    """
    if tokenizer is None or not _SIGLIP_2_TOKENIZERS & {base.__name__ for base in type(tokenizer).__mro__}:
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Of big_vision, as SigLIP's tokenizer does it. `-` and `]` have a meaning in a class of characters.
    punctuation = "".join("\\" + character for character in string.punctuation)
    rule = [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(f"[{punctuation}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence([*rule, backend.normalizer] if backend.normalizer else rule)
    special_tokens = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="right",
        split_special_tokens=True,
        **special_tokens,
    )


__all__ = ["as_trained"]
