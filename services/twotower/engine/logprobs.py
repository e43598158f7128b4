"""Log probabilities of tokens, from the logits of the forward that committed them."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.request import TokenLogprob


def token_logprobs(logits: Tensor, tokens: Tensor, top: int, excluded: int | None = None, step: int = 1) -> list[TokenLogprob]:
    """What each row gave its token, and the `top` likeliest tokens of the row.

    logits (N, V) fp32, only read; tokens (N,) int64; `excluded`: an id that has no probability, such as the mask's;
    `step`: which forward of its block this is.
    Of equal logits the lower id comes first, as with the argmax that commits a token: in bf16 equal ones are common.
    """
    logits = logits.clone()
    if excluded is not None:
        logits[:, excluded] = -torch.inf
    norm = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens.unsqueeze(-1)) - norm).squeeze(-1).tolist()
    ids, values = [], []
    for _ in range(top):  # `topk` does not say which of equal ones it takes
        likeliest = logits.argmax(-1, keepdim=True)
        ids.append(likeliest)
        values.append(logits.gather(-1, likeliest) - norm)
        logits.scatter_(-1, likeliest, -torch.inf)
    if not top:
        return [TokenLogprob(logprob, step=step) for logprob in chosen]
    rows = zip(torch.cat(ids, -1).tolist(), torch.cat(values, -1).tolist(), strict=True)
    return [TokenLogprob(logprob, tuple(zip(*row, strict=True)), step) for logprob, row in zip(chosen, rows, strict=True)]
