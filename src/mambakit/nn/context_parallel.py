"""One long sequence over several processes: each holds a part of its length, and states are handed on between them.

    parts:     rank 0  x[:, :n]      rank 1  x[:, n:2n]     ...
    forward:   mixer l of rank r starts from the state in which mixer l of rank r - 1 ended
    backward:  the gradient of that state goes back the same way

Outputs and gradients are those of one process. A rank waits for the one before it at every mixer and then works on
while that one is already in the next layer, so that a stack of n layers keeps r ranks busy for n of n + r - 1 turns; a
single mixer is run by one rank after another.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mambakit.nn.attention import Attention
from mambakit.nn.mamba import Mamba
from mambakit.nn.mamba2 import Mamba2
from mambakit.nn.mamba3 import Mamba3
from mambakit.nn.s4d import S4D

_RECURRENT = (Mamba, Mamba2, Mamba3, S4D)


class ContextParallel:
    """Lets the mixers of a model hand their states on from rank to rank, while it is open.

    Every rank calls the model on its part of the sequence, at the same batch size; parts lie in the order of the ranks
    and may differ in length. Only the first rank may give a state to start from, and the state that the last returns is
    that after the whole sequence. Then every rank calls backward on a loss in which its outputs take part (zero times
    their sum, if it has none), and `sum_gradients` makes the gradients of the parameters those of the whole.

    Args:
        model: a mixer, or a module that contains mixers, such as a Backbone or a language model; the same everywhere.
        group: the processes, in the order of the parts; None for all.

    Raises ValueError for a model without recurrent mixers or with attention, whose state grows with the past.

    >>> with ContextParallel(backbone) as ranks:  # doctest: +SKIP
    ...     hidden, state = backbone(ranks.part(x))
    ...     loss(hidden, ranks.part(target)).backward()
    ...     ranks.sum_gradients()
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        if any(isinstance(module, Attention) for module in model.modules()):
            raise ValueError("model has attention, which needs all of the past and no state of a fixed size")
        self._mixers = [module for module in model.modules() if isinstance(module, _RECURRENT)]
        if not self._mixers:
            raise ValueError("model has no mixer that carries a state from one part to the next")
        self.model, self.group = model, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._post = _Post(group)
        self._templates: dict[tuple[int, int, torch.dtype, torch.device], tuple[list[Tensor], Any]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for mixer in self._mixers:
            self._handles.append(mixer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(mixer.register_forward_hook(self._after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            self._post.wait()

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """The part of this rank, of what all ranks have whole."""
        return x.tensor_split(self.size, dim)[self.rank]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of the model's parameters over the ranks; call it after backward."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self.group)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    def _before(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a mixer is called with: its input, and the state that the rank before ended in."""
        x, given = args[0], args[1] if len(args) > 1 else kwargs.get("state")
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens can't be given in parallel: a part of a pack has bounds of its own")
        if self.rank == 0:
            return None
        if given is not None:
            raise ValueError(f"only the first rank may start from a state, and this is rank {self.rank}")
        leaves, form = self._template(mixer, x)
        anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())  # puts the receipt on record
        received = _Receive.apply(anchor, self._post, self.rank - 1, *leaves)
        return (x, tree_unflatten(list(received), form)), {"cu_seqlens": None}

    def _after(self, mixer: nn.Module, args: Any, result: Any) -> Any:
        """Hand the state on; the output carries the duty to take its gradient back."""
        if self.rank == self.size - 1:
            return None
        y, state = result
        return _Send.apply(self._post, self.rank + 1, y, *tree_flatten(state)[0]), state

    def _template(self, mixer: nn.Module, x: Tensor) -> tuple[list[Tensor], Any]:
        """Tensors of the shapes and dtypes of the mixer's state, and its form."""
        key = (id(mixer), x.shape[0], x.dtype, x.device)
        if key not in self._templates:
            forward: Callable[..., Any] = type(mixer).forward  # past the hooks
            with torch.no_grad():
                leaves, form = tree_flatten(forward(mixer, x[:, :0])[1])
            self._templates[key] = [torch.empty_like(leaf) for leaf in leaves], form
        return self._templates[key]


class _Post:
    """Tensors on their way to other ranks."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, tensor: Tensor, rank: int) -> None:
        """Start on the way; the tensor is kept until it has arrived."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, group=self.group, group_dst=rank)
        self._sent.append((work, tensor))

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """The next tensor from there."""
        tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(tensor, group=self.group, group_src=rank)
        return tensor

    def wait(self) -> None:
        """Until all have arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, post: _Post, rank: int, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.post, ctx.rank = post, rank
        return tuple(post.receive(leaf, rank) for leaf in like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        for grad in grads:
            ctx.post.send(grad, ctx.rank)
        return (None,) * (3 + len(grads))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, post: _Post, rank: int, y: Tensor, *leaves: Tensor) -> Tensor:
        ctx.post, ctx.rank = post, rank
        ctx.like = [torch.empty_like(leaf, device="meta") for leaf in leaves]
        ctx.device = y.device
        for leaf in leaves:
            post.send(leaf, rank)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        like = (torch.empty_like(leaf, device=ctx.device) for leaf in ctx.like)
        return None, None, grad_y, *(ctx.post.receive(leaf, ctx.rank) for leaf in like)
