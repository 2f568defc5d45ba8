"""Static and growing caches, of any backbone, and the memory that is planned for them."""

import pytest
import torch
from generation_helpers import (
    IMAGE,
    PICTURE,
    START,
    N,
    converse,
    draw,
    ids,
    pad_left,
    pairs,
    random_codes,
    same_images,
    shared_model,
)
from naive.generation_loop import NaiveGenerator
from tiny_models import lively_unified_model, tiny_unified_config
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CompileConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_dualtoken import generation_cache, generation_loop
from transformers_dualtoken.generation_cache import StaticContext


class TestStaticCache:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"guidance_scale": 1.0},
            {"image_top_k": 5, "num_return_sequences": 3},
            {"pixel_top_k": 4, "image_top_p": 0.8},
        ],
    )
    def test_draws_what_a_growing_cache_draws(self, settings):
        model = shared_model()
        static = draw(model, cache_implementation="static", **settings)
        assert same_images(static, draw(model, cache_implementation="dynamic", **settings))
        assert not same_images(static, draw(model, seed=2, **settings))

    @pytest.mark.parametrize("rows", [1, 2])
    def test_interleaved(self, rows):
        model = shared_model()
        static, dynamic = (converse(model, rows, cache_implementation=kind) for kind in ("static", "dynamic"))
        assert torch.equal(static.sequences, dynamic.sequences) and same_images(static, dynamic)
        assert len(static.pixel_codes) == 2 * rows

    def test_it_grows_where_room_runs_out(self, model, monkeypatch):
        expected = converse(model)
        capacities = []
        reserve = StaticContext.reserve

        def watched(context, num_tokens):
            reserve(context, num_tokens)
            capacities.append(context.capacity)

        monkeypatch.setattr(StaticContext, "reserve", watched)
        monkeypatch.setattr(StaticContext, "BLOCK", 1)
        monkeypatch.setattr(generation_loop, "TEXT_ROOM", 0)
        out = converse(model)
        assert torch.equal(out.sequences, expected.sequences) and same_images(out, expected)
        assert len(set(capacities)) > 1

    def test_a_prompt_is_fed_once_for_all_its_copies(self, model):
        rows = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        )
        draw(model, num_return_sequences=3, negative_prompt_ids=ids(9, 10, START))
        hook.remove()
        assert rows == [(2, 3), (1, 2)] + [(12, 1)] * N

    @pytest.mark.parametrize("backbone", ["qwen2", "mistral", "lfm2", "llama"])
    def test_backbones(self, backbone):
        """A window of three tokens, less than the image, named by layer or for all; a recurrent state; neither."""
        fields = tiny_unified_config().text_config.to_dict()
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        common = {name: fields[name] for name in names} | {"model_type": backbone, "num_hidden_layers": 2}
        fields = {
            "qwen2": {
                **fields,
                "use_sliding_window": True,
                "sliding_window": 3,
                "max_window_layers": 0,
                "layer_types": None,
            },
            "mistral": {**common, "sliding_window": 3},
            "lfm2": {**common, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
            "llama": common,
        }[backbone]
        model = lively_unified_model(text_config=fields)
        reason = StaticContext.unsupported(model)
        assert (reason is None) == (backbone == "llama")
        settings = {"generation_mode": "image", "guidance_scale": 2.5, "image_do_sample": False}
        codes = random_codes(1)
        rows = [[5, 6, 7, START], [8, *PICTURE, START], [START]]
        batch = model.generate(**pad_left(rows), **codes, num_return_sequences=2, **settings)
        assert torch.equal(batch.pixel_codes[::2], batch.pixel_codes[1::2])
        for index, row in enumerate(rows):
            alone = model.generate(ids(*row), **(codes if IMAGE in row else {}), use_cache=False, **settings)
            assert torch.equal(alone.pixel_codes[0], batch.pixel_codes[2 * index])
            pixel, semantic = NaiveGenerator(model).image(
                row, pairs(codes) if IMAGE in row else [], guidance_scale=2.5
            )
            assert torch.equal(alone.pixel_codes[0].flatten(0, 1), pixel)
            assert torch.equal(alone.semantic_codes[0].flatten(0, 1), semantic)
        if reason is not None:
            with pytest.raises(ValueError, match="static cache: its language model has layers with other than full"):
                draw(model, cache_implementation="static")
            with pytest.raises(ValueError, match="`compile_config` compiles a step of fixed shape"):
                draw(model, compile_config=CompileConfig())

    def test_a_recurrent_state_cannot_forget(self):
        fields = tiny_unified_config().text_config.to_dict()
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        fields = {name: fields[name] for name in names} | {"model_type": "lfm2", "num_hidden_layers": 2}
        fields |= {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
        model = lively_unified_model(text_config=fields)
        arguments = {"generation_mode": "interleaved", "max_new_tokens": N + 3}
        with pytest.raises(ValueError, match="a recurrent state cannot forget"):
            model.generate(ids(5, START), **arguments)
        assert len(model.generate(ids(5, START), guidance_scale=1.0, **arguments).pixel_codes) == 1

    def test_other_attention_feeds_prompts_only(self, model, monkeypatch):
        """Flash attention, for one, takes no mask of columns: the steps run in torch's own."""
        lengths = []

        def attention(module, query, *args, **kwargs):
            lengths.append(query.shape[2])
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

        expected = draw(model)
        AttentionInterface.register("counting", attention)
        AttentionMaskInterface.register("counting", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        config = model.model.language_model.config
        monkeypatch.setattr(config, "_attn_implementation_internal", "counting")
        assert same_images(draw(model), expected)
        assert set(lengths) == {3} and config._attn_implementation == "counting"

    @pytest.mark.parametrize("kind", ["prompt", "negative"])
    def test_images_without_placeholders_are_refused(self, model, kind):
        """Also where the prompt is `<image_start>` alone, of which nothing is fed before the images."""
        codes = random_codes(1)
        if kind == "negative":
            codes = {"negative_prompt_ids": ids(START)} | {f"negative_{name}": value for name, value in codes.items()}
        with pytest.raises(ValueError, match=r"1 image\(s\) were given"):
            model.generate(ids(START), generation_mode="image", **codes)

    def test_checkpointing_in_training_is_refused(self):
        model = lively_unified_model().train()
        model.gradient_checkpointing_enable()
        with pytest.raises(
            ValueError, match=r"gradient checkpointing does without in training: call `model.eval\(\)`"
        ):
            draw(model)
        assert same_images(draw(model.eval()), draw(shared_model()))


class TestMemory:
    @pytest.fixture
    def memory(self, monkeypatch):
        """Sets the memory of the machine, in bytes."""
        values = {}
        monkeypatch.setattr(generation_cache, "physical_memory", lambda: values["bytes"])
        return lambda value: values.update(bytes=value)

    def test_what_is_planned_is_what_is_allocated(self, model, monkeypatch):
        """Of a cache with room for all that is planned: as many bytes fit, one byte less does not."""
        contexts = []
        build = StaticContext._build

        def watched(context, *args):
            build(context, *args)
            contexts.append(context)

        monkeypatch.setattr(StaticContext, "_build", watched)
        monkeypatch.setattr(StaticContext, "BLOCK", 1)
        draw(model)
        tensors = contexts[0].memory.tensors
        allocated = sum(part.nbytes for name, part in tensors.items() if name.startswith(("keys_", "values_")))
        monkeypatch.setattr(generation_cache, "physical_memory", lambda: allocated)
        assert len(draw(model).pixel_codes) == 2
        monkeypatch.setattr(generation_cache, "physical_memory", lambda: allocated - 1)
        with pytest.raises(ValueError, match="room for 1 "):
            draw(model)

    @pytest.mark.parametrize("cache", ["static", "dynamic"])
    @pytest.mark.parametrize("guided", [True, False])
    def test_too_many_are_refused_with_the_number_that_fits(self, model, memory, cache, guided):
        config = model.config.text_config
        head_dim = config.hidden_size // config.num_attention_heads
        # Prompts of three tokens and the images; float32.
        each = (3 + N) * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4 * (1 + guided)
        settings = {"num_return_sequences": 3, "guidance_scale": 2.5 if guided else 1.0, "cache_implementation": cache}
        memory(6 * each)
        assert len(draw(model, **settings).pixel_codes) == 6
        for largest in range(6):
            memory((largest + 1) * each - 1)
            with pytest.raises(ValueError, match=rf"Drawing 6 image\(s\).* CPU of .* has room for {largest} "):
                draw(model, **settings)

    @pytest.mark.parametrize("prompt", [[5, START], [START]], ids=str)
    def test_a_long_answer_counts_as_a_whole(self, model, memory, prompt):
        memory(10**6)
        arguments = {"generation_mode": "interleaved", "guidance_scale": 2.5}
        with pytest.raises(ValueError, match=r"with up to \d{5} tokens each, takes \d+\.\d\d GB for keys and values"):
            model.generate(ids(*prompt), max_new_tokens=20_000, **arguments)
        memory(None)
        assert len(model.generate(ids(*prompt), max_new_tokens=N + 2, **arguments).pixel_codes) == 1

    def test_a_cpu_has_the_memory_of_the_machine(self, model):
        """Nothing is said about what is used of it; more than there is never fits."""
        with open("/proc/meminfo") as file:
            total = 1024 * int(file.readline().split()[1])
        assert generation_cache.physical_memory() == pytest.approx(total, rel=0.01)
        with pytest.raises(ValueError, match=r"takes \d+\.\d\d GB for keys and values, but a CPU of \d+\.\d\d GB"):
            draw(model, num_return_sequences=10**9)

    @pytest.mark.parametrize("rows, advice", [(6, "try 3 "), (1, "not even one fits")])
    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_a_device_out_of_memory_says_how_many_to_try(self, model, monkeypatch, mode, rows, advice):
        def fail(*args):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(StaticContext, "advance", fail)
        arguments = {"generation_mode": mode, "num_return_sequences": rows, "max_new_tokens": 20}
        with pytest.raises(
            torch.OutOfMemoryError, match=rf"{rows} image\(s\) at once .*{advice}.* CUDA out of memory"
        ):
            model.generate(ids(5, START), **arguments)
