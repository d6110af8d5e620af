"""Hidden states and the language-model head, apart, so that logits exist only where they are wanted.

`log pi` of one token needs one row of logits reduced to two numbers; a full log-softmax over the vocabulary at every
position took two thirds of the time in the prototype.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .logps import Targets, linear_logps, rows_at_once, token_numbers
from .sharding import gathered, is_fsdp2, is_zero3, reshard_layers_only


_LOCK = threading.Lock()
_INSIDE: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # [how many are inside, their modes before]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` into evaluation mode inside, and each of its modules back into its own mode outside. Of several
    threads inside at once the last to leave does the latter.

    Layers of quantized weights are in training mode inside: they do the same in both, but bitsandbytes' 4-bit layers
    pack their weights anew on a CPU when they evaluate, with scales rounded to bfloat16, and training goes on with
    what is left.
    """
    with _LOCK:
        state = _INSIDE.setdefault(model, [0, {}])
        state[0] += 1
        for module in model.modules():
            state[1].setdefault(module, module.training)
            module.training = _holds_quantized(module)
    try:
        yield
    finally:
        with _LOCK:
            state[0] -= 1
            if not state[0]:
                del _INSIDE[model]
                for module, training in state[1].items():
                    module.training = training


def _holds_quantized(module: nn.Module) -> bool:
    """Whether weights of the module itself are stored as whole numbers, whatever type they travel in."""
    return any(not p.is_floating_point() or "quant_state" in vars(p) for p in module.parameters(recurse=False))


