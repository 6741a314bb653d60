"""What stands around the mixers of short stacks, many models at once: norms, and the gradient of an embedding."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "stride"], do_not_specialize_on_alignment=["weight"])
def normalise(
    x,  # (models, rows, COLUMNS), as all but weight
    added,  # None for nothing
    weight,  # (models, COLUMNS)
    total,  # x + added; x itself where nothing is added
    y,
    rows,
    stride,  # between models' weights
    eps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """total = x + added and y = weight total / sqrt(mean(total^2) + eps) of every row."""
    model = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, COLUMNS)
    at = (model * rows + row) * COLUMNS + column[None, :]
    scale = tl.load(weight + model * stride + column)
    value = tl.load(x + at, mask=row < rows, other=0.0)
    if added is not None:
        value += tl.load(added + at, mask=row < rows, other=0.0)
        tl.store(total + at, value, mask=row < rows)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / COLUMNS + eps)
    tl.store(y + at, value * inverse[:, None] * scale[None, :], mask=row < rows)


@triton.jit(do_not_specialize=["rows", "stride"], do_not_specialize_on_alignment=["weight"])
def normalise_backward(
    total, weight, d_total, d_y,
    d_x,  # of x and of what was added
    shares,  # (models, programs, COLUMNS): of the weight
    rows, stride, eps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, COLUMNS)
    at = (model * rows + row) * COLUMNS + column[None, :]
    scale = tl.load(weight + model * stride + column)
    value = tl.load(total + at, mask=row < rows, other=0.0)
    grad = tl.load(d_y + at, mask=row < rows, other=0.0)
    through = tl.load(d_total + at, mask=row < rows, other=0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / COLUMNS + eps)[:, None]
    value *= inverse
    share = shares + (model * tl.num_programs(0) + tl.program_id(0)) * COLUMNS
    tl.store(share + column, tl.sum(grad * value, axis=0))
    grad *= scale[None, :]
    grad = inverse * (grad - value * (tl.sum(grad * value, axis=1) / COLUMNS)[:, None])
    tl.store(d_x + at, through + grad, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def embedding_backward(
    tokens,  # (models, rows) int64
    grads,  # (models, rows, COLUMNS)
    shares,  # (models, programs, vocabulary, COLUMNS)
    rows, vocabulary,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A program's share of the sums, for each of WORDS words, of the gradients of the rows where it stands."""
    model = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    total = tl.zeros([WORDS, COLUMNS], dtype=tl.float32)
    for first in range(tl.program_id(0) * TILE, rows, tl.num_programs(0) * TILE):
        row = first + tl.arange(0, TILE)
        token = tl.load(tokens + model * rows + row, mask=row < rows, other=-1).to(tl.int32)
        at = (model * rows + row)[:, None] * COLUMNS + column
        grad = tl.load(grads + at, mask=row[:, None] < rows, other=0.0)
        stands = (word[:, None] == token[None, :]).to(tl.float32)
        total = tl.dot(stands, grad, total, input_precision="tf32x3")
    shares += ((model * tl.num_programs(0) + tl.program_id(0)) * vocabulary + word)[:, None] * COLUMNS + column
    tl.store(shares, total, mask=word[:, None] < vocabulary)
