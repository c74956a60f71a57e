"""Writing with an encoder-decoder: the likeliest text, as far as a beam sees.

Shapes: B sources, K beams, S source length, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_transformer.nn.transformer import EncoderDecoder


@dataclass
class _Finished:
    """The best finished texts of a source."""

    beams: int
    length_penalty: float
    texts: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, tokens: list[int], log_probability: float) -> None:
        self.texts.append((self.score(log_probability, len(tokens)), tokens))
        self.texts = sorted(self.texts, key=lambda text: -text[0])[: self.beams]

    def score(self, log_probability: float, length: int) -> float:
        return log_probability / float(length**self.length_penalty)

    def is_done(self, best_log_probability: float, length: int) -> bool:
        """Whether no unfinished text can get better than the worst of these."""
        if len(self.texts) < self.beams:
            return False
        return self.texts[-1][0] >= self.score(best_log_probability, length)


@torch.inference_mode()
def beam_search(
    model: EncoderDecoder,
    source_BS: Tensor,
    real_BS: Tensor | None = None,
    *,
    bos_id: int,
    eos_id: int,
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The best text found for each source, without ``bos_id``; with ``eos_id`` if it ended.

    Of texts that begin alike only the ``beams`` likeliest are gone on with; one beam is greedy. Finished texts are
    compared by their log-probability over their length, to the power of ``length_penalty``, as Hugging Face's
    ``generate`` does: above 0, longer texts win more often; 0 compares probabilities.

    Args:
        model: In eval mode.
        source_BS: Token ids.
        real_BS: True where a source is no padding.
        bos_id: What the decoder begins with.
        eos_id: What ends a text.
        max_new_tokens: Longest text.
        beams: Texts that are gone on with.
        length_penalty: See above.

    Raises:
        ValueError: If ``beams`` or ``max_new_tokens`` is below 1, or the latter above the model's ``max_length``.

    Cost: a pass of the decoder over ``B * beams`` tokens per new token; keys and values are kept.
    """
    if beams < 1 or max_new_tokens < 1:
        raise ValueError(f"beams and max_new_tokens must be at least 1, got {beams} and {max_new_tokens}")
    if max_new_tokens > model.config.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} is above the model's max_length={model.config.max_length}; lower it"
        )
    n, device = len(source_BS), source_BS.device
    if n == 0:
        return []
    rows = torch.arange(n, device=device).repeat_interleave(beams)
    memory = model.encode(source_BS, real_BS)[rows]
    real = None if real_BS is None else real_BS[rows]
    caches = model.make_caches()
    tokens = torch.full((n * beams, 1), bos_id, device=device)
    scores_BK = torch.full((n, beams), float("-inf"), device=device)
    scores_BK[:, 0] = 0.0  # all beams begin alike: only one of them counts
    finished = [_Finished(beams, length_penalty) for _ in range(n)]
    done = [False] * n
    for length in range(1, max_new_tokens + 1):
        logits = model.decode(tokens[:, -1:], memory, real, caches)[:, -1].float()
        vocabulary = logits.size(-1)
        total = (scores_BK.flatten()[:, None] + logits.log_softmax(-1)).view(n, -1)
        best, places = total.topk(min(2 * beams, total.size(1)), dim=1)  # half of them may end a text
        kept, origins, following = [], [], []
        for i, (values, indices) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            chosen = []
            for rank, (value, index) in enumerate(zip(values, indices, strict=True)):
                beam, token = divmod(index, vocabulary)
                if token != eos_id:
                    chosen.append((value, i * beams + beam, token))
                elif rank < beams and not done[i] and value > float("-inf"):
                    finished[i].add([*tokens[i * beams + beam, 1:].tolist(), token], value)
                if len(chosen) == beams:
                    break
            chosen += [(float("-inf"), i * beams, eos_id)] * (beams - len(chosen))
            done[i] = done[i] or finished[i].is_done(chosen[0][0], length)
            kept.append([value for value, _, _ in chosen])
            origins += [origin for _, origin, _ in chosen]
            following += [token for _, _, token in chosen]
        if all(done):
            break
        scores_BK = torch.tensor(kept, device=device)
        order = torch.tensor(origins, device=device)
        tokens = torch.cat([tokens[order], torch.tensor(following, device=device)[:, None]], 1)
        for cache in caches:
            cache.reorder(order)
    for i, texts in enumerate(finished):
        for beam in range(beams):
            if not done[i] and scores_BK[i, beam] > float("-inf"):
                texts.add(tokens[i * beams + beam, 1:].tolist(), float(scores_BK[i, beam]))
    return [texts.texts[0][1] for texts in finished]
