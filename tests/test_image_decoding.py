"""The fast step of image generation: static buffers, what can be captured or compiled, memory, and who is told."""

import pytest
import torch
from test_generation import (
    BOTH,
    END,
    IMAGE,
    PICTURE,
    START,
    N,
    force,
    ids,
    pad_left,
    random_codes,
    same_images,
    shared_model,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from transformers_dualtoken import generation, generation_memory, generation_progress, image_decoding
from transformers_dualtoken.generation_context import StaticContext


PROMPTS = pad_left([[5, 6, 7, START], [8, START]])


@pytest.fixture
def model():
    return shared_model()


def draw(model, seed=1, **kwargs):
    arguments = {**PROMPTS, "generation_mode": "image", "guidance_scale": 2.5, **kwargs}
    return model.generate(**arguments, generator=torch.Generator().manual_seed(seed))


def converse(model, rows=2, budget=40, **kwargs):
    """Text, images at different times and at once, more text; the rest is the model's choice."""
    plans = [{1: START, 14: 5, 20: START}, {4: START, 16: 6, 20: START}][:rows]
    return model.generate(
        **{name: value[:rows] for name, value in pad_left([[5, 6, 7], [8]]).items()},
        generation_mode="interleaved",
        guidance_scale=2.5,
        max_new_tokens=budget,
        eos_token_id=None,
        do_sample=True,
        logits_processor=[force(plans, 3)],
        generator=torch.Generator().manual_seed(1),
        **kwargs,
    )


class TestStaticCache:
    @BOTH
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"guidance_scale": 1.0},
            {"image_top_k": 5, "num_return_sequences": 3},
            {"pixel_top_k": 4, "image_top_p": 0.8},
        ],
    )
    def test_draws_what_a_growing_cache_draws(self, visual_features, settings):
        model = shared_model(visual_features)
        static = draw(model, cache_implementation="static", **settings)
        assert same_images(static, draw(model, cache_implementation="dynamic", **settings))
        assert not same_images(static, draw(model, seed=2, **settings))

    @BOTH
    @pytest.mark.parametrize("rows", [1, 2])
    def test_interleaved(self, visual_features, rows):
        model = shared_model(visual_features)
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
        monkeypatch.setattr(generation, "_TEXT_ROOM", 0)
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

    @pytest.mark.parametrize(
        "change, reason",
        [
            (("layer_types", ["full_attention", "sliding_attention"]), "other than full attention"),
            (("_attn_implementation_internal", "flash_attention_2"), "its attention is 'flash_attention_2'"),
        ],
    )
    def test_what_cannot_have_it_is_refused_or_goes_without(self, model, monkeypatch, change, reason):
        monkeypatch.setattr(model.config.text_config, *change)
        assert reason in StaticContext.unsupported(model)
        with pytest.raises(ValueError, match=reason):
            draw(model, cache_implementation="static")

    def test_backbones_with_a_window_go_without(self):
        """The window is of three tokens: less than the image."""
        from tiny_models import lively_unified_model, tiny_unified_config

        fields = tiny_unified_config().text_config.to_dict()
        fields |= {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": None}
        model = lively_unified_model(text_config=fields)
        assert "sliding_attention" in model.config.text_config.layer_types
        batch = draw(model, image_do_sample=False)
        for index, row in enumerate(([5, 6, 7, START], [8, START])):
            alone = model.generate(ids(*row), generation_mode="image", guidance_scale=2.5, image_do_sample=False)
            assert torch.equal(alone.pixel_codes[0], batch.pixel_codes[index])


# What makes the host wait for a device.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "unique_dim", "equal", "is_nonzero"}


class NoWaits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index waits"
        self.count += 1
        return function(*args, **(kwargs or {}))


class Traced:
    """A stand-in for a CUDA graph: the operations of one step, on the tensors it had, again and again."""

    def __init__(self, decoder, step):
        # Tracing runs the step.
        changed = [
            decoder.index,
            decoder.hidden_states,
            decoder.context.column,
            decoder.context.next_position,
            decoder.context.attention_mask,
        ]
        before = [buffer.clone() for buffer in changed]

        def run():
            step()
            return decoder.index.clone()

        self.replay = make_fx(run)()
        self.num_replays = 0
        for buffer, value in zip(changed, before):
            buffer.copy_(value)


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

    monkeypatch.setattr(image_decoding.ImageDecoder, "_can_capture", lambda self: True)
    monkeypatch.setattr(image_decoding.ImageDecoder, "_capture", lambda decoder, step: Graph(decoder, step))
    return counts


class TestStep:
    def test_the_host_waits_for_nothing(self, model, monkeypatch):
        counts = []
        step = image_decoding._step

        def watched(decoder):
            with NoWaits() as mode:
                step(decoder)
            counts.append(mode.count)

        expected = draw(model)
        monkeypatch.setattr(image_decoding, "_step", watched)
        assert same_images(draw(model), expected)
        # Every position does the same.
        assert len(counts) == N - 1 and len(set(counts)) == 1

    def test_the_check_for_waits_finds_them(self):
        with NoWaits(), pytest.raises(AssertionError, match="waits for the device"):
            torch.ones(2).sum().item()
        with NoWaits(), pytest.raises(AssertionError, match="a mask as an index waits"):
            torch.ones(2)[torch.tensor([True, False])]

    @pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"image_do_sample": False}])
    def test_one_step_replayed_draws_the_image(self, model, traced, settings):
        out = draw(model, **settings)
        assert traced == {"traces": 1, "replays": N - 1}
        assert same_images(out, draw(model, cache_implementation="dynamic", **settings))

    @pytest.mark.parametrize("rows", [1, 2])
    def test_replayed_in_interleaved_generation(self, model, traced, rows):
        out = converse(model, rows)
        assert traced["replays"] >= N
        # One graph for both images, though text and another image have come between.
        assert traced["traces"] == 1
        expected = converse(model, rows, cache_implementation="dynamic")
        assert torch.equal(out.sequences, expected.sequences) and same_images(out, expected)

    def test_made_anew_when_the_buffers_have_grown(self, model, traced, monkeypatch):
        expected = converse(model, 1, cache_implementation="dynamic")
        monkeypatch.setattr(StaticContext, "BLOCK", 1)
        monkeypatch.setattr(generation, "_TEXT_ROOM", 0)
        assert same_images(converse(model, 1), expected)
        assert traced["traces"] == 2

    def test_warming_up_changes_nothing(self, model, monkeypatch):
        expected = draw(model)
        warmed = []

        def capture(decoder, step):
            decoder._warm_up(step)
            warmed.append(decoder)

        monkeypatch.setattr(image_decoding.ImageDecoder, "_can_capture", lambda self: True)
        monkeypatch.setattr(image_decoding.ImageDecoder, "_capture", capture)
        assert same_images(draw(model), expected) and len(warmed) == 1

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_compiled_without_a_break(self, model, mode):
        config = CompileConfig(fullgraph=True, backend="eager", mode="default")
        function = draw if mode == "image" else converse
        out = function(model, compile_config=config)
        assert same_images(out, function(model, cache_implementation="dynamic"))

    def test_compiled_once(self, model):
        def count():
            return sum(torch._dynamo.utils.counters["stats"].values())

        config = CompileConfig(backend="eager")
        draw(model, compile_config=config)
        before = count()
        draw(model, seed=2, compile_config=config)
        assert count() == before

    @pytest.mark.slow
    def test_compiled_by_inductor(self, model):
        out = draw(model, compile_config=CompileConfig(), image_do_sample=False)
        assert same_images(out, draw(model, image_do_sample=False))

    @pytest.mark.parametrize(
        "options, passed",
        [
            ({"mode": "reduce-overhead"}, {"mode": None}),
            ({"mode": "max-autotune"}, {"mode": "max-autotune-no-cudagraphs"}),
            ({"mode": "default", "options": {"a": 1}, "fullgraph": False}, {"options": {"a": 1}, "fullgraph": False}),
        ],
    )
    def test_options_of_the_compiler(self, monkeypatch, options, passed):
        seen = {}
        monkeypatch.setattr(image_decoding, "_compiled", {})
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: seen.update(kwargs))
        image_decoding._compiled_step(options)
        assert seen == {"fullgraph": True, "dynamic": False} | passed


