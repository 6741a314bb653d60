"""Several models of one shape trained as one: seeds, exponents of the initialisation, learning rates side by side.

Every parameter is one tensor with an axis of models in front. `torch.vmap` maps the model over that axis, and every
operation underneath folds it into its channels, heads and groups (`mambakit.ops.folding`), so that a device sees one
large call in place of many small ones. Loss, clipping and AdamW are each model's own: the result is that of training
it alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.lab.short_mamba2 import without_states
from mambakit.lab.tasks.batch import IGNORED
from mambakit.training.optimizer import parameter_groups


class GroupedModels:
    """Models of one shape: `logits = grouped(tokens, answers)`, (models, batch, answers, vocabulary).

    Args:
        models: of one class and shape; their parameters are copied.
        loop: run one model after the other in place of `torch.vmap`; a single model always runs so.

    Attributes:
        parameters: by name, (models, ...) each, leaves that the gradient reaches; what a model has frozen stays so.
    """

    def __init__(self, models: Sequence[nn.Module], *, loop: bool = False) -> None:
        self._skeleton, self._stepped = models[0], without_states(models[0])
        self.count, self._loop = len(models), loop or len(models) == 1
        self.parameters: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        of_models = [dict(model.named_parameters()) for model in models]
        for name, parameter in of_models[0].items():
            stacked = torch.stack([parameters[name].detach() for parameters in of_models])
            if parameter.requires_grad:
                self.parameters[name] = stacked.requires_grad_()
            else:
                self._frozen[name] = stacked
        groups = parameter_groups(models[0], 1.0)
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        self.decayed = [id(of_models[0][name]) in decayed for name in self.parameters]
        """Of each parameter, whether weight decay pulls it: matrices and kernels, not rates, biases and norms."""

    def __call__(self, tokens: Tensor, answers: int) -> Tensor:
        """Logits of the last `answers` tokens of every model's own tokens (models, batch, length)."""

        def one(parameters: dict[str, Tensor], own: Tensor) -> Tensor:
            return torch.func.functional_call(self._stepped, parameters, (own, answers))

        stacked = self.parameters | self._frozen
        if not self._loop:
            return torch.vmap(one, randomness="different")(stacked, tokens)
        return torch.stack(
            [one({name: p[index] for name, p in stacked.items()}, tokens[index]) for index in range(self.count)]
        )

    def model(self, index: int) -> nn.Module:
        """The skeleton with the weights of one of the models, valid until the next call."""
        with torch.no_grad():
            for name, parameter in self._skeleton.named_parameters():
                parameter.copy_((self.parameters | self._frozen)[name][index])
        return self._skeleton

    def weights(self, index: int) -> dict[str, Tensor]:
        """One model's parameters by name, on the CPU."""
        return {name: p[index].detach().cpu().clone() for name, p in (self.parameters | self._frozen).items()}


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Every model's mean cross entropy over its answers, (models,), of logits (models, batch, answers, vocabulary)."""
    each = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    asked = (targets != IGNORED).flatten(1)
    return each.view(targets.shape[0], -1).sum(1) / asked.sum(1)


class GroupedAdamW:
    """AdamW (arXiv 1711.05101) over stacked parameters, each model with its own rate, decay and clipping.

    Args:
        parameters: (models, ...) each.
        decayed: of each, whether weight decay pulls it.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        decayed: Sequence[bool],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._parameters, self._decayed, self._betas, self._eps = list(parameters), list(decayed), betas, eps
        self.means = [torch.zeros_like(p) for p in self._parameters]
        self.squares = [torch.zeros_like(p) for p in self._parameters]

    def paces(self, rates: Sequence[Sequence[float]], decays: Sequence[float]) -> Tensor:
        """The numbers of every step, a row each: on the device, so that no step waits for them.

        Args:
            rates: of every step, every model's learning rate.
            decays: every model's weight decay.

        Returns:
            (steps, 2 models + 1): rates over 1 - beta1^number, what decay leaves of a parameter, and
            1 / sqrt(1 - beta2^number), the number being 1 in the first row.
        """
        first, second = self._betas
        rate = torch.tensor(rates, dtype=torch.float64)  # (steps, models)
        number = torch.arange(1, len(rate) + 1, dtype=torch.float64)[:, None]
        kept = 1 - rate * torch.tensor(decays, dtype=torch.float64)
        table = torch.cat([rate / (1 - first**number), kept, (1 - second**number) ** -0.5], dim=1)
        return table.to(self._parameters[0])

    @torch.no_grad()
    def step(self, pace: Tensor, clip: float | None) -> Tensor:
        """Take a step and clear the gradients; return every model's gradient norm, (models,).

        Args:
            pace: its row of `paces`.
            clip: the greatest norm of a model's gradient; None for any.
        """
        rates, kept, root = pace.split([len(pace) // 2, len(pace) // 2, 1])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        if clip is not None:
            # As torch.nn.utils.clip_grad_norm_ does.
            factors = (clip / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, [_spread(factors, grad) for grad in grads])
        first, second = self._betas
        torch._foreach_lerp_(self.means, grads, 1 - first)
        torch._foreach_mul_(self.squares, second)
        torch._foreach_addcmul_(self.squares, grads, grads, 1 - second)
        roots = torch._foreach_sqrt(self.squares)
        torch._foreach_mul_(roots, root.squeeze())
        torch._foreach_add_(roots, self._eps)
        steps = torch._foreach_div(self.means, roots)
        torch._foreach_mul_(steps, [_spread(rates, p) for p in self._parameters])
        pulled = [p for p, decays_it in zip(self._parameters, self._decayed, strict=True) if decays_it]
        if pulled:
            torch._foreach_mul_(pulled, [_spread(kept, p) for p in pulled])
        torch._foreach_sub_(self._parameters, steps)
        for parameter in self._parameters:
            parameter.grad = None
        return norms


def train_step(
    grouped: GroupedModels,
    optimizer: GroupedAdamW,
    tokens: Tensor,
    targets: Tensor,
    pace: Tensor,
    clip: float | None,
) -> Tensor:
    """One step on tokens (models, batch, length) and targets (models, batch, answers); every model's loss, (models,).

    The other arguments are those of `GroupedAdamW.step`.
    """
    found = losses(grouped(tokens, targets.shape[2]), targets)
    found.sum().backward()
    optimizer.step(pace, clip)
    return found.detach()


def seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    """What `make` makes under torch's generator seeded with `seed`, which is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """values (models,) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
