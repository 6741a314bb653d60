"""The selective scan in chunks of plain PyTorch, for devices that no compiled backend serves.

Within a chunk all states are formed at once by doubling (Hillis and Steele): after k rounds every step holds the
composition of the 2^k affine maps h -> a h + b that end in it. Chunks follow one another. Only products of decays are
formed, never quotients, so nothing overflows that the definition does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import CHUNK, ScanInputs
from mambakit.ops.portable.spans import Span, spans


def forward(inputs: ScanInputs, y: Tensor, final_state: Tensor, checkpoints: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every `CHUNK`-th step."""
    D, z, state = inputs.D, inputs.z, inputs.initial_state
    final_state.copy_(torch.zeros_like(final_state) if state is None else state)
    for span in _spans(inputs):
        h = final_state[span.states]
        if checkpoints.shape[0]:
            checkpoints[span.slots] = h.transpose(1, 2)
        c = _Chunk(span, inputs, h)
        out = (c.after * c.C).sum(-1)
        if D is not None:
            out = out + D * c.u
        if z is not None:
            out = out * F.silu(span.rows(z).to(out.dtype))
        span.rows(y).copy_(out)
        final_state[span.states] = c.after[:, -1]


def backward(
    inputs: ScanInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: ScanInputs
) -> None:
    """Fill `grads`."""
    A, D, z, (checkpoints,) = inputs.A, inputs.D, inputs.z, kept
    for parameter in (grads.A, grads.D, grads.delta_bias):
        if parameter is not None:
            parameter.zero_()
    carry = grad_final_state.clone()  # of the state after the chunk at hand
    for span in reversed(_spans(inputs)):
        c = _Chunk(span, inputs, checkpoints[span.slots].transpose(1, 2))
        dy = span.rows(grad_y).to(A.dtype)
        if z is not None and grads.z is not None:
            gate = span.rows(z).to(A.dtype)
            on = torch.sigmoid(gate)
            y = (c.after * c.C).sum(-1) + (0 if D is None else D * c.u)
            span.rows(grads.z).copy_(dy * y * on * (1 + gate * (1 - on)))
            dy = dy * gate * on

        # g_t = C_t dy_t + a_{t+1} g_{t+1}: the same recurrence, backwards.
        sources = dy[..., None] * c.C
        sources[:, -1] += carry[span.states]
        later_decay = torch.cat([c.decay[:, 1:], torch.ones_like(c.decay[:, :1])], dim=1)
        g = _scan(later_decay.flip(1), sources.flip(1)).flip(1)
        kept_state = g * c.decay * c.before
        along_B = (g * c.B).sum(-1)

        ddt = ((kept_state * A).sum(-1) + along_B * c.u) * c.slope
        span.rows(grads.u).copy_(along_B * c.dt + (0 if D is None else dy * D))
        span.rows(grads.delta).copy_(ddt)
        span.rows(grads.B).copy_(c.per_group(g * (c.dt * c.u)[..., None]))
        span.rows(grads.C).copy_(c.per_group(dy[..., None] * c.after))
        grads.A.add_((kept_state * c.dt[..., None]).sum((0, 1)))
        if grads.D is not None:
            grads.D.add_((dy * c.u).sum((0, 1)))
        if grads.delta_bias is not None:
            grads.delta_bias.add_(ddt.sum((0, 1)))
        carry[span.states] = c.decay[:, 0] * g[:, 0]
    if grads.initial_state is not None:
        grads.initial_state.copy_(carry)


def _spans(inputs: ScanInputs) -> list[Span]:
    batch, length, _ = inputs.u.shape
    return spans(batch, length, inputs.cu_seqlens, CHUNK)


class _Chunk:
    """The inputs of a chunk in the accumulation dtype and its states, all (batch, steps, dim[, state])."""

    def __init__(self, span: Span, inputs: ScanInputs, h: Tensor) -> None:
        u, delta, A, B, C = inputs[:5]
        self.groups, self.share = B.shape[2], u.shape[2] // B.shape[2]
        self.u = span.rows(u).to(A.dtype)
        raw = span.rows(delta).to(A.dtype)
        if inputs.delta_bias is not None:
            raw = raw + inputs.delta_bias
        self.dt = F.softplus(raw) if inputs.delta_softplus else raw
        self.slope: Tensor | float = torch.sigmoid(raw) if inputs.delta_softplus else 1.0
        self.B, self.C = (span.rows(t).to(A.dtype).repeat_interleave(self.share, dim=2) for t in (B, C))
        self.decay = torch.exp(self.dt[..., None] * A)
        sources = (self.dt * self.u)[..., None] * self.B
        sources[:, 0] += self.decay[:, 0] * h
        self.after = _scan(self.decay, sources)
        self.before = torch.cat([h[:, None], self.after[:, :-1]], dim=1)

    def per_group(self, x: Tensor) -> Tensor:
        """(batch, steps, dim, state) summed over the channels of each group: (batch, steps, groups, state)."""
        return x.unflatten(2, (self.groups, self.share)).sum(3)


def _scan(decay: Tensor, sources: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + sources_t from h = 0, along axis 1, in log2(steps) rounds."""
    steps, reach = sources.shape[1], 1
    while reach < steps:
        sources = torch.cat([sources[:, :reach], sources[:, reach:] + decay[:, reach:] * sources[:, :-reach]], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
        reach *= 2
    return sources
