"""Is what was written what was trained? Logits of the trained model against those of the package, on real prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunewright.errors import StageError

THRESHOLD = 1e-3
"""Largest allowed difference of a logit. Merging an adapter in float32 moves them by about 1e-5."""


def receipt(trained: Any, packaged: Any, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Compare the next-token logits of two models after each prompt (token ids).

    Returns:
        rows, largest difference of a logit, largest KL divergence (nats), share of rows with the same best token.

    Raises:
        StageError: they differ by more than `THRESHOLD`.
    """
    import torch

    differences, divergences, agree = [], [], 0
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            one_V, other_V = (
                model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()
                for model in (trained, packaged)
            )
            differences.append((one_V - other_V).abs().max())
            one_log_V, other_log_V = one_V.log_softmax(-1), other_V.log_softmax(-1)
            divergences.append((one_log_V.exp() * (one_log_V - other_log_V)).sum().clamp(min=0))
            agree += int(one_V.argmax() == other_V.argmax())
    largest = float(torch.stack(differences).max())  # a NaN among them is the largest
    found = {
        "rows": len(prompts),
        "largest_logit_difference": largest,
        "largest_kl": float(torch.stack(divergences).max()),
        "same_best_token": agree / len(prompts),
        "threshold": THRESHOLD,
    }
    if not largest <= THRESHOLD:
        raise StageError(
            f"the packaged model is not the trained one: a logit differs by {largest:.3g} (allowed: {THRESHOLD}); "
            "nothing was deployed"
        )
    return found
