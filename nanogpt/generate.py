"""Writing with a model: token ids in, token ids out.

Shapes: B sequences of T tokens, V entries in the vocabulary.
"""

import torch


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, vocab_size=None):
    """Yield `max_new_tokens` new tokens one by one, each (B, 1), that continue `idx` (B, T).

    The model sees at most the last block_size tokens. `vocab_size`: ids from it on are never chosen, for a model
    whose vocabulary is padded. The other arguments are those of `sample`.
    """
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits, _ = model(idx[:, -model.config.block_size :])
            token = sample(logits[:, -1, :vocab_size], temperature, top_k, generator)
            yield token
            idx = torch.cat([idx, token], dim=1)
    finally:
        model.train(was_training)


def sample(logits, temperature=1.0, top_k=None, generator=None):
    """Choose one token (B, 1) from logits (B, V).

    temperature: divides the logits; 0 takes the likeliest token. top_k: only the k likeliest can be chosen,
    exactly k where several tie (Fan et al. 2018); None or 0 is all of them.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # so that no temperature overflows
    if not top_k or top_k >= logits.size(-1):
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    top, ids = logits.topk(top_k, dim=-1)  # (B, k), exactly k whatever ties
    choice = torch.multinomial(top.softmax(dim=-1), 1, generator=generator)
    return ids.gather(-1, choice)
