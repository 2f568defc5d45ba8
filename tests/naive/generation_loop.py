"""Generation without a cache: the full forward of the whole sequence for every position and every depth."""

import torch

from .depth_head import naive_head


class NaiveGenerator:
    """Greedy generation of a single row; guidance acts on the logits, after the classifier."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.heads = [naive_head(model.depth_heads, kind) for kind in range(2)]
        self.books = [model.vision_tokenizer.quantizer(kind).codebook for kind in ("pixel", "semantic")]

    def _embed(self, ids: list[int], codes: list) -> torch.Tensor:
        """Embeddings `(1, L, H)`; `codes` holds (pixel, semantic) of every position of an image, in order."""
        model, image_id, per_image = self.model, self.config.image_token_id, self.config.num_positions
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        places = [t for t, token in enumerate(ids) if token == image_id]
        for start in range(0, len(places), per_image):  # the last image may be under way
            part = codes[start : start + per_image]
            pixel, semantic = (torch.stack([pair[kind] for pair in part])[None] for kind in range(2))
            image = model.model.embed_image_codes(pixel, semantic)[0]
            for t, vector in zip(places[start : start + per_image], image):
                embeds[0, t] = vector
        return embeds

    def last_state(self, ids: list[int], codes: list) -> torch.Tensor:
        """Hidden state `(H,)` after the whole sequence."""
        return self.model.model.language_model(inputs_embeds=self._embed(ids, codes)).last_hidden_state[0, -1]

    def next_codes(self, cond, uncond, guidance_scale) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The most probable codes (pixel `(D,)`, semantic `(D,)`) of the next position.

        `cond` and `uncond` are pairs (ids, codes) of a sequence; everything is computed anew at every depth.
        """
        chosen = []
        for head, book in zip(self.heads, self.books):
            vectors, codes = [], []
            for depth in range(self.config.num_depths):
                logits = head.next_logits(self.last_state(*cond), vectors)
                if uncond is not None:
                    without = head.next_logits(self.last_state(*uncond), vectors)
                    logits = without + guidance_scale * (logits - without)
                codes.append(logits.argmax())
                vectors.append(book[depth][codes[-1]])
            chosen.append(torch.stack(codes))
        return tuple(chosen)

    @torch.no_grad()
    def image(self, prompt: list[int], codes=(), negative=None, negative_codes=(), guidance_scale=1.0):
        """Codes (pixel, semantic), each `(N, D)`, after a prompt that ends in `<image_start>`."""
        start = self.config.image_start_token_id
        assert prompt[-1] == start
        ids, codes = list(prompt), list(codes)
        other_ids, other_codes = list(negative or [start]), list(negative_codes)
        new = []
        for _ in range(self.config.num_positions):
            uncond = None if guidance_scale == 1 else (other_ids, other_codes)
            pair = self.next_codes((ids, codes), uncond, guidance_scale)
            new.append(pair)
            for sequence, their_codes in ((ids, codes), (other_ids, other_codes)):
                sequence.append(self.config.image_token_id)
                their_codes.append(pair)
        return tuple(torch.stack([pair[kind] for pair in new]) for kind in range(2))

    @torch.no_grad()
    def interleaved(
        self, prompt, codes=(), max_new_tokens=1, guidance_scale=1.0, eos=None, scores_hook=None, negative=None
    ):
        """
        New ids (without padding) and the new images' codes, a list of (pixel `(N, D)`, semantic `(N, D)`).

        `negative` is the unconditional prompt and its codes; every image is guided by it afresh.
        `scores_hook(ids, scores)` may change the text scores `(V,)`, as a logits processor does.
        """
        start, image, end = self.config.special_image_token_ids
        per_image = self.config.num_positions
        ids, codes, images = list(prompt), list(codes), []
        in_image = ids[-1] == start
        while len(ids) - len(prompt) < max_new_tokens:
            if in_image:
                new = self.image(ids, codes, *(negative or ()), guidance_scale=guidance_scale)
                images.append(new)
                codes += list(zip(*new))
                ids += [image] * per_image + [end]
                in_image = False
                continue
            scores = self.model.lm_head(self.last_state(ids, codes))
            if scores_hook is not None:
                scores = scores_hook(ids, scores)
            scores[[image, end]] = float("-inf")
            if max_new_tokens - (len(ids) - len(prompt)) < per_image + 2:
                scores[start] = float("-inf")
            ids.append(int(scores.argmax()))
            in_image = ids[-1] == start
            if ids[-1] == eos:
                break
        return ids[len(prompt) :], images


def code_pairs(pixel_codes: torch.Tensor, semantic_codes: torch.Tensor) -> list:
    """(pixel `(D,)`, semantic `(D,)`) of every position of images `(images, h, w, D)`, in reading order."""
    return list(zip(pixel_codes.flatten(0, 2), semantic_codes.flatten(0, 2)))
