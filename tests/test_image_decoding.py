"""The fast step of image generation: static buffers, what can be captured or compiled, memory, and who is told."""

import pytest
import torch
from naive.generation_loop import NaiveGenerator
from test_generation import (
    END,
    IMAGE,
    PICTURE,
    START,
    N,
    force,
    ids,
    pad_left,
    pairs,
    random_codes,
    same_images,
    shared_model,
)
from tiny_models import lively_unified_model, tiny_unified_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_dualtoken import generation_cache, generation_dualtoken, generation_graph, generation_loop
from transformers_dualtoken.generation_cache import StaticContext


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


# What makes the host wait for a device.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "unique_dim", "equal", "is_nonzero"}


# What copies from the host, of which a CPU's operations tell nothing.
COPIES = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.item, torch.Tensor.tolist}
COPIES |= {torch.Tensor.cpu, torch.from_numpy}


class NoCopies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in COPIES, f"{function.__name__} copies from or to the host"
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in parts), "a list as an index is copied from the host"
        return function(*args, **(kwargs or {}))


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

    monkeypatch.setattr(generation_loop.ImageDecoder, "_can_capture", lambda self: True)
    monkeypatch.setattr(generation_loop.ImageDecoder, "_capture", lambda decoder, step: Graph(decoder, step))
    # What the shared model keeps of one test is not another's.
    kept = generation_graph.KeptSteps()
    for module in (generation_loop, generation_dualtoken):
        monkeypatch.setattr(module, "kept_steps", kept)
    return counts


class TestStep:
    def test_the_host_waits_for_nothing(self, model, monkeypatch):
        counts = []
        step = generation_loop._step

        def watched(decoder):
            with NoCopies(), NoWaits() as mode:
                step(decoder)
            counts.append(mode.count)

        settings = {"image_top_k": 7, "pixel_top_p": 0.9, "semantic_temperature": 1.5}
        expected = draw(model, **settings)
        monkeypatch.setattr(generation_loop, "_step", watched)
        assert same_images(draw(model, **settings), expected)
        # Every position does the same.
        assert len(counts) == N - 1 and len(set(counts)) == 1

    def test_the_check_for_waits_finds_them(self):
        with NoWaits(), pytest.raises(AssertionError, match="waits for the device"):
            torch.ones(2).sum().item()
        with NoWaits(), pytest.raises(AssertionError, match="a mask as an index waits"):
            torch.ones(2)[torch.tensor([True, False])]
        for copies in (lambda: torch.tensor([1.0]), lambda: torch.ones(2)[[0, 1]], lambda: torch.ones(2).tolist()):
            with NoCopies(), pytest.raises(AssertionError, match="the host"):
                copies()

    @pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"image_do_sample": False}])
    def test_one_step_replayed_draws_the_image(self, model, traced, settings):
        out = draw(model, **settings)
        assert traced == {"traces": 1, "replays": N - 1}
        assert same_images(out, draw(model, cache_implementation="dynamic", **settings))

    @pytest.mark.parametrize("rows", [1, 2])
    def test_replayed_in_interleaved_generation(self, model, traced, rows):
        out = converse(model, rows)
        # All positions but those of the prompt's own steps, whichever row writes beside them.
        assert traced["replays"] == {1: 2 * N, 2: 12 + N}[rows]
        # One graph for both images, though text and another image have come between.
        assert traced["traces"] == 1
        expected = converse(model, rows, cache_implementation="dynamic")
        assert torch.equal(out.sequences, expected.sequences) and same_images(out, expected)

    def test_made_anew_when_the_buffers_have_grown(self, model, traced, monkeypatch):
        expected = converse(model, 1, cache_implementation="dynamic")
        monkeypatch.setattr(StaticContext, "BLOCK", 1)
        monkeypatch.setattr(generation_loop, "TEXT_ROOM", 0)
        assert same_images(converse(model, 1), expected)
        assert traced["traces"] == 2

    @pytest.mark.parametrize("config", [None, CompileConfig(backend="eager")], ids=["plain", "compiled"])
    def test_warming_up_changes_nothing(self, model, monkeypatch, config):
        expected = draw(model)
        devices = []

        def capture(step, changed, device):
            devices.append(device)
            generation_graph.warm_up(step, changed, device)

        monkeypatch.setattr(generation_loop.ImageDecoder, "_can_capture", lambda self: True)
        monkeypatch.setattr(generation_loop, "capture", capture)
        assert same_images(draw(model, compile_config=config), expected)
        assert devices == [torch.device("cpu")]

        # A step in which the host would wait: it runs as it is, and is not tried again.
        advance, warnings = StaticContext.advance, []

        def waiting(context, *args):
            hidden_states = advance(context, *args)
            assert hidden_states.sum().isfinite()
            return hidden_states

        monkeypatch.setattr(StaticContext, "advance", waiting)
        monkeypatch.setattr(generation_loop.logger, "warning_once", warnings.append)
        assert same_images(draw(model, compile_config=config), expected) and len(devices) == 2
        assert len(warnings) == 1 and "`_local_scalar_dense` makes the host wait for cpu" in warnings[0]

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_compiled_once_and_without_a_break(self, model, monkeypatch, mode):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        monkeypatch.setattr(generation_graph, "_compiled", type(generation_graph._compiled)())
        config = CompileConfig(fullgraph=True, backend=backend, mode="default")
        function = draw if mode == "image" else converse
        assert same_images(function(model, compile_config=config), function(model, cache_implementation="dynamic"))
        assert len(graphs) == 1
        function(model, compile_config=config)
        assert len(graphs) == 1
        if mode == "image":
            function(model, compile_config=config, guidance_scale=2.0)
            assert len(graphs) == 2
            function(model, compile_config=config, disable_compile=True, guidance_scale=4.0)
            assert len(graphs) == 2

    def test_compiled_for_more_sizes_than_torch_takes_of_one_function(self, model, monkeypatch):
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        step = generation_loop._step

        def small(decoder):
            decoder.index.add_(1)
            decoder.codes.add_(int(decoder.guidance))

        monkeypatch.setattr(generation_loop, "_step", small)
        monkeypatch.setattr(generation_graph, "_compiled", type(generation_graph._compiled)())
        config = CompileConfig(fullgraph=True, backend=backend)
        for scale in range(2, 22):
            draw(model, guidance_scale=float(scale), compile_config=config)
        assert len(compiled) == 20 and len(generation_graph._compiled) == generation_graph._MAX_COMPILED
        assert step is not small

    @pytest.mark.slow
    def test_compiled_by_inductor(self, model):
        out = draw(model, compile_config=CompileConfig(), image_do_sample=False)
        assert same_images(out, draw(model, image_do_sample=False))

    @pytest.mark.parametrize(
        "config, passed",
        [
            (CompileConfig(), {"mode": "default"}),
            (
                CompileConfig(mode="max-autotune", fullgraph=True),
                {"mode": "max-autotune-no-cudagraphs", "fullgraph": True},
            ),
            (CompileConfig(dynamic=True, mode="default"), {"mode": "default", "dynamic": True}),
            (CompileConfig(options={"a": 1}, backend="eager"), {"options": {"a": 1}, "backend": "eager"}),
        ],
    )
    def test_options_of_the_compiler(self, config, passed):
        expected = {"fullgraph": False, "dynamic": False, "backend": "inductor"} | passed
        assert generation_graph._compiler_arguments(config.to_dict()) == expected


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

        monkeypatch.setattr(generation_loop.logging, "tqdm", bar)
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
