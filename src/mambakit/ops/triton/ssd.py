"""The scan of Mamba-2 on the GPU: which kernels run, on what, in which order.

Forward: dt and the sums of the decays' logarithms (prepare_steps), then one walk along each segment of chunks with the
state in registers (walk_outputs): x, B, C are read once, y is written once, no state and no product of a chunk leaves
the chip. Where batch times heads don't fill the chip, sequences are cut into segments; what each adds to the state
comes first (walk_states: another read of x and B), and states are handed on between them (pass_states).

Backward: the forward keeps the state before every chunk of 64 steps in the dtype of x, in which the tensor cores take
it. The gradients of the states walk back alone (walk_states: reads dy and C, writes as many states), and then all
chunks are independent: chunk_gradients for dx and what dt needs, with C B^T formed once for several heads of a group,
key_gradients for dB and dC, summed over heads in registers. What the few programs of a group leave is summed in a fixed
order (sum_splits), so that every result has the same bits each time. Last come the gradients of dt, A and dt_bias
(finish_steps).

Account, bfloat16, b = batch * length * heads steps of headdim P = 64, state N = 128, chunks of Q = 64:

                    bytes a step and head               products a step and head (operations)
    walk_outputs    4 P (+ 2 P N / Q kept)     256 (+256)    2 Q N + 2 Q P + 4 P N            56 Ki
    walk_states     2 P + 2 P N / Q            384           2 P N                            16 Ki
    chunk_gradients 6 P + 4 P N / Q            896           4 Q P + 4 P N                    48 Ki
    key_gradients   4 P + 4 P N / Q            768           4 P N (two launches)             32 Ki

so (8, 2048, 64, 64, 128), a million of b, moves 0.27 GB forward and, with what is kept, 2.7 GB forward and backward. A
larger chunk would halve the states' share, and its accumulators don't fit the registers. Segments cost walk_states
once more, without the kept states.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.triton import interpreting
from mambakit.ops.triton.ssd_backward import chunk_gradients, key_gradients, sum_splits
from mambakit.ops.triton.ssd_forward import walk_outputs, walk_states
from mambakit.ops.triton.ssd_layout import Layout, cut
from mambakit.ops.triton.ssd_limits import chunk_of, filled
from mambakit.ops.triton.ssd_steps import finish_steps, prepare_steps
from mambakit.ops.triton.state_passing import pass_states

_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
_CONTIGUOUS = torch.contiguous_format
_STEPS_HEADS = 16  # heads to a program of the kernels of ssd_steps


class Configuration(NamedTuple):
    """Block sizes, warps and stages of software pipelining, by shape class."""

    chunk: int
    block_headdim: int
    warps_outputs: int
    stages_outputs: int
    warps_states: int
    stages_states: int
    warps_gradients: int
    stages_gradients: int
    warps_keys: int
    stages_keys: int
    programs_wanted: int  # of a walk, to fill the chip
    gradient_programs_wanted: int
    key_programs_wanted: int


def configuration(inputs: SsdInputs) -> Configuration:
    """The shape class is the dtype and the size of a state."""
    headdim, state = inputs.x.shape[3], inputs.B.shape[3]
    wide = inputs.x.dtype == torch.float32
    chunk = chunk_of(inputs.chunk_size, inputs.x.dtype)
    block = min(max(16, triton.next_power_of_2(headdim)), 16 if wide else 64)
    processors = _processors(inputs.x.device)
    large = state > 128
    return Configuration(
        chunk=chunk,
        block_headdim=block,
        warps_outputs=8 if large else 4,
        stages_outputs=1 if wide or large else 2,
        warps_states=8 if large else 4,
        stages_states=1 if wide or large else 4,
        warps_gradients=8,
        stages_gradients=1 if wide or large else 3,
        warps_keys=8 if large else 4,
        stages_keys=1 if wide or large else 2,
        programs_wanted=2 * processors,
        gradient_programs_wanted=2 * processors,
        key_programs_wanted=2 * processors,
    )


def forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every chunk."""
    if final_state.numel() == 0:
        return
    whole = _in_whole_blocks(inputs)
    if whole is inputs:
        _forward(inputs, y, final_state, kept_states)
        return
    headdim, state = final_state.shape[2:]
    wide_y = torch.empty_like(whole.x, memory_format=torch.contiguous_format)
    wide_state = final_state.new_empty(*final_state.shape[:2], whole.x.shape[3], whole.B.shape[3])
    _forward(whole, wide_y, wide_state, kept_states)
    y.copy_(wide_y[..., :headdim])
    final_state.copy_(wide_state[..., :headdim, :state])


def backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: SsdInputs
) -> None:
    """Fill `grads`."""
    if grad_final_state.numel() == 0 or grad_y.numel() == 0:
        _without_steps(grad_final_state, grads)
        return
    whole = _in_whole_blocks(inputs)
    if whole is inputs:
        _backward(inputs, kept, grad_y, grad_final_state, grads)
        return
    rows, states = whole.x.shape[3] - inputs.x.shape[3], whole.B.shape[3] - inputs.B.shape[3]
    unfilled: dict[str, Any] = {
        name: torch.empty_like(getattr(whole, name), memory_format=_CONTIGUOUS)
        for name in _DIFFERENTIABLE
        if getattr(grads, name) is not None
    }
    wide = grads._replace(**unfilled)
    wide_grad_state = F.pad(grad_final_state, (0, states, 0, rows))
    _backward(whole, kept, F.pad(grad_y, (0, rows)), wide_grad_state, wide)
    for name in _DIFFERENTIABLE:
        grad: Tensor | None = getattr(grads, name)
        if grad is not None:
            grad.copy_(getattr(wide, name)[tuple(slice(size) for size in grad.shape)])


def _in_whole_blocks(inputs: SsdInputs) -> SsdInputs:
    """The inputs themselves, or in half precision filled up with zeros to whole blocks of aligned rows.

    Triton 3.6 gave wrong states on Hopper for rows of 24 and 40 numbers, read one by one, in blocks of 32 and 64.
    """
    x, _, _, B, C, D, z, _, initial, *_ = inputs
    if x.dtype == torch.float32:
        return inputs
    headdim, state = filled(x.shape[3], B.shape[3], x.dtype)
    rows, states = headdim - x.shape[3], state - B.shape[3]
    read = [t for t in (x, B, C, z) if t is not None]
    if not rows and not states and all(_aligned(t) for t in read):
        return inputs
    return inputs._replace(
        x=_fill(x, rows),
        B=_fill(B, states),
        C=_fill(C, states),
        D=None if D is None else F.pad(D, (0, rows)),
        z=None if z is None else _fill(z, rows),
        initial_state=None if initial is None else F.pad(initial, (0, states, 0, rows)),
    )


def _fill(tensor: Tensor, more: int) -> Tensor:
    """The tensor with `more` zeros at the end of its rows, which then lie aligned."""
    return F.pad(tensor, (0, more)) if more else tensor.clone(memory_format=torch.contiguous_format)


