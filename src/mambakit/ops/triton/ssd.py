"""The scan of Mamba-2 on the GPU: which kernels run, on what, in which order.

Forward: dt and the sums of the decays' logarithms (prepare_steps), then one walk along each segment of chunks with the
state in registers (walk_outputs): x, B, C are read once, y is written once, no state and no product of a chunk leaves
the chip. Where batch times heads don't fill the chip, sequences are cut into segments; what each adds to the state
comes first (walk_states: another read of x and B), and states are handed on between them (pass_states).

Backward: the forward keeps the state before every chunk of 64 steps in the dtype of x, in which the tensor cores take
it. The gradients of the states walk back alone (walk_states: reads dy and C, writes as many states), and then all
chunks are independent: value_gradients for dx and pair_gradients for what pairs of steps give, both for dt as well and
with C B^T formed once for several heads of a group, key_gradients for dB and dC, summed over heads in registers. What
the few programs of a group leave is summed in a fixed order (sum_splits), so that every result has the same bits each
time. Last come the gradients of dt (finish_steps), and of A, dt_bias and D, summed over chunks (sum_chunks).

Sequences of one chunk that start from no state have a forward of their own (single_outputs), and where no gradient of
the final state comes in, their backward has the same kernels without any state.

Account, bfloat16, b = batch * length * heads steps of headdim P = 64, state N = 128, chunks of Q = 64:

                    bytes a step and head               products a step and head (operations)
    walk_outputs    4 P (+ 2 P N / Q kept)     256 (+256)    2 Q N + 2 Q P + 4 P N            56 Ki
    walk_states     2 P + 2 P N / Q            384           2 P N                            16 Ki
    value_gradients 6 P + 4 P N / Q            896           2 Q P + 4 P N                    40 Ki
    pair_gradients  4 P                        256           2 Q P                             8 Ki
    key_gradients   4 P + 4 P N / Q            768           4 P N (two launches)             32 Ki

so (8, 2048, 64, 64, 128), a million of b, moves 0.27 GB forward and, with what is kept, 3 GB forward and backward. A
larger chunk would halve the states' share, and its accumulators don't fit the registers. Segments cost walk_states
once more, without the kept states. In float32 a chunk is half as long, and a state twice as large and multiplied in
pieces: of 16 rows, reread from where they are kept, for the three products of tf32 need the room in the registers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.triton.launch import on_device_of, rows_contiguous
from mambakit.ops.triton.ssd_launches import Launches, given_or, launches_of
from mambakit.ops.triton.ssd_layout import Tables
from mambakit.ops.triton.ssd_limits import filled
from mambakit.ops.triton.state_passing import pass_states

ABSENT_GRADIENTS = True  # what `backward` takes in place of zeros: `mambakit.ops.operator`

_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
_CONTIGUOUS = torch.contiguous_format


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
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor | None, grads: SsdInputs
) -> None:
    """Fill `grads`."""
    if grad_y.numel() == 0:
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
    wide_grad_state = None if grad_final_state is None else F.pad(grad_final_state, (0, states, 0, rows))
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
    if not rows and not states and _aligned(x, B, C, x if z is None else z):
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


def _aligned(*tensors: Tensor) -> bool:
    """Whether rows of four axes begin at multiples of 16 numbers and of 16 bytes."""
    bits = 0
    for tensor in tensors:
        *outer, inner = tensor.stride()
        if inner != 1:
            return False
        bits |= outer[0] | outer[1] | outer[2] | tensor.data_ptr()
    return bits % 16 == 0


def _forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    inputs, launches, tables = _as_read(inputs)
    x, dt, A, B, C, D, z, dt_bias, initial, *_ = inputs
    layout = launches.layout
    with on_device_of(y):
        runs = A.new_empty(3, x.shape[2], layout.places)
        if layout.chunks:
            launches.bind("prepare")(dt, A, given_or(dt_bias, A), runs, given_or(tables.chunks, A))
        if launches.single and initial is None:
            launches.bind("single_outputs")(x, B, C, given_or(z, x), given_or(D, A), runs, y, final_state)
            return
        segment_table = given_or(tables.segments, A)
        if layout.segmented:
            starts, factors = (
                A.new_empty(layout.segments, *final_state.shape[1:]),
                A.new_empty(layout.segments, x.shape[2]),
            )
            walk = launches.bind("states", reverse=False, initial=False, final=True, factors=True, keep=False)
            walk(x, B, x, runs, A, starts, factors, A, segment_table)
            pass_states(starts, factors, initial, final_state, tables.first_segment)
            initial = starts
        keep = kept_states.shape[0] > 0
        if not keep and launches.in_pieces:
            kept_states = A.new_empty(layout.segments, x.shape[2], B.shape[3], x.shape[3])
        launches.bind("outputs", initial=initial is not None, keep=keep)(
            x, B, C, given_or(z, x), given_or(D, A), runs, given_or(initial, A), y, final_state, kept_states,
            segment_table,
        )  # fmt: skip


def _backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, ending: Tensor | None, grads: SsdInputs
) -> None:
    inputs, launches, tables = _as_read(inputs)
    x, dt, A, B, C, D, z, dt_bias, *_ = inputs
    layout = launches.layout
    heads, states, dy = x.shape[2], kept[0], grad_y.contiguous()
    if dy.data_ptr() % 16 and dy.dtype != torch.float32:  # `_in_whole_blocks` tells why
        dy = dy.clone()
    ending = None if ending is None else ending.contiguous()
    with on_device_of(x):
        runs = A.new_empty(3, heads, layout.places)
        chunk_table = given_or(tables.chunks, A)
        launches.bind("prepare")(dt, A, given_or(dt_bias, A), runs, chunk_table)
        state_grads = None
        if ending is not None or not launches.single:
            state_grads = x.new_empty(layout.chunks, heads, B.shape[3], x.shape[3])
        if state_grads is not None or grads.initial_state is not None:
            _walk_back(inputs, launches, tables, runs, dy, ending, state_grads, grads.initial_state)

        has_states = states.shape[0] > 0
        pairs = A.new_empty(launches.pair_splits, layout.chunks, B.shape[2], layout.chunk, layout.chunk)
        steps = A.new_empty(4, heads, layout.places)
        through = A.new_empty(heads, layout.chunks)
        dD = A if D is None else A.new_empty(layout.chunks, *D.shape)
        launches.bind("values", states=has_states, state_grads=state_grads is not None)(
            x, B, C, given_or(z, x), given_or(D, A), dy, runs, states, given_or(state_grads, x), grads.x,
            given_or(grads.z, x), steps, through, chunk_table,
        )  # fmt: skip
        launches.bind("pairs")(x, B, C, given_or(z, x), dy, runs, pairs, dD, steps, chunk_table)
        for v, keys, gate, of_states, total, source in (
            (x, C, x, state_grads, grads.B, True),
            (dy, B, given_or(z, x), states if has_states else None, grads.C, False),
        ):
            parts = total if launches.splits == 1 else A.new_empty(launches.splits, *total.shape)
            keys_of = launches.bind("keys", source=source, states=of_states is not None)
            keys_of(v, keys, gate, runs, given_or(of_states, x), pairs, parts, chunk_table)
            if launches.splits > 1:
                launches.bind("sum_splits")(parts, total)
        dA = A.new_empty(layout.chunks, heads)
        ddt_bias = A if dt_bias is None else A.new_empty(layout.chunks, heads)
        launches.bind("finish")(
            dt, A, given_or(dt_bias, A), runs, steps, through, grads.dt, dA, ddt_bias, chunk_table
        )  # fmt: skip
        launches.bind("sum_chunks")(dA, ddt_bias, dD, grads.A, given_or(grads.dt_bias, A), given_or(grads.D, A))


def _walk_back(
    inputs: SsdInputs,
    launches: Launches,
    tables: Tables,
    runs: Tensor,
    dy: Tensor,
    ending: Tensor | None,
    into: Tensor | None,
    d_initial: Tensor | None,
) -> None:
    """Fill the gradients of the states after the chunks, and of the initial ones, from those of the final ones."""
    layout, A, C, z = launches.layout, inputs.A, inputs.C, given_or(inputs.z, inputs.x)
    segment_table = given_or(tables.segments, A)
    if layout.segmented:
        heads, headdim = inputs.x.shape[2:]
        parts, factors = A.new_empty(layout.segments, heads, headdim, C.shape[3]), A.new_empty(layout.segments, heads)
        walk = launches.bind("states", reverse=True, initial=False, final=True, factors=True, keep=False)
        walk(dy, C, z, runs, A, parts, factors, A, segment_table)
        sequences = None if tables.first_segment is not None else inputs.x.shape[0]
        pass_states(
            parts, factors, ending, d_initial, tables.first_segment, reverse=True, sequences=sequences
        )  # fmt: skip
        ending, d_initial = parts, None
    walk = launches.bind(
        "states", reverse=True, initial=ending is not None, final=d_initial is not None, factors=False,
        keep=into is not None,
    )  # fmt: skip
    walk(dy, C, z, runs, given_or(ending, A), given_or(d_initial, A), A, given_or(into, A), segment_table)


def _as_read(inputs: SsdInputs) -> tuple[SsdInputs, Launches, Tables]:
    """The inputs as the kernels read them, and how these are launched."""
    inputs = _with_contiguous_rows(inputs)
    launches, tables = launches_of(inputs)
    if launches.far_apart:
        x, B, C = (t.contiguous() for t in (inputs.x, inputs.B, inputs.C))
        inputs = inputs._replace(x=x, B=B, C=C, z=None if inputs.z is None else inputs.z.contiguous())
        launches, tables = launches_of(inputs)
    return inputs, launches, tables


def _with_contiguous_rows(inputs: SsdInputs) -> SsdInputs:
    x, _, A, B, C, _, z, dt_bias, initial, *_ = inputs
    return inputs._replace(
        x=rows_contiguous(x),
        A=A.contiguous(),
        B=rows_contiguous(B),
        C=rows_contiguous(C),
        z=None if z is None else rows_contiguous(z),
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        initial_state=None if initial is None else initial.contiguous(),
    )


def _without_steps(grad_final_state: Tensor | None, grads: SsdInputs) -> None:
    """The gradients where there is nothing to scan: the final state is the initial one."""
    for name in _DIFFERENTIABLE[:-1]:
        grad: Tensor | None = getattr(grads, name)
        if grad is not None:
            grad.zero_()
    if grads.initial_state is not None:
        grads.initial_state.zero_() if grad_final_state is None else grads.initial_state.copy_(grad_final_state)
