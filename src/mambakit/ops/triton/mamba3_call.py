"""One call of the Mamba-3 scan on the GPU: its inputs as the kernels take them, and what both passes launch."""

import torch
from torch import Tensor

from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.triton import mamba3_shapes
from mambakit.ops.triton.launch import float32_products
from mambakit.ops.triton.mamba3_launches import Layout, launches
from mambakit.ops.triton.mamba3_shapes import Sizes
from mambakit.ops.triton.state_passing import pass_states


class Scan:
    """The inputs as the kernels take them, and the launches that both passes share.

    Args:
        inputs: of the scan.
        short: whether chunks may have fewer rows than products with a state take: `mamba3_shapes.sizes`.
    """

    def __init__(self, inputs: WholeScanInputs, short: bool = True) -> None:
        size = self.size = mamba3_shapes.sizes(inputs, short)
        self.wide = inputs.log_decay
        self.x, self.B, self.C = (_whole_rows(t) for t in (inputs.x, inputs.B, inputs.C))
        self.z = None if inputs.z is None else _whole_rows(inputs.z)
        self.log_decay, self.scale, self.own = (t.contiguous() for t in (inputs.log_decay, inputs.scale, inputs.own))
        self.D = inputs.D
        self.up, self.gate, self.down, self.B_bias, self.C_bias, self.speeds, self.steps, self.angle, self.state = (
            None if t is None else t.contiguous()
            for t in (
                inputs.up, inputs.gate, inputs.down, inputs.B_bias, inputs.C_bias, inputs.speeds, inputs.steps,
                inputs.initial_angle, inputs.initial_state,
            )
        )  # fmt: skip
        self.bounds = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()
        self.sequence_of_slot = _sequence_of_slot(self.bounds, size)
        self.stored = mamba3_shapes.stored_dtype(inputs)
        rows = 1 if size.length > 1 else 0  # the axis along which rows follow each other
        z_stride = 0 if self.z is None else self.z.stride(rows)
        self.layout = Layout(
            size,
            inputs.x.dtype,
            float32_products(),
            speed_heads=1 if self.speeds is None else self.speeds.shape[2],
            interleaved=inputs.interleaved,
            ranked=inputs.down is None,
            fresh=self.state is None,
            row_strides=(self.x.stride(rows), self.B.stride(rows), self.C.stride(rows), z_stride),
            D_strides=(0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1)),
        )  # fmt: skip
        self.launches = launches(self.layout)
        self.runs = self.wide.new_empty(4, size.slots, size.heads, size.steps)

    def prepare(self, turns: Tensor | None) -> None:
        """Fill the runs, and with `turns` how far each chunk turns."""
        if self.size.slots and self.size.heads:
            speeds = None if turns is None else self.speeds
            self.launches.prepare(
                self.log_decay, self.scale, self.own, self.runs, speeds, self.steps, turns,
                self.bounds, self.sequence_of_slot,
            )  # fmt: skip

    def carry_turns(self, carries: Tensor) -> None:
        """Turn what each chunk turns by into the angles before it."""
        if self.size.slots and self.size.heads:
            self.launches.carry_turns(carries, self.angle, self.bounds)

    def keys_and_queries(self, carries: Tensor | None) -> tuple[Tensor, Tensor]:
        """(slots, heads, rows, columns) each."""
        size = self.size
        keys, queries = (
            self.wide.new_empty(size.slots, size.heads, self.launches.rows, 2 * size.half, dtype=self.stored)
            for _ in range(2)
        )
        if size.slots and size.heads:
            self.launches.keys_and_queries(
                self.B, self.C, self.B_bias, self.C_bias, self.speeds, self.steps, carries, keys, queries,
                self.bounds, self.sequence_of_slot,
            )  # fmt: skip
        return keys, queries

    def walk_outputs(self, keys: Tensor, queries: Tensor, y: Tensor, last: Tensor, kept: Tensor | None) -> None:
        """Fill y, the last states and, with `kept`, the states before every chunk."""
        if self.launches.programs == 0:
            return
        first, written = self.state, last
        if self.launches.segments > 1:
            first, written = self._segment_states(keys, None, first, last), None
        self.launches.walk_outputs(
            self.x, keys, queries, self.z, self.up, self.gate, self.down, self.D, self.runs, first, written, kept, y,
            self.bounds,
        )  # fmt: skip

    def walk_back(
        self, queries: Tensor, grad_y: Tensor, grad_last: Tensor | None, grad_first: Tensor | None, kept: Tensor | None
    ) -> None:
        """Fill with `kept` the gradients of the states after every chunk, and of the first states."""
        if self.launches.programs == 0:
            return
        if self.launches.segments > 1:
            grad_last, grad_first = self._segment_states(queries, grad_y, grad_last, grad_first), None
        self._walk(queries, grad_y, grad_last, grad_first, kept, None)

    def _segment_states(self, keys: Tensor, grad_y: Tensor | None, first: Tensor | None, last: Tensor | None) -> Tensor:
        """The state before every segment, and `last` filled; with grad_y the gradient of the state after each."""
        size = self.size
        state = (size.heads, size.headdim, size.state)
        parts = self.wide.new_empty(size.sequences * self.launches.segments, *state)
        factors = self.wide.new_empty(size.sequences * self.launches.segments, size.heads)
        if first is None and last is None:  # one of them tells how many there are
            last = self.wide.new_empty(size.sequences, *state)
        self._walk(keys, grad_y, None, parts, None, factors)
        pass_states(parts, factors, first, last, reverse=grad_y is not None)
        return parts

    def _walk(
        self,
        keys: Tensor,
        grad_y: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        kept: Tensor | None,
        factors: Tensor | None,
    ) -> None:
        """Walk forwards, with grad_y backwards, from `first` of every segment or zero."""
        rest = (keys, self.runs, first, last, kept, factors, self.bounds)
        if grad_y is None:
            self.launches.walk_forward(self.x, None, self.up, None, None, *rest)
        else:
            self.launches.walk_back(grad_y, self.z, None, self.gate, self.down, *rest)


def _whole_rows(tensor: Tensor) -> Tensor:
    """(batch, length, ...) with each step's numbers side by side, and one stride from row to row of all batches.

    That of an axis with a length of one may be any.
    """
    if tensor.is_contiguous():
        return tensor
    batch, length = tensor.shape[:2]
    expected = 1
    for extent, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if extent != 1 and stride != expected:
            return tensor.contiguous()
        expected *= extent
    if batch > 1 and length > 1 and tensor.stride(0) != length * tensor.stride(1):
        return tensor.contiguous()
    return tensor


def _sequence_of_slot(bounds: Tensor | None, size: Sizes) -> Tensor | None:
    """For every slot of a pack the sequence that it belongs to."""
    if bounds is None or size.sequences == 0:
        return None
    first = bounds[:-1] // size.steps + torch.arange(size.sequences, device=bounds.device, dtype=bounds.dtype)
    slot = torch.arange(size.slots, device=bounds.device, dtype=bounds.dtype)
    return (torch.searchsorted(first, slot, right=True) - 1).to(torch.int32)