def _aligned(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return strides[3] == 1 and all(s % 16 == 0 for s in strides[:3]) and tensor.data_ptr() % 16 == 0


def _forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    call = _Call(inputs)
    layout, heads = call.layout, inputs.x.shape[2]
    with torch.cuda.device_of(y):
        call.prepare()
        initial = call.initial
        if layout.segmented:
            initial, factors = call.parts()
            call.walk_states(call.x, call.B, None, None, initial, factors, None, reverse=False)
            pass_states(initial, factors, call.initial, final_state, layout.first_segment)
        walk_outputs[(heads, call.blocks, layout.segments)](
            call.x,
            call.B,
            call.C,
            _or(call.z, call.x),
            _or(call.D, call.runs),
            call.runs,
            _or(initial, call.runs),
            y,
            final_state,
            kept_states,
            _or(layout.segment_table, call.runs),
            *call.x.stride()[:3],
            *call.B.stride()[:3],
            *call.C.stride()[:3],
            *_or(call.z, call.x).stride()[:3],
            *_strides_of(call.D),
            *call.walk_sizes,
            CHUNK=layout.chunk,
            BLOCK_P=call.config.block_headdim,
            BLOCK_N=call.block_state,
            HAS_Z=call.z is not None,
            HAS_D=call.D is not None,
            HAS_INITIAL=initial is not None,
            WRITE_FINAL=not layout.segmented,
            KEEP=kept_states.shape[0] > 0,
            FINE=call.fine,
            PACKED=layout.segment_table is not None,
            ALIGN=call.align,
            PRECISION=call.precision,
            STAGES=call.config.stages_outputs,
            num_warps=call.config.warps_outputs,
        )


def _backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: SsdInputs
) -> None:
    call = _Call(inputs)
    layout, x = call.layout, call.x
    heads, groups = x.shape[2], call.B.shape[2]
    dy, ending = grad_y.contiguous(), grad_final_state.contiguous()
    absent = call.runs
    with torch.cuda.device_of(x):
        call.prepare()
        state_grads = torch.empty_like(kept[0])
        d_initial = grads.initial_state
        if layout.segmented:
            parts, factors = call.parts()
            call.walk_states(dy, call.C, call.z, None, parts, factors, None, reverse=True)
            pass_states(parts, factors, ending, d_initial, layout.first_segment, reverse=True)
            call.walk_states(dy, call.C, call.z, parts, None, None, state_grads, reverse=True)
        else:
            call.walk_states(dy, call.C, call.z, ending, d_initial, None, state_grads, reverse=True)

        share = heads // groups
        programs = max(1, layout.chunks * groups)
        splits, heads_of_program = _split(share, programs, call.config.gradient_programs_wanted)
        dpairs = call.runs.new_empty(splits, layout.chunks, groups, layout.chunk, layout.chunk)
        steps = call.runs.new_empty(4, call.blocks, heads, layout.places)
        through = call.runs.new_empty(call.blocks, heads, layout.chunks)
        dD = None if call.D is None else call.runs.new_empty(layout.chunks, *call.D.shape)
        chunk_gradients[(groups * splits, layout.chunks)](
            x,
            call.B,
            call.C,
            _or(call.z, x),
            _or(call.D, absent),
            dy,
            call.runs,
            kept[0],
            state_grads,
            grads.x,
            dpairs,
            _or(grads.z, x),
            _or(dD, absent),
            *steps,
            through,
            _or(layout.chunk_table, absent),
            *x.stride()[:3],
            *call.B.stride()[:3],
            *call.C.stride()[:3],
            *_or(call.z, x).stride()[:3],
            *_strides_of(call.D),
            *call.chunk_sizes,
            splits,
            heads_of_program,
            BLOCKS=call.blocks,
            CHUNK=layout.chunk,
            BLOCK_P=call.config.block_headdim,
            BLOCK_N=call.block_state,
            HAS_Z=call.z is not None,
            HAS_D=call.D is not None,
            FINE=call.fine,
            PACKED=layout.chunk_table is not None,
            ALIGN=call.align,
            PRECISION=call.precision,
            STAGES=call.config.stages_gradients,
            num_warps=call.config.warps_gradients,
        )
        call.key_gradients(x, call.C, None, state_grads, dpairs, grads.B, source=True)
        call.key_gradients(dy, call.B, call.z, kept[0], dpairs, grads.C, source=False)
        call.finish(steps, through, grads)
        if dD is not None:
            torch.sum(dD, 0, out=grads.D)