class TestMemory:
    @pytest.fixture
    def free(self, monkeypatch):
        """Sets the free memory, in bytes beyond the margin."""
        values = {}
        monkeypatch.setattr(
            generation_memory, "free_memory", lambda device: values["free"] + generation_memory._MARGIN
        )
        return lambda value: values.update(free=value)

    def test_keys_and_values_are_counted_as_they_are_allocated(self, model):
        seen = []
        build = StaticContext._build

        def watched(context, *args):
            build(context, *args)
            seen.append(context)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(StaticContext, "_build", watched)
            draw(model)
        (context,) = seen
        allocated = sum(part.nbytes for buffers in context.buffers for part in buffers.keys_and_values)
        counts = [
            generation_memory.bytes_per_image(model, columns, 4, True, torch.float32)
            for columns in (0, context.capacity)
        ]
        assert 2 * (counts[1] - counts[0]) == allocated

    def test_too_many_are_refused_with_the_number_that_fits(self, model, free):
        each = generation_memory.bytes_per_image(model, 4 + N, 4, True, torch.float32)
        free(6 * each)
        assert len(draw(model, num_return_sequences=3).pixel_codes) == 6
        free(6 * each - 1)
        with pytest.raises(ValueError, match=r"Drawing 6 image\(s\).*the largest batch that fits is 5"):
            draw(model, num_return_sequences=3)
        free(each - 1)
        with pytest.raises(ValueError, match="not even one image fits"):
            draw(model)

    def test_guidance_takes_more(self, model):
        with_guidance, without = (
            generation_memory.bytes_per_image(model, 20, 4, guided, torch.float32) for guided in (True, False)
        )
        assert with_guidance > 1.3 * without

    def test_a_cpu_is_not_asked(self, model):
        assert generation_memory.free_memory(torch.device("cpu")) is None


