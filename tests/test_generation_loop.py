"""The step of a position: replayed, captured or compiled; progress, and who is told of images."""

import pytest
import torch
from generation_helpers import (
    END,
    IMAGE,
    PICTURE,
    N,
    NoCopies,
    NoWaits,
    converse,
    draw,
    ids,
    same_images,
)
from transformers import CompileConfig

from transformers_dualtoken import generation_graph, generation_loop
from transformers_dualtoken.generation_cache import StaticContext


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