def _without_steps(grad_final_state: Tensor, grads: SsdInputs) -> None:
    """The gradients where there is nothing to scan: the final state is the initial one."""
    for name in _DIFFERENTIABLE[:-1]:
        grad: Tensor | None = getattr(grads, name)
        if grad is not None:
            grad.zero_()
    if grads.initial_state is not None:
        grads.initial_state.copy_(grad_final_state)


class _Call:
    """The inputs as the kernels read them, the cut of the sequences, and launches that both directions share."""

    def __init__(self, inputs: SsdInputs) -> None:
        self.inputs = inputs
        self.x, self.B, self.C = (_last_axis_contiguous(t) for t in (inputs.x, inputs.B, inputs.C))
        self.z = None if inputs.z is None else _last_axis_contiguous(inputs.z)
        self.D = inputs.D
        self.initial = None if inputs.initial_state is None else inputs.initial_state.contiguous()
        self.A = inputs.A.contiguous()
        self.dt_bias = None if inputs.dt_bias is None else inputs.dt_bias.contiguous()
        self.config = configuration(inputs)
        batch, length, heads, headdim = self.x.shape
        groups, state = self.B.shape[2:]
        self.blocks = triton.cdiv(headdim, self.config.block_headdim)
        self.block_state = max(16, triton.next_power_of_2(state))
        wanted = self.config.programs_wanted
        self.layout: Layout = cut(batch, length, inputs.cu_seqlens, self.config.chunk, heads * self.blocks, wanted)
        self.runs = self.A.new_empty(3, heads, self.layout.places)
        self.fine = self.x.dtype == torch.float32
        self.precision = "tf32x3" if self.x.dtype == torch.float32 else "widened" if interpreting() else "ieee"
        read = [t for t in (self.x, self.B, self.C, self.z) if t is not None]
        self.align = 16 if all(s % 16 == 0 for t in read for s in t.stride()[:3]) else 1
        layout = self.layout
        counts = layout.chunks_of_sequence, layout.segments_of_sequence, layout.chunks_of_segment, layout.chunks
        self.chunk_sizes = (length, layout.chunks_of_sequence, layout.chunks, heads, headdim, state, heads // groups)
        self.walk_sizes = (length, *counts, heads, headdim, state, heads // groups)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Unfilled: what each segment adds to the state, and how much of the state it keeps."""
        heads, headdim, state = *self.x.shape[2:], self.B.shape[3]
        segments = self.layout.segments
        return self.A.new_empty(segments, heads, headdim, state), self.A.new_empty(segments, heads)

    def key_gradients(
        self, v: Tensor, keys: Tensor, z: Tensor | None, states: Tensor, dpairs: Tensor, total: Tensor, *, source: bool
    ) -> None:
        """Fill `total`, the gradient of B (source) or of C."""
        layout, heads, groups = self.layout, self.x.shape[2], keys.shape[2]
        programs = max(1, layout.chunks * groups)
        splits, heads_of_program = _split(heads // groups, programs, self.config.key_programs_wanted)
        parts = total if splits == 1 else self.runs.new_empty(splits, *total.shape)
        key_gradients[(groups * splits, layout.chunks)](
            v,
            keys,
            _or(z, v),
            self.runs,
            states,
            dpairs,
            parts,
            _or(layout.chunk_table, self.runs),
            *v.stride()[:3],
            *keys.stride()[:3],
            *_or(z, v).stride()[:3],
            *self.chunk_sizes,
            splits,
            heads_of_program,
            layout.batch * layout.length,
            dpairs.shape[0],
            BLOCKS=self.blocks,
            CHUNK=layout.chunk,
            BLOCK_P=self.config.block_headdim,
            BLOCK_N=self.block_state,
            SOURCE=source,
            HAS_Z=z is not None,
            FINE=self.fine,
            PACKED=layout.chunk_table is not None,
            ALIGN=self.align if (v.shape[2] * v.shape[3]) % 16 == 0 else 1,
            PRECISION=self.precision,
            STAGES=self.config.stages_keys,
            num_warps=self.config.warps_keys,
        )
        if splits > 1:
            values = total.numel()
            sum_splits[(triton.cdiv(values, 1024),)](parts, total, splits, values, BLOCK=1024, num_warps=4)

    def prepare(self) -> None:
        """Fill `runs`."""
        self._over_steps(prepare_steps, self.runs)

    def finish(self, steps: Tensor, through: Tensor, grads: SsdInputs) -> None:
        """Fill the gradients of dt, A and dt_bias."""
        heads, chunks = self.x.shape[2], self.layout.chunks
        dA, ddt_bias = self.runs.new_empty(2, chunks, heads)
        sources = (self.runs, *steps, through)
        self._over_steps(finish_steps, *sources, grads.dt, dA, ddt_bias, BLOCKS=self.blocks)
        torch.sum(dA, 0, out=grads.A)
        if grads.dt_bias is not None:
            torch.sum(ddt_bias, 0, out=grads.dt_bias)

    def _over_steps(self, kernel: Any, *tensors: Tensor, **constants: int) -> None:
        inputs, layout, heads = self.inputs, self.layout, self.x.shape[2]
        if layout.chunks == 0:
            return
        kernel[(layout.chunks, triton.cdiv(heads, _STEPS_HEADS))](
            inputs.dt,
            self.A,
            _or(self.dt_bias, self.A),
            *tensors,
            _or(layout.chunk_table, self.runs),
            *inputs.dt.stride(),
            layout.length,
            layout.chunks_of_sequence,
            layout.chunks,
            heads,
            inputs.dt_min,
            inputs.dt_max,
            **constants,
            CHUNK=layout.chunk,
            HEADS=_STEPS_HEADS,
            FINE=self.fine,
            SOFTPLUS=inputs.dt_softplus,
            HAS_BIAS=self.dt_bias is not None,
            PACKED=layout.chunk_table is not None,
            num_warps=4,
        )

    def walk_states(
        self,
        v: Tensor,
        keys: Tensor,
        z: Tensor | None,
        initial: Tensor | None,
        final: Tensor | None,
        factors: Tensor | None,
        kept: Tensor | None,
        *,
        reverse: bool,
    ) -> None:
        layout, absent = self.layout, self.runs
        walk_states[(self.x.shape[2], self.blocks, layout.segments)](
            v,
            keys,
            _or(z, v),
            self.runs,
            _or(initial, absent),
            _or(final, absent),
            _or(factors, absent),
            _or(kept, absent),
            _or(layout.segment_table, absent),
            *v.stride()[:3],
            *keys.stride()[:3],
            *_or(z, v).stride()[:3],
            *self.walk_sizes,
            CHUNK=layout.chunk,
            BLOCK_P=self.config.block_headdim,
            BLOCK_N=self.block_state,
            REVERSE=reverse,
            HAS_Z=z is not None,
            HAS_INITIAL=initial is not None,
            WRITE_FINAL=final is not None,
            WRITE_FACTOR=factors is not None,
            KEEP=kept is not None,
            FINE=self.fine,
            PACKED=layout.segment_table is not None,
            ALIGN=self.align if (v.shape[2] * v.shape[3]) % 16 == 0 else 1,
            PRECISION=self.precision,
            STAGES=self.config.stages_states,
            num_warps=self.config.warps_states,
        )


def _split(heads: int, programs: int, wanted: int) -> tuple[int, int]:
    """Into how many parts to split the heads of a group so that `wanted` programs run, and the heads of a part."""
    of_program = triton.cdiv(heads, min(heads, triton.cdiv(wanted, programs)))
    return triton.cdiv(heads, of_program), of_program


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's argument can't be absent: where it is not read, `stand_in` is given."""
    return stand_in if tensor is None else tensor


def _strides_of(D: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if D is None else D.stride()


def _last_axis_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
