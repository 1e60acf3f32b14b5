"""Is what was written what was trained? Each hop from one form of the model to the next gets a receipt.

The first of the two models answers real prompts greedily; then both read prompt and answer, and their logits at every
token of the answer are compared. What the second would have answered follows from that: it goes along with the first
up to the first token that it would have chosen otherwise.

Where both models have the same modules, their weights are compared as well: a fault that the prompts do not touch, or
that hides behind rounding, is found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunewright.errors import StageError

TOKENS = 16
"""Tokens of each answer. Answers go on behind their end: the models are to agree wherever they are asked."""


@dataclass(frozen=True)
class Allowed:
    """How far apart two models may be; None is not judged, only reported."""

    largest_logit_difference: float | None = None
    largest_kl: float | None = None
    """In nats, at the worst token."""
    same_best_token: float | None = None
    """The least share of tokens."""
    largest_weight_error: float | None = None
    """As a share of the largest weight of its matrix; measured only where it is judged."""


MERGED = Allowed(largest_logit_difference=1e-3)
"""Merging an adapter in float32 moves a logit by about 1e-5."""


def receipt(
    one: Any,
    other: Any,
    prompts: Sequence[list[int]],
    *,
    hop: str = "trained -> packaged",
    allowed: Allowed = MERGED,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """Compare two models on what the first answers to each prompt (token ids).

    Returns:
        rows, tokens of each answer, largest difference of a logit, largest KL divergence (nats), share of tokens with
        the same best one, greedy agreement (the share of an answer up to the first token that differs), largest
        difference of a weight where it was asked for, what was allowed.

    Raises:
        StageError: they are further apart than `allowed`, or a number is none.
    """
    import torch

    differences, divergences, agree, shared = [], [], [], []
    with torch.inference_mode():
        for prompt in prompts:
            ids = _answered(one, prompt, tokens)
            one_TV, other_TV = (_logits(model, ids, tokens) for model in (one, other))
            differences.append((one_TV - other_TV).abs().max())
            one_log_TV, other_log_TV = one_TV.log_softmax(-1), other_TV.log_softmax(-1)
            divergences.append((one_log_TV.exp() * (one_log_TV - other_log_TV)).sum(-1).clamp(min=0).max())
            same_T = (one_TV.argmax(-1) == other_TV.argmax(-1)).double()
            agree.append(same_T.mean())
            shared.append(same_T.cumprod(0).mean())
    found = {
        "largest_logit_difference": float(torch.stack(differences).max()),  # a NaN among them is the largest
        "largest_kl": float(torch.stack(divergences).max()),
        "same_best_token": float(torch.stack(agree).mean()),
        "greedy_agreement": float(torch.stack(shared).mean()),
    }
    if allowed.largest_weight_error is not None:
        found["largest_weight_error"] = _weight_error(one, other)
    _judge(found, allowed, hop)
    limits = {key: limit for key, limit in asdict(allowed).items() if limit is not None}
    return {"rows": len(prompts), "tokens": tokens, **found, "allowed": limits}


def _answered(model: Any, prompt: list[int], tokens: int) -> Any:
    """The prompt's ids with a greedy answer behind them; a prompt that leaves no room for one loses its beginning."""
    import torch

    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    begin = prompt[-(room - tokens) :] if room is not None and room > tokens else prompt
    ids = fed = torch.tensor([begin]).to(model.device)
    past = None
    for _ in range(tokens):
        out = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, fed], dim=1)
    return ids


def _logits(model: Any, ids: Any, tokens: int) -> Any:
    """The logits that chose each token of the answer, or would have."""
    out = model(input_ids=ids[:, :-1].to(model.device), use_cache=False, logits_to_keep=tokens)
    return out.logits[0].float().cpu()


def _weight_error(one: Any, other: Any) -> float:
    """The largest difference of a weight, as a share of the largest weight of its matrix."""
    import torch

    others = other.state_dict()
    shares = []
    for name, weight in one.state_dict().items():
        apart, whole = (weight - others[name]).abs().max(), weight.abs().max()
        shares.append(apart / whole if apart != 0 else apart)
    return float(torch.stack(shares).max())


def _judge(found: dict[str, float], allowed: Allowed, hop: str) -> None:
    words = {
        "largest_logit_difference": "a logit differs by",
        "largest_kl": "the KL divergence (nats) at a token is",
        "same_best_token": "the share of tokens with the same best one is",
        "largest_weight_error": "a weight differs, as a share of the largest of its matrix, by",
    }
    for key, said in words.items():
        limit = getattr(allowed, key)
        if limit is None:
            continue
        value = found[key]
        if value >= limit if key == "same_best_token" else value <= limit:  # a NaN is neither
            continue
        bound = "at least" if key == "same_best_token" else "at most"
        raise StageError(
            f"{hop}: it is no longer the same model: {said} {value:.3g} (allowed: {bound} {limit:g}); "
            "nothing was deployed"
        )
