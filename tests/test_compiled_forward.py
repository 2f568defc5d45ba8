"""The forward with a static cache, compiled as one graph and step by step: no wait for a device, no copy to one."""

import pytest
import torch
from generation_helpers import END, PICTURE, START, NoCopies, NoWaits, ids, random_codes
from transformers import StaticCache


ROW, TOKENS = ids(5, START, *PICTURE, END, 6), [ids(token) for token in (7, 8, 9)]


def static_cache(model, initialised=False):
    config = model.config.text_config
    cache = StaticCache(config=config, max_cache_len=40)
    if initialised:
        head_dim = config.hidden_size // config.num_attention_heads
        cache.early_initialization(1, config.num_key_value_heads, head_dim, torch.float32, "cpu")
    return cache


def images(model, kind):
    size = model.config.vision_tokenizer_config.image_size
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"codes": random_codes(1), "pixels": {"pixel_values": pixels}, "none": {}}[kind]


@pytest.mark.parametrize("kind", ["codes", "pixels"])
@torch.no_grad()
def test_one_graph_for_the_prompt_and_one_for_a_token(model, kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, expected = static_cache(model, initialised=True), static_cache(model)
    steps = [(ROW, images(model, kind)), *((token, {}) for token in TOKENS)]
    for input_ids, given in steps:
        logits = compiled(input_ids=input_ids, past_key_values=ours, **given).logits
        torch.testing.assert_close(logits, model(input_ids=input_ids, past_key_values=expected, **given).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("with_mask", [False, True], ids=["no_mask", "mask"])
@torch.no_grad()
def test_the_host_waits_for_no_token(model, with_mask):
    cache, growing = static_cache(model), None
    model(input_ids=ROW, past_key_values=cache, **random_codes(1))
    growing = model(input_ids=ROW, use_cache=True, **random_codes(1)).past_key_values
    mask = {"attention_mask": torch.ones(1, ROW.shape[1] + 1, dtype=torch.long)} if with_mask else {}
    embeds = model.get_input_embeddings()(TOKENS[0])
    outputs = []
    with NoCopies(), NoWaits():
        outputs.append(model(input_ids=TOKENS[0], past_key_values=cache, **mask).logits)
        model(inputs_embeds=embeds, past_key_values=cache, **mask)
        model.model.image_mask(None, embeds)
    outputs.append(model(input_ids=TOKENS[0], past_key_values=growing).logits)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("cached", [False, True])
def test_placeholders_without_images_are_still_refused(model, cached):
    """At the start of a sequence, also where a static cache is used again."""
    cache = static_cache(model, initialised=True) if cached else None
    with pytest.raises(ValueError, match=r"0 image\(s\) were given"):
        model(input_ids=ROW, past_key_values=cache)
    with pytest.raises(ValueError, match=r"1 image\(s\) were given"):
        model(input_ids=ids(5, 6, 7), past_key_values=cache, **random_codes(1))