class Backbone:
    """Splits a causal language model into its two halves.

    The model is not wrapped for several processes (sharded in place by FSDP2 it is the same object). Without a
    `router_aux_loss_coef` a mixture of experts has the weight of its own config on its router loss.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, router_aux_loss_coef: float | None = None):
        self.model = model
        causal_lm = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.causal_lm = causal_lm
        self.decoder: nn.Module = causal_lm.base_model
        if self.decoder is causal_lm:
            raise ValueError(
                f"`model` is a {type(causal_lm).__name__}, which does not keep its decoder apart from its head; use "
                "another architecture."
            )
        forward = inspect.signature(causal_lm.forward).parameters
        self._one_logit = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        config = causal_lm.config.get_text_config().to_dict()
        default = config.get("router_aux_loss_coef") if "output_router_logits" in forward else None
        self._router_coef = (default or 0.0) if router_aux_loss_coef is None else router_aux_loss_coef
        if self._router_coef and default is None:
            raise ValueError(
                f"`router_aux_loss_coef` is {router_aux_loss_coef}, but {type(causal_lm).__name__} has no router "
                "loss; leave it out."
            )
        self.packs = True  # whether documents of one row do not see each other, see `em/packing.py`
        self._takes_more = any(p.kind is p.VAR_KEYWORD for p in forward.values())
        self.aux_loss: torch.Tensor | None = None  # of the routers in the last forward, not weighted
        self._settled = False  # whether FSDP2 has been told which weights to keep between forwards
        self._divide = config.get("logits_scaling") or 1.0  # Granite
        self._multiply = config.get("logit_scale") or 1.0  # Cohere
        self._softcap = config.get("final_logit_softcapping")  # Gemma 2
        # Whether logits are more than a product with a matrix of plain numbers.
        self._bends = bool(self._softcap or config.get("quantization_config"))

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def vocab_size(self) -> int:
        weight = self.causal_lm.get_output_embeddings().weight
        return getattr(weight, "ds_shape", weight.shape)[0]  # of ZeRO-3 a process has a part of the matrix only

    @property
    def wants_flat_rows(self) -> bool:
        """Flash attention keeps packed documents apart in a batch of one row only; a router loss counts padding."""
        return bool(self._router_coef) or self._flash

    @property
    def reads_lengths(self) -> bool:
        """Whether attention reads the lengths of documents in a flat row, as flash attention does."""
        return self._flash and self._takes_more

    @property
    def _flash(self) -> bool:
        return "flash" in (self.causal_lm.config._attn_implementation or "")

    def hidden(self, through: nn.Module | None = None, **inputs: Any) -> torch.Tensor:
        """Last hidden states `[rows, L, hidden_size]`; with gradients also the router loss, see [`Backbone.run`]."""
        return self.run(inputs, through, routed=torch.is_grad_enabled())[0]

    def run(
        self, inputs: dict[str, Any], through: nn.Module | None = None, routed: bool = True, whole: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Last hidden states `[rows, L, hidden_size]`, and what the model's own forward returns, if the `whole` of it
        is wanted, with all logits. `routed`: the router loss of a mixture of experts is kept too.

        `through` is the wrapped model whose forward must be the one that runs (DDP arms its gradient reduction there);
        the hidden states are then caught on their way to the head. So they are where the router loss is wanted, which
        the model's own forward computes, and where FSDP2 gathers weights in that forward.
        """
        self.aux_loss = None
        routed = bool(self._router_coef) and routed
        fsdp2 = is_fsdp2(self.model)
        if through is None and not routed and not fsdp2 and not whole:
            return self.decoder(**{"use_cache": False} | inputs)[0], None
        if fsdp2 and not self._settled:
            reshard_layers_only(self.model)
            self._settled = True
        caught: list[torch.Tensor] = []
        inner = getattr(self.decoder, "decoder", self.decoder)  # OPT's forward goes past the outer one
        handle = inner.register_forward_hook(lambda module, args, output: caught.append(output[0]))
        options = ({} if whole else self._one_logit) | ({"output_router_logits": True} if routed else {})
        try:
            output = (through or self.model)(**{"use_cache": False} | options | inputs)
        finally:
            handle.remove()
        if routed:
            self.aux_loss = output.aux_loss
        return caught[0], output if whole else None

    @property
    def router_loss(self) -> torch.Tensor | None:
        """The weighted router loss of the last forward, where it was wanted and there is one."""
        return None if self.aux_loss is None else self._router_coef * self.aux_loss

    def idle(self, through: nn.Module | None = None, heads: int = 1) -> torch.Tensor:
        """Makes a loss of 0 that depends on every weight: the forward of a process that has nothing to learn from, so
        that all processes do the same number of them. `heads`: how often others apply the head behind it."""
        hidden = self.hidden(through, input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))[0]
        router = 0.0 if self.router_loss is None else self.router_loss
        target = torch.zeros(1, dtype=torch.long, device=hidden.device)
        logps = sum(self.token_logps(hidden, target).sum() for _ in range(heads))
        return 0.0 * (hidden.float().sum() + logps + router)

    def gathered(self) -> AbstractContextManager[None]:
        """Gives every process the whole weights inside, see [`~ra3_trl.rollout.sharding.gathered`]."""
        self._settled = True
        return gathered(self.model)

    def logits(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        """Logits `[n, V]` in float32 of hidden states `[n, hidden_size]`."""
        head = self.causal_lm.get_output_embeddings()
        # Not as a module of FSDP2, whose hooks count on one call within the model's forward.
        logits = (head.forward if is_fsdp2(self.model) else head)(hidden_nD).float()
        if self._divide != 1.0 or self._multiply != 1.0:
            logits = logits * (self._multiply / self._divide)
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @property
    def matrix(self) -> nn.Parameter | None:
        """The head's weight, where the head is that matrix and nothing else; else `None`."""
        head = self.causal_lm.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None or isinstance(head.weight, DTensor) or self._bends:
            return None
        hooked = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
        return None if hooked or is_fsdp2(self.model) or is_zero3(self.model) else head.weight

    def chunked(
        self, hidden_nD: torch.Tensor, reduce: Callable, *per_row: torch.Tensor, row_n: np.ndarray | None = None
    ) -> list[torch.Tensor]:
        """`reduce(logits_chunk, *per_row_chunk) -> tuple of [rows] tensors` over bounded chunks of rows, joined.

        `row_n` are the rows of hidden states that are wanted, if not each once: of equal ones logits are made once.
        With gradients each chunk is recomputed in the backward pass, so that never more than one chunk of logits is
        alive.
        """
        rows = rows_at_once(self.device, self.vocab_size)
        if torch.is_grad_enabled() and is_zero3(self.model):  # each call of the head gathers: one on every process
            rows = max(1, len(hidden_nD))

        def run(hidden: torch.Tensor, which: torch.Tensor | None, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self.logits(hidden)
            return reduce(logits if which is None else logits[which], *rest)

        chunks = []
        for i in range(0, max(1, len(hidden_nD) if row_n is None else len(row_n)), rows):
            hidden, which = hidden_nD[i : i + rows], None
            if row_n is not None:
                wanted, inverse = np.unique(row_n[i : i + rows], return_inverse=True)
                hidden = hidden_nD[torch.from_numpy(wanted)]
                which = None if np.array_equal(inverse, np.arange(len(wanted))) else torch.from_numpy(inverse)
            chunk: Any = (hidden, which, *(p[i : i + rows] for p in per_row))
            grad = torch.is_grad_enabled()
            chunks.append(checkpoint(run, *chunk, use_reentrant=False) if grad else run(*chunk))
        return [torch.cat(column) for column in zip(*chunks, strict=True)]

    def matrix_logps(self, hidden_nD: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Log-probs `[n]` of targets under a head that is a `matrix`; no logits are kept."""
        assert self.matrix is not None
        rows, scale = rows_at_once(self.device, self.vocab_size), self._multiply / self._divide
        return linear_logps(hidden_nD, self.matrix, targets, rows, scale)[0]

    def token_logps(self, hidden_nD: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        """`log pi(target)` `[n]` under the model's own distribution (temperature 1, nothing forbidden)."""
        if self.matrix is None:
            return self.chunked(hidden_nD, _gather_logps, targets_n)[0]
        return self.matrix_logps(hidden_nD, Targets.of_tokens(targets_n))

    def token_numbers(self, hidden_nD: torch.Tensor, targets_n: torch.Tensor) -> list[torch.Tensor]:
        """`token_logps`, and for the log the entropies and whether each target is the likeliest token, `[n]` each."""
        if self.matrix is None:
            return self.chunked(hidden_nD, token_numbers, targets_n)
        rows, scale = rows_at_once(self.device, self.vocab_size), self._multiply / self._divide
        return [*linear_logps(hidden_nD, self.matrix, Targets.of_tokens(targets_n), rows, scale, watched=True)]


def _gather_logps(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor]:
    return (logits_nV.gather(-1, targets_n[:, None])[:, 0] - torch.logsumexp(logits_nV, -1),)
