"""What the two passes of the scan of Mamba-2 share on the GPU: its inputs as kernels read them, and common launches."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.triton import interpreting
from mambakit.ops.triton.launch import power_of_two
from mambakit.ops.triton.ssd_backward import key_gradients, sum_splits
from mambakit.ops.triton.ssd_forward import walk_states
from mambakit.ops.triton.ssd_layout import Layout, cut
from mambakit.ops.triton.ssd_limits import chunk_of
from mambakit.ops.triton.ssd_steps import finish_steps, prepare_steps

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
    block = min(power_of_two(headdim, 16), 16 if wide else 64)
    processors = _processors(inputs.x.device)
    large = state > 128
    return Configuration(
        chunk=chunk,
        block_headdim=block,
        warps_outputs=8 if large else 4,
        stages_outputs=1,
        warps_states=8 if large else 4,
        stages_states=1 if wide or large else 4,
        warps_gradients=8,
        stages_gradients=1 if wide or large else 3,
        warps_keys=8 if large else 4,
        stages_keys=1 if wide or large else 3,
        programs_wanted=2 * processors,
        gradient_programs_wanted=2 * processors,
        key_programs_wanted=2 * processors,
    )


class Call:
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
        self.blocks = -(-headdim // self.config.block_headdim)
        self.block_state = power_of_two(state, 16)
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
        splits, heads_of_program = split(heads // groups, programs, self.config.key_programs_wanted)
        parts = total if splits == 1 else self.runs.new_empty(splits, *total.shape)
        key_gradients[(groups * splits, layout.chunks)](
            v,
            keys,
            given_or(z, v),
            self.runs,
            states,
            dpairs,
            parts,
            given_or(layout.chunk_table, self.runs),
            *v.stride()[:3],
            *keys.stride()[:3],
            *given_or(z, v).stride()[:3],
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
            sum_splits[(-(-values // 1024),)](parts, total, splits, values, BLOCK=1024, num_warps=4)

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
        kernel[(layout.chunks, -(-heads // _STEPS_HEADS))](
            inputs.dt,
            self.A,
            given_or(self.dt_bias, self.A),
            *tensors,
            given_or(layout.chunk_table, self.runs),
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
            given_or(z, v),
            self.runs,
            given_or(initial, absent),
            given_or(final, absent),
            given_or(factors, absent),
            given_or(kept, absent),
            given_or(layout.segment_table, absent),
            *v.stride()[:3],
            *keys.stride()[:3],
            *given_or(z, v).stride()[:3],
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


def split(heads: int, programs: int, wanted: int) -> tuple[int, int]:
    """Into how many parts to split the heads of a group so that `wanted` programs run, and the heads of a part."""
    of_program = -(-heads // min(heads, -(-wanted // programs)))
    return -(-heads // of_program), of_program


def given_or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's argument can't be absent: where it is not read, `stand_in` is given."""
    return stand_in if tensor is None else tensor


def _last_axis_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
