"""Conversations and documents for unified training from streams, which go on exactly where a stopped run was."""

from .chat_encoding import ChatEncoder
from .chat_source import BadSampleError, ChatSource, check_bad_sample_rule, check_weights, refusal
from .sample_stream import SampleStream


class DualTokenChatStream(SampleStream):
    """
    Samples of streamed sources, as [`ChatEncoder`] makes them. How they are divided, mixed, shuffled and resumed:
    [`SampleStream`].

    A sample says with `"num_cut"` (`int`) whether it was cut to the encoder's `max_length`; they are counted.

    Args:
        sources (`list[ChatSource]`): of `load_chat_sources(..., streaming=True)`; several need weights.
        encoder ([`ChatEncoder`]).
        on_bad_sample (`str`, defaults to `"error"`): `"error"` ends the stream at a sample that cannot be trained on,
            and names it; `"skip"` passes it over, counts it and logs its name.
        kwargs: `seed`, `shuffle_buffer_size`, `rank`, `world_size` and `repeat` of [`SampleStream`].
    """

    def __init__(self, sources: list[ChatSource], encoder: ChatEncoder, on_bad_sample: str = "error", **kwargs):
        check_bad_sample_rule(on_bad_sample)
        if not sources:
            raise ValueError("There are no sources to train on.")
        check_weights({f"{source.name} ({number})": source.weight for number, source in enumerate(sources, 1)})
        weights = [source.weight for source in sources]
        super().__init__([source.dataset for source in sources], None if None in weights else weights, **kwargs)
        self.sources, self.encoder = sources, encoder
        self.passed_over = (BadSampleError,) if on_bad_sample == "skip" else ()

    def prepare(self, source: int, row: dict, key: str) -> dict:
        try:
            encoded = self.encoder.encode(self.sources[source].to_example(row))
            return {**self.encoder.sample(encoded, key), "num_cut": int(encoded.cut)}
        except BadSampleError as error:
            if self.passed_over:
                raise
            raise refusal(self.row_name(source, row) or f"at {key} of {self.sources[source].name}", error) from error

    def row_name(self, source: int, row: dict) -> str | None:
        try:
            identity = self.sources[source].to_example(row).get("id")
        except BadSampleError as error:
            identity = error.sample_id
        return None if identity is None else f"{identity} of {self.sources[source].name}"
