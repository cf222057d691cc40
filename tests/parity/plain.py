"""Fine-tuning a client by hand: transformers, stock PEFT, a torch optimizer and a for loop.

Written without pfl-lm's training code, to be what its turns are compared with. Only the batches are
taken from it, since their order is a choice and not a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class PlainClient:
    """A model of its own for one client; its LoRA numbers are ``w``, flat, in PEFT's order."""

    def __init__(
        self,
        model_dir: Path,
        start: Tensor,
        *,
        dropout: float = 0.0,
        r: int = 8,
        modules: tuple[str, ...] = ("q_proj", "v_proj"),
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = LoraConfig(
            r=r,
            lora_alpha=2 * r,
            lora_dropout=dropout,
            target_modules=list(modules),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.w = start

    @property
    def w(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    @w.setter
    def w(self, vector: Tensor) -> None:
        nn.utils.vector_to_parameters(vector.clone(), self.parameters)

    def gradient(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the gradient of the batch's mean token loss, and leave it in ``.grad`` too."""
        for parameter in self.parameters:
            parameter.grad = None
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            batch["labels"][:, 1:].reshape(-1),
            ignore_index=-100,
            reduction="sum",
        )
        (loss / batch["window_tokens"]).backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        return torch.cat([grad.reshape(-1) for grad in grads])

    def fit(self, batches: Iterable[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> Tensor:
        """Take one optimizer step a batch."""
        for batch in batches:
            self.gradient(batch)
            optimizer.step()
        return self.w

    def matrices(self, vector: Tensor) -> Iterator[Tensor]:
        """Yield the part of each LoRA matrix, as a view."""
        at = 0
        for parameter in self.parameters:
            yield vector[at : at + parameter.numel()]
            at += parameter.numel()


def algorithm_1(
    client: PlainClient,
    memory: dict[str, Tensor],
    global_weights: Tensor,
    batches: list[Mapping[str, Any]],
    step: Callable[[Tensor, Tensor], Tensor],
    *,
    beta: float = 0.9,
) -> Tensor:
    """Run one round of pFLAlign on one client, in float64, as the paper writes it (ε = 0).

    ``memory`` holds v, P and Δ between rounds. ``step(P, g)`` is the change of w before the
    correction: ``-η P ⊙ g`` in the published form.
    """
    d, steps = len(global_weights), len(batches)
    zero = torch.zeros(d, dtype=torch.float64)
    v, P, offset = (memory.get(name, zero).clone() for name in ("v", "P", "offset"))
    m = zero.clone()
    w = global_weights.double() + offset
    for batch in batches:
        client.w = w.float()
        g = client.gradient(batch).double()
        m = beta * m + (1 - beta) * g
        v = beta * v + (1 - beta) * g * g
        seen = v > 0
        alpha = torch.where(seen, 1 - (1 - beta) * g * g / v.where(seen, zero + 1), zero)
        P = torch.where(seen, alpha * P + (1 - beta) * m * m / v.where(seen, zero + 1), zero)
        variance = (v - m * m).clamp(min=0)
        z = torch.where(m == 0, zero, m.abs() / (2 * variance).sqrt())
        gamma = 0.5 - 0.5 * torch.erf(z) * torch.sign(-m * offset)
        w = w + step(P, g) - gamma * offset / steps
    memory.update(v=v, P=P, offset=w - global_weights.double())
    return w
