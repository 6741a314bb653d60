"""Several models of one shape trained as one: seeds, exponents of the initialisation, learning rates side by side.

Every parameter is one tensor with an axis of models in front. `torch.vmap` maps the model over that axis, and every
operation underneath folds it into its channels, heads and groups (`mambakit.ops.folding`), so that a device sees one
large call in place of many small ones. On a GPU stacks of Mamba-2 over a few tokens have kernels of their own
(`lab.short_mamba2`). Loss, clipping and AdamW are each model's own: the result is that of training it alone.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambakit.lab import short_mamba2
from mambakit.lab.models import MambaForComposite
from mambakit.lab.tasks.batch import IGNORED
from mambakit.training.optimizer import parameter_groups

_SHARED = (
    threading.RLock()
)  # held by the run that uses what threads of a process share: torch's generator, its switches


class GroupedModels:
    """Models of one shape: `logits = grouped(tokens, answers)`, (models, batch, answers, vocabulary).

    Args:
        models: of one class and shape; their parameters are copied.
        loop: run one model after the other in place of `torch.vmap`; a single model always runs so.

    Attributes:
        parameters: by name, (models, ...) each, leaves that the gradient reaches; what a model has frozen stays so.
    """

    def __init__(self, models: Sequence[nn.Module], *, loop: bool = False) -> None:
        self._skeleton = models[0]
        self.count, self._loop, self._by_kernels = len(models), loop or len(models) == 1, not loop
        of_models = [dict(model.named_parameters()) for model in models]
        trained = [name for name, parameter in of_models[0].items() if parameter.requires_grad]
        self.flat = torch.stack([torch.cat([own[name].detach().flatten() for name in trained]) for own in of_models])
        """All that is trained, (models, numbers): `parameters` are views of it."""
        self.parameters: dict[str, Tensor] = {}
        sizes = [of_models[0][name].numel() for name in trained]
        for name, part in zip(trained, self.flat.split(sizes, dim=1), strict=True):
            self.parameters[name] = part.unflatten(1, of_models[0][name].shape or (1,)).requires_grad_()
        self._frozen = {
            name: torch.stack([own[name].detach() for own in of_models])
            for name in of_models[0]
            if name not in self.parameters
        }
        groups = parameter_groups(models[0], 1.0)
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        self.decayed = torch.cat(
            [
                torch.full((size,), float(id(of_models[0][name]) in decayed))
                for name, size in zip(trained, sizes, strict=True)
            ]
        ).to(self.flat)
        """1 where weight decay pulls a number of `flat`, in matrices and kernels; 0 in rates, biases and norms."""

    def __call__(self, tokens: Tensor, answers: int) -> Tensor:
        """Logits of the last `answers` tokens of every model's own tokens (models, batch, length)."""

        def one(parameters: dict[str, Tensor], own: Tensor) -> Tensor:
            return torch.func.functional_call(self._skeleton, parameters, (own, answers))

        stacked = self.parameters | self._frozen
        if self._by_kernels and short_mamba2.serves(self._skeleton, tokens):
            return short_mamba2.logits(cast(MambaForComposite, self._skeleton), stacked, tokens, answers)
        if not self._loop:
            with _plain_attention():
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


_switched: list[contextlib.ExitStack] = []  # what turns attention back, for each run inside


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention written out: the fused one has no rule for vmap, and on a GPU its gradient then refuses the strides.

    A switch of the process: the first run in turns it, the last out turns it back.
    """
    with _SHARED:
        turned = _switched[0] if _switched else contextlib.ExitStack()
        if not _switched:
            turned.enter_context(sdpa_kernel(SDPBackend.MATH))
        _switched.append(turned)
    try:
        yield
    finally:
        with _SHARED:
            _switched.pop()
            if not _switched:
                turned.close()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Every model's mean cross entropy over its answers, (models,), of logits (models, batch, answers, vocabulary)."""
    each = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    asked = (targets != IGNORED).flatten(1)
    return each.view(targets.shape[0], -1).sum(1) / asked.sum(1)


class GroupedAdamW:
    """AdamW (arXiv 1711.05101) over stacked parameters, each model with its own rate, decay and clipping.

    Args:
        grouped: whose parameters are trained.
        betas, eps: AdamW's.

    Attributes:
        means, squares: of the gradients, (models, numbers) as `grouped.flat`.
    """

    def __init__(self, grouped: GroupedModels, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._grouped, self._betas, self._eps = grouped, betas, eps
        self.means, self.squares = torch.zeros_like(grouped.flat), torch.zeros_like(grouped.flat)

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
        return table.to(self._grouped.flat)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], pace: Tensor, clip: float | None) -> Tensor:
        """Take a step; return every model's gradient norm, (models,).

        Args:
            gradients: of `grouped.parameters`, in their order; None for zeros.
            pace: its row of `paces`.
            clip: the greatest norm of a model's gradient; None for any.
        """
        rates, kept, root = pace.split([len(pace) // 2, len(pace) // 2, 1])
        found = zip(self._grouped.parameters.values(), gradients, strict=True)
        grad = torch.cat([(torch.zeros_like(p) if own is None else own).flatten(1) for p, own in found], dim=1)
        norms = grad.square().sum(1).sqrt()
        if clip is not None:
            # As torch.nn.utils.clip_grad_norm_ does.
            grad *= (clip / (norms + 1e-6)).clamp(max=1.0)[:, None]
        first, second = self._betas
        self.means.lerp_(grad, 1 - first)
        self.squares.mul_(second).addcmul_(grad, grad, value=1 - second)
        step = self.means / (self.squares.sqrt() * root + self._eps) * rates[:, None]
        self._grouped.flat.mul_(1 - self._grouped.decayed * (1 - kept[:, None])).sub_(step)
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

    `pace` and `clip` are those of `GroupedAdamW.step`.
    """
    found = losses(grouped(tokens, targets.shape[2]), targets)
    # Not `backward`, which copies a gradient for each parameter that is a part of a larger tensor.
    gradients = torch.autograd.grad(found.sum(), list(grouped.parameters.values()), allow_unused=True)
    optimizer.step(gradients, pace, clip)
    return found.detach()


def seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    """What `make` makes under torch's generator seeded with `seed`, which is as it was afterwards.

    Threads share that generator: one makes at a time.
    """
    with _SHARED, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
