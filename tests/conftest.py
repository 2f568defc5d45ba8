"""Fixtures shared by the tests: tiny seeded models on one CPU thread, no downloads."""

import gc
import os


# Before transformers is imported, which reads it once. A test that needs the network is a mistake.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from generation_helpers import Traced, shared_model  # noqa: E402
from tiny_models import tiny_tokenizer_config  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel  # noqa: E402

from transformers_dualtoken import (  # noqa: E402
    DualTokenForCausalLM,
    DualTokenImageProcessorPil,
    DualTokenVisionTokenizer,
    generation_dualtoken,
    generation_graph,
    generation_loop,
)


def pytest_collection_finish():
    """Every training collects garbage, which takes a second or more where it looks through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads cost more than they save at these sizes."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> DualTokenForCausalLM:
    """A tiny unified model, the same one for all tests of generation."""
    return shared_model()


@pytest.fixture
def image_processor() -> DualTokenImageProcessorPil:
    return DualTokenImageProcessorPil(size=24)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever tests run beside it."""
    torch.manual_seed(0)


@pytest.fixture
def make_tokenizer():
    """A function of config overrides that builds a tiny tokenizer in eval mode, with weights that make a difference."""

    def make(**overrides) -> DualTokenVisionTokenizer:
        torch.manual_seed(0)
        model = DualTokenVisionTokenizer(tiny_tokenizer_config(**overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # At 0.02 everything but the biases would vanish beside the residual streams.
                if "_proj." in name and parameter.ndim == 2:
                    parameter.normal_(std=0.3)
            for kind in ("pixel", "semantic"):
                codebook = model.quantizer(kind).codebook
                codebook.embeddings.normal_()
                codebook.embedding_sum.copy_(codebook.embeddings)
                codebook.cluster_size.fill_(1)
        return model.eval()

    return make


@pytest.fixture
def tokenizer(make_tokenizer) -> DualTokenVisionTokenizer:
    return make_tokenizer()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Two images `(2, 3, 24, 24)` in [-1, 1]."""
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory) -> Path:
    """A tiny SigLIP with its text tokenizer, as a checkpoint on disk."""
    torch.manual_seed(0)
    folder, config = tmp_path_factory.mktemp("siglip"), tiny_tokenizer_config()
    SiglipModel(
        SiglipConfig(vision_config=config.vision_config.to_dict(), text_config=config.text_config.to_dict())
    ).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Rows are copied to the cache of `datasets`: not to the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# Of generation; `model` is that of the test.


@pytest.fixture
def forward_rows(model):
    """Rows of every forward of the language model while the test runs."""
    rows = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    yield rows
    hook.remove()


@pytest.fixture
def positions(model):
    """Position ids of every forward of the language model while the test runs."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.fixture
def traced(monkeypatch):
    """Every decoder replays a trace; the fixture's value counts the traces and the replays."""
    counts = {"traces": 0, "replays": 0}

    class Graph:
        def __init__(self, decoder, step):
            self.trace = Traced(decoder, step)
            counts["traces"] += 1

        def replay(self):
            counts["replays"] += 1
            self.trace.replay()

    monkeypatch.setattr(generation_loop.ImageDecoder, "_can_capture", lambda self: True)
    monkeypatch.setattr(generation_loop.ImageDecoder, "_capture", lambda decoder, step: Graph(decoder, step))
    # What the shared model keeps of one test is not another's.
    kept = generation_graph.KeptSteps()
    for module in (generation_loop, generation_dualtoken):
        monkeypatch.setattr(module, "kept_steps", kept)
    return counts
