"""The `dualtoken` command."""

import argparse
import re
import sys
from pathlib import Path
from textwrap import shorten

import torch
from transformers import AutoTokenizer

from .checkpoints import damage_errors, new_folder
from .convert import load_official_tokenizer, official_siglip_path
from .image_processing_pil_dualtoken import DualTokenImageProcessorPil
from .optional_libraries import needed_libraries
from .processing_dualtoken import DualTokenVisionTokenizerProcessor


def _convert(arguments: argparse.Namespace) -> None:
    with new_folder(arguments.output_dir, arguments.folder) as folder:
        model = load_official_tokenizer(arguments.folder)
        size = model.config.image_size
        processor = DualTokenImageProcessorPil(size={"height": size, "width": size})
        siglip = Path(official_siglip_path(arguments.folder))
        if any((siglip / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
            with damage_errors(f"The text tokenizer in {siglip}"):
                tokenizer = AutoTokenizer.from_pretrained(siglip)
            length = model.config.text_config.max_position_embeddings
            processor = DualTokenVisionTokenizerProcessor(processor, tokenizer, text_length=length)
        else:
            print(f"{siglip} holds no text tokenizer: the checkpoint gets an image processor only, enough for codes.")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(
        f"Wrote {arguments.output_dir}: {model.num_parameters():,} parameters, {size} px, "
        f"{model.config.num_positions} positions."
    )


def _merge(arguments: argparse.Namespace) -> None:
    with needed_libraries("`dualtoken merge`"):
        from .training.unified.adapters import merge_adapter

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    model = merge_adapter(arguments.adapter, arguments.output_dir, base=arguments.base, dtype=dtype)
    print(f"Wrote {arguments.output_dir}: {model.num_parameters():,} parameters, {model.dtype}.")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="dualtoken", description="Tools around DualToken checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="a vision tokenizer trained with the authors' code -> this format")
    convert.add_argument("folder", help="holds config.json, one *.pt and the SigLIP configuration")
    convert.add_argument("output_dir", help="where to write the checkpoint; must not hold files yet")
    convert.set_defaults(run=_convert)
    merge = commands.add_parser("merge", help="a unified model and its LoRA adapter -> one model that needs no PEFT")
    merge.add_argument("adapter", help="folder or Hub name of the adapter")
    merge.add_argument("output_dir", help="where to write the checkpoint; must not hold files yet")
    merge.add_argument("--base", help="the base model; by default the one that the adapter names")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; by default the base model's"
    )
    merge.set_defaults(run=_merge)
    arguments = parser.parse_args(argv)
    status = 1
    try:
        arguments.run(arguments)
        return 0
    except (ImportError, OSError, ValueError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        message = f"the memory of this machine does not suffice. {error}"
    # Libraries write some of theirs in several lines, with values of any length.
    print(f"dualtoken: {shorten(message, 4000, placeholder=' ...')}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
