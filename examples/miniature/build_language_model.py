"""
A small untrained Qwen2 with a tokenizer for a demo's conversations: the language model that the demo starts from.

    python examples/miniature/build_language_model.py --data_dir digits-data --output_dir digits-qwen2

At real scale this step is a download: any Qwen2.5 checkpoint.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AddedToken, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def build_tokenizer(texts: list[str], vocab_size: int = 384) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's splitting rules and special tokens; every byte is a token, so any text works."""
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=backend.get_vocab(), merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


# The digits' language model.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def build_model(tokenizer: Qwen2Tokenizer, **config) -> Qwen2ForCausalLM:
    """An untrained model; `config` holds fields of `Qwen2Config` that differ from the digits'."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {**SIZES, "vocab_size": len(tokenizer), "bos_token_id": None, **special, **config}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.generation_config = GenerationConfig(**special)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder written by a demo's data.py or emoji_data.py")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, default=384)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON object of Qwen2Config fields")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    lines = (Path(arguments.data_dir) / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        part["text"]
        for line in lines
        for message in json.loads(line)["messages"]
        for part in message["content"]
        if part["type"] == "text"
    ]
    tokenizer = build_tokenizer([*texts, "user\nassistant\n"], arguments.vocab_size)
    build_model(tokenizer, **arguments.config).save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