class Bar:
    """What `tqdm` would be."""

    def __init__(self, total, unit, disable):
        self.total, self.unit, self.disable, self.count = total, unit, disable, 0

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def update(self, count=1):
        self.count += count


class TestWatching:
    @pytest.mark.parametrize("cache", ["static", "dynamic"])
    def test_every_image_is_told_of(self, model, cache):
        told = []
        out = converse(model, cache_implementation=cache, on_image=lambda codes, owner: told.append((owner, codes)))
        assert sorted(owner for owner, _ in told) == out.image_owner.tolist() == [0, 0, 1, 1]
        for owner in range(2):
            own = [codes for row, codes in told if row == owner]
            assert torch.equal(torch.stack([pixel for pixel, _ in own]), out.pixel_codes[out.image_owner == owner])
            assert torch.equal(torch.stack([other for _, other in own]), out.semantic_codes[out.image_owner == owner])
        # The rows' first images were finished at different times, both before the second ones.
        assert [owner for owner, _ in told[:2]] == [0, 1]

    def test_an_image_is_told_of_before_the_text_after_it(self, model):
        events = []

        class Streamer:
            def put(self, value):
                events.append(value.flatten().tolist())

            def end(self):
                events.append("end")

        out = converse(
            model, rows=1, budget=16, streamer=Streamer(), on_image=lambda codes, owner: events.append("image")
        )
        new = out.sequences[0, 3:].tolist()
        text = [[token] for token in new if token not in (IMAGE, END)]
        assert new[1 : N + 3] == PICTURE
        assert events == [[5, 6, 7], *text[:2], "image", *text[2:], "end"]

    def test_in_image_mode(self, model):
        told = []
        out = draw(model, on_image=lambda codes, owner: told.append((owner, *codes)))
        assert [owner for owner, _, _ in told] == [0, 1]
        assert all(torch.equal(pixel, out.pixel_codes[owner]) for owner, pixel, _ in told)

    @pytest.mark.parametrize("cache", ["static", "dynamic"])
    def test_progress(self, model, monkeypatch, cache):
        bars = []

        def bar(**kwargs):
            bars.append(Bar(**kwargs))
            return bars[-1]

        monkeypatch.setattr(generation_progress.logging, "tqdm", bar)
        draw(model, progress_bar=True, cache_implementation=cache)
        converse(model, progress_bar=True, cache_implementation=cache)
        draw(model)
        assert [(bar.total, bar.count, bar.disable) for bar in bars] == [(N, N, False), (40, 40, False), (N, 0, True)]

    @pytest.mark.parametrize("option", [{"on_image": print}, {"progress_bar": True}])
    def test_text_has_no_images(self, model, option):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` belongs to image and interleaved"):
            model.generate(ids(5, 6), max_new_tokens=2, **option)


def test_a_prompt_that_ends_within_an_image_is_refused(model):
    with pytest.raises(ValueError, match="must not end within an image"):
        model.generate(ids(5, START, *[IMAGE] * N), **random_codes(1), generation_mode="interleaved")
