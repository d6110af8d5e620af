"""The abstraction head: whether to think at an action boundary, and what thinking would bring.

It reads the last hidden state at the boundary, detached: it never changes the language model, whose weights are the
same with a head and without. Its two files travel beside a plain checkpoint.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import find_file, naming, read_versioned, require_form


HEAD_WEIGHTS, HEAD_CONFIG = "abstraction_head.safetensors", "abstraction_config.json"
VERSION = 1
_WIDTH = 128


@dataclass(frozen=True)
class AbstractionConfig:
    """
    Describes an [`AbstractionHead`]; written to `abstraction_config.json` with a format version.

    Raises:
        `ValueError`: for a size below 1 or a probability that is not between 0 and 1.
    """

    hidden_size: int  # width of the hidden states that the model's own head reads
    think_prob: float = 0.3  # P(think) of a fresh head, everywhere
    action_format: str = "python"  # where its boundaries stand and what opens a latent there
    max_latent_length: int = 12  # most tokens of a latent
    trained_on: int = 0  # boundaries it has learned from; 0 is a fresh head

    def __post_init__(self) -> None:
        bounds = {"hidden_size": (1, 1 << 17), "max_latent_length": (1, 1 << 16), "trained_on": (0, 1 << 62)}
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"`{name}` of the abstraction head is {getattr(self, name)}; use a number from {least} to {most}."
                )
        if not 0 < self.think_prob < 1:
            raise ValueError(f"`think_prob` of the abstraction head is {self.think_prob}; use a number in (0, 1).")


class AbstractionHead(nn.Module):
    """
    Reads a gate, the gain of thinking and its spread over latents off hidden states `[..., hidden_size]`.

    The states are detached and normalised to unit variance; one hidden layer of 128 units follows. A fresh head gives
    `think_prob`, a gain of 0 and a spread of 0.7 everywhere; making one leaves the random number generators alone.
    """

    def __init__(self, config: AbstractionConfig):
        super().__init__()
        self.config = config
        self.inner = nn.utils.skip_init(nn.Linear, config.hidden_size, _WIDTH)
        self.outer = nn.utils.skip_init(nn.Linear, _WIDTH, 3)
        bound = config.hidden_size**-0.5
        with torch.no_grad():
            self.inner.weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
            self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.copy_(torch.tensor([math.log(config.think_prob / (1 - config.think_prob)), 0.0, 0.0]))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Foretells `think_logits`, the log-odds of thinking at these states; `gain`, the expected rise of the next
        lines' log-likelihood in nats; `spread`, the standard deviation of the gain over latents; `[...]` each. All in
        the weights' own precision, inside autocast too."""
        states = states.detach().to(self.inner.weight)
        with torch.autocast(states.device.type, enabled=False):
            states = nn.functional.layer_norm(states, (self.config.hidden_size,))
            think_logits, gain, spread = self.outer(nn.functional.silu(self.inner(states))).unbind(-1)
            return think_logits, gain, nn.functional.softplus(spread)

    def trained_on(self, boundaries: int) -> None:
        """Notes that it has learned from so many boundaries more."""
        self.config = replace(self.config, trained_on=self.config.trained_on + boundaries)


def save_head(head: AbstractionHead, folder: str | Path) -> None:
    """Writes `abstraction_head.safetensors` and `abstraction_config.json` into `folder`, one that nobody reads yet
    ([`~ra3_trl.files.written_aside`])."""
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
    (folder / HEAD_CONFIG).write_text(json.dumps({"version": VERSION} | asdict(head.config), indent=2) + "\n")


def load_head(name: str, hidden_size: int | None = None, **place: Any) -> AbstractionHead | None:
    """Loads the abstraction head of a checkpoint, a folder or a Hub id (`place` as for [`~ra3_trl.files.find_file`]);
    `None` where it has none. `hidden_size` is the width of the model's hidden states, to be checked.

    Raises:
        `ValueError`: for files that are damaged, of a newer version, of another hidden size, or one without the other,
            and for weights that are not finite.
    """
    config_file, weights = find_file(name, HEAD_CONFIG, **place), find_file(name, HEAD_WEIGHTS, **place)
    if config_file is None and weights is None:
        return None
    cure = "take another revision, or delete both files to start with a fresh head"
    if config_file is None or weights is None:
        missing, there = (HEAD_WEIGHTS, HEAD_CONFIG) if weights is None else (HEAD_CONFIG, HEAD_WEIGHTS)
        raise ValueError(f"{missing} of {name!r} is missing beside its {there}; {cure}.")
    with read_versioned(config_file, name, VERSION, cure) as values:
        hints = get_type_hints(AbstractionConfig)
        own = {name: value for name, value in values.items() if name in hints}
        require_form(own, {name: hints[name] for name in own})
        try:
            config = AbstractionConfig(**own)
        except ValueError as error:
            raise ValueError(f"{HEAD_CONFIG} of {name!r}: {error} Or {cure}.") from error
    if hidden_size not in (None, config.hidden_size):
        raise ValueError(
            f"`hidden_size` of the abstraction head of {name!r} is {config.hidden_size}, and the model's hidden "
            f"states have {hidden_size} numbers: it is another model's; {cure}."
        )
    head = AbstractionHead(config)
    with naming(f"{HEAD_WEIGHTS} of {name!r}", cure, RuntimeError, ValueError):
        head.load_state_dict(load_file(weights))
    if not all(bool(tensor.isfinite().all()) for tensor in head.state_dict().values()):
        raise ValueError(f"{HEAD_WEIGHTS} of {name!r} holds numbers that are not finite; {cure}.")
    return head
