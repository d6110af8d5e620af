"""Next-token loss of the M-step."""

from __future__ import annotations

import torch


def next_token_loss(
    token_logps_n: torch.Tensor, is_latent_n: torch.Tensor, num_tokens: torch.Tensor | float, loss_type: str = "nll"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Averages cross-entropy over code and latent tokens alike, `num_tokens` in the whole accumulation window.

    With `loss_type="dft"` each token counts by its own probability, see https://huggingface.co/papers/2508.05629.
    Returns the loss and the sums and counts that `mstep/code_loss` and `mstep/latent_loss` are averages of.

    >>> loss, parts = next_token_loss(torch.tensor([-1.0, -2.0]), torch.tensor([False, True]), num_tokens=4)
    >>> float(loss), float(parts["latent_sum"])
    (0.75, 2.0)
    """
    nll = -token_logps_n
    parts = {
        "code_sum": nll[~is_latent_n].sum().detach(),
        "code_count": (~is_latent_n).sum(),
        "latent_sum": nll[is_latent_n].sum().detach(),
        "latent_count": is_latent_n.sum(),
    }
    if loss_type == "dft":
        nll = nll * token_logps_n.exp().detach()
    return nll.sum() / num_tokens, parts
