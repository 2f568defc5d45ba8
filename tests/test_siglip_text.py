"""Texts reach the text tower as SigLIP and SigLIP 2 were trained on them, whichever way they come."""

import json
import pickle

import pytest
from tiny_models import tiny_tokenizer_config
from transformers import AutoProcessor, AutoTokenizer, GemmaTokenizer, SiglipTokenizer

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenVisionTokenizerProcessor
from transformers_dualtoken.evaluation import text_tokenizer
from transformers_dualtoken.processing_dualtoken import as_trained


TEXTS = ["A photo of a Siamese Cat.", "  a PHOTO,\tof a\n\nsiamese   [cat]!-\\^ "]
CANONICAL = "a photo of a siamese cat"


@pytest.fixture
def siglip_2_folder(tmp_path):
    """A SigLIP 2 folder's tokenizer: Gemma's with the end of the text, padded on the right."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzABCS.,"]
    tokenizer = GemmaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_max_length=64,
    )
    folder = tmp_path / "siglip2"
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "GemmaTokenizer"
    return folder


def test_siglip_2_sees_lower_case_without_punctuation(siglip_2_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(siglip_2_folder)
    wanted = tokenizer(CANONICAL).input_ids
    assert wanted[-1] == tokenizer.eos_token_id and tokenizer(TEXTS[0]).input_ids != wanted

    def check(ids):
        assert [list(map(int, row)) for row in ids] == [wanted + [0] * (64 - len(wanted))] * len(TEXTS)

    processor = DualTokenVisionTokenizerProcessor(DualTokenImageProcessorPil(size=24), tokenizer)
    check(processor(text=TEXTS)["input_ids"])
    check(text_tokenizer(tokenizer, 64)(TEXTS))
    check(pickle.loads(pickle.dumps(text_tokenizer(tokenizer, 64)))(TEXTS))
    # The rule is saved: with the processor, and for those who load the tokenizer alone, as pipelines do.
    tiny_tokenizer_config().save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    check(AutoProcessor.from_pretrained(tmp_path / "saved")(text=TEXTS)["input_ids"])
    alone = AutoTokenizer.from_pretrained(tmp_path / "saved")
    check(alone(TEXTS, padding="max_length", max_length=64).input_ids)
    assert as_trained(alone) is alone
    # What is given stays as it was.
    assert tokenizer(TEXTS[0]).input_ids != wanted
    # A special token that somebody types is text.
    typed = processor.tokenizer("a <eos> <pad> cat").input_ids
    assert typed == processor.tokenizer("a eos pad cat").input_ids
    assert processor(text=CANONICAL.upper(), images=None)["input_ids"][0][: len(wanted)] == wanted
    assert processor(text="")["input_ids"] == [[tokenizer.eos_token_id] + [0] * 63]


def test_other_tokenizers_are_left_alone(siglip_2_folder):
    assert as_trained(None) is None
    other = as_trained(AutoTokenizer.from_pretrained(siglip_2_folder))
    assert as_trained(other) is other
    # SigLIP's own rule, which this one repeats for SigLIP 2.
    siglip = object.__new__(SiglipTokenizer)
    siglip.do_lower_case = True
    assert as_trained(siglip) is siglip
    lower = other.backend_tokenizer.normalizer.normalize_str
    for text in [*TEXTS, "It's 3.50 — “good”!", "ÄÖÜ é", "#a_b"]:
        assert lower(text) == siglip.canonicalize_text(text).replace(" ", "▁")
