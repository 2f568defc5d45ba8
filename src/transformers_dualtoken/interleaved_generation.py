"""The loop of interleaved generation: at every step a row writes a token, draws a position, or waits.

While every row that is not done draws, there is nothing to decide: as many positions as all of them have left are drawn
at once, and the host learns of them at the end.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .generation_progress import GenerationProgress
from .generation_scores import ImageTokenBar
from .image_decoding import ImageDecoder
from .unified_loss import text_logits


@dataclass
class _Row:
    """Where a row stands."""

    # Codes (2, n, D) of the positions of every image, part by part; the last image may be under way.
    images: list[list[torch.Tensor]] = field(default_factory=list)
    in_image: bool = False
    # Positions drawn of the current image.
    num_drawn: int = 0
    finished: bool = False

    def begin_image(self) -> None:
        self.in_image, self.num_drawn = True, 0
        self.images.append([])

    def take(self, codes: torch.LongTensor) -> None:
        """Add the codes `(2, n, D)` of the next positions."""
        self.images[-1].append(codes)
        self.num_drawn += codes.shape[1]


class InterleavedLoop:
    """
    Args:
        model ([`DualTokenForCausalLM`]).
        decoder ([`ImageDecoder`]): on a context of the prompts that has not begun yet.
        input_ids (`torch.LongTensor` of shape `(B, L)`): the prompts; a row that ends in `<image_start>` draws at once.
        budget (`int`): new tokens at most; an image counts N + 2, and none is started that could not be finished.
        processors (`LogitsProcessorList`): of the text.
        bar ([`ImageTokenBar`]): the one among these.
        choose_text (callable): scores `(rows, vocab_size)` and the list of these rows to ids `(rows,)`.
        eos_ids (`set[int]`), pad_id (`int`).
        progress ([`GenerationProgress`]).
        streamer (transformers' `BaseStreamer`, *optional*): of the text, for one row.
    """

    def __init__(
        self,
        model,
        decoder: ImageDecoder,
        input_ids: torch.LongTensor,
        budget: int,
        processors,
        bar: ImageTokenBar,
        choose_text,
        eos_ids: set[int],
        pad_id: int,
        progress: GenerationProgress,
        streamer=None,
    ):
        self.model, self.context, self.decoder = model, decoder.context, decoder
        self.processors, self.bar, self.choose_text = processors, bar, choose_text
        self.eos_ids, self.pad_id, self.progress, self.streamer = eos_ids, pad_id, progress, streamer
        self.start_id, self.image_id, self.end_id = model.config.special_image_token_ids
        self.num_positions = model.config.num_positions
        self.rows = [_Row() for _ in input_ids]
        self.length, self.end = input_ids.shape[1], input_ids.shape[1] + budget
        self.sequences = F.pad(input_ids, (0, budget), value=pad_id)

    def run(self) -> tuple[torch.LongTensor, list[list[torch.LongTensor]]]:
        """Returns the sequences `(B, L')` and the codes `(2, N, D)` of every row's new images."""
        prompts = self.sequences[:, : self.length]
        starts = (prompts[:, -1] == self.start_id).nonzero().flatten().tolist()
        for index in starts:
            self.rows[index].begin_image()
        self.context.begin(starts)
        if self.streamer is not None:
            self.streamer.put(prompts.cpu())
        with self.progress.bar(self.end - self.length, "token") as bar:
            pace = self.progress.pace(bar, prompts.device)
            while self.length < self.end and not all(row.finished for row in self.rows):
                if self._nothing_to_decide():
                    self._draw_on(pace)
                    continue
                self._step()
                if pace is not None:
                    pace()
        if self.streamer is not None:
            self.streamer.end()
        return self.sequences[:, : self.length], [[image for (image,) in row.images] for row in self.rows]

    def _drawing(self) -> list[int]:
        """The rows with positions left to draw."""
        return [i for i, row in enumerate(self.rows) if row.in_image and row.num_drawn < self.num_positions]

    def _nothing_to_decide(self) -> bool:
        others = [row for row in self.rows if not row.finished and not row.in_image]
        at_the_end = [row for row in self.rows if row.in_image and row.num_drawn == self.num_positions]
        return not others and not at_the_end and any(row.in_image for row in self.rows)

    def _draw_on(self, pace) -> None:
        """Draw as many positions as every row that draws has left."""
        drawing = self._drawing()
        count = self.num_positions - max(self.rows[index].num_drawn for index in drawing)
        self._take(drawing, self.decoder.draw(count, on_position=pace, rows=drawing))
        self.sequences[drawing, self.length : self.length + count] = self.image_id
        self.length += count

    def _step(self) -> None:
        """One token or position of every row."""
        drawing = self._drawing()
        writing = [i for i, row in enumerate(self.rows) if not row.in_image and not row.finished]
        tokens, codes, starts = [self.pad_id] * len(self.rows), None, []
        for index, row in enumerate(self.rows):
            if row.in_image:
                row.in_image = index in drawing
                tokens[index] = self.image_id if row.in_image else self.end_id
        if writing:
            for index, token in zip(writing, self._write(writing)):
                tokens[index] = token
                self.rows[index].finished = token in self.eos_ids
                if token == self.start_id and not self.rows[index].finished:
                    starts.append(index)
                    self.rows[index].begin_image()
        next_ids = torch.tensor(tokens, device=self.sequences.device)
        self.sequences[:, self.length] = next_ids
        self.length += 1
        if self.streamer is not None and writing:
            self.streamer.put(next_ids.cpu())
        goes_on = self.length < self.end and not all(row.finished for row in self.rows)
        if goes_on:
            self.context.reserve(1)
            self.context.start_images(starts)
        if drawing and goes_on and self.decoder.is_static:
            others = [index for index in range(len(self.rows)) if index not in drawing]
            self._take(drawing, self.decoder.draw_beside_text(self._embeds(next_ids, [], None), others).unsqueeze(2))
            return
        if drawing:
            codes = self.decoder.sample(drawing)
            self._take(drawing, codes.unsqueeze(2))
        if goes_on:
            self.context.feed(self._embeds(next_ids, drawing, codes), conditional_only=not (drawing or starts))

    def _write(self, writing: list[int]) -> list[int]:
        """The next tokens of the rows that write."""
        hidden_states = self.context.hidden_states[: len(self.rows)]
        logits = text_logits(self.model.lm_head, hidden_states).float()
        self.bar.token_ids = [self.image_id, self.end_id]
        if self.end - self.length < self.num_positions + 2:
            self.bar.token_ids.append(self.start_id)
        scores = self.processors(self.sequences[:, : self.length], logits)[writing]
        return self.choose_text(scores, writing).tolist()

    def _take(self, drawing: list[int], codes: torch.LongTensor) -> None:
        """Give the rows that draw their part of the codes `(2, B, n, D)`, and tell of images that are finished."""
        grid = self.model.config.vision_tokenizer_config.grid_size
        for index in drawing:
            row = self.rows[index]
            row.take(codes[:, index])
            if row.num_drawn == self.num_positions:
                self.decoder.sampler.check_scores(index)
                row.images[-1] = [torch.cat(row.images[-1], dim=1)]
                self.progress.tell(tuple(row.images[-1][0].unflatten(1, (grid, grid))), index)

    def _embeds(self, next_ids: torch.LongTensor, drawing: list[int], codes: torch.LongTensor | None) -> torch.Tensor:
        """What is fed next, `(B, 1, H)`: of rows that draw, the position they have drawn."""
        embeds = self.model.get_input_embeddings()(next_ids[:, None])
        if drawing:
            embeds[drawing] = self.model.model.embed_image_codes(*codes[:, drawing].unsqueeze(2)).to(embeds.dtype)
        return embeds


__all__ = ["InterleavedLoop"]
