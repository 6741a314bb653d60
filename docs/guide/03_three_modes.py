# ---
# title: Three modes of one layer
# ---
# %% [markdown]
# # Three modes of one layer
#
# We have a step, $h_{t} = \bar A h_{t-1} + \bar B u_t$, $y_t = C h_t$. "But that is almost an RNN," you may say, "so
# what is the fuss?" Fair. What makes it more than an RNN is that this step, being linear, can be written in two other
# ways. All three give the same numbers, and each is best at something else:
#
# - as a **recurrence**: constant memory, for reading a stream;
# - as a **convolution**: one pass over the whole sequence by FFT, for training;
# - as a **scan**: steps combined in pairs, for training when the system changes with time, as Mamba's does.

# %%
import math
import time
from collections.abc import Callable

import style
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit import ops
from mambakit.lab.background import MassOnSpring, blelloch, convolve, dense_kernel, discretise, recur
from mambakit.nn import S4D

torch.manual_seed(0)
torch.set_num_threads(1)
spring = MassOnSpring(mass=1.0, stiffness=1.0, damping=0.3).system()
Ab, Bb = discretise(spring.A, spring.B, dt=0.3, method="zoh")
C = spring.C
u = torch.randn(64, dtype=torch.float64)

# %% [markdown]
# ## Unrolled, it is a convolution
#
# Start from $h = 0$ and write the first steps out:
#
# $$ y_0 = C\bar B u_0, \qquad y_1 = C\bar A\bar B u_0 + C\bar B u_1, \qquad
#    y_2 = C\bar A^2\bar B u_0 + C\bar A\bar B u_1 + C\bar B u_2, \dots $$
#
# What an input contributes depends only on how long ago it was. Collect these contributions in a **kernel**
#
# $$ K = (C\bar B,\; C\bar A\bar B,\; C\bar A^2\bar B,\; \dots), \qquad\qquad y_l = \sum_{j \le l} K_{l-j}\, u_j . $$
#
# The kernel is the impulse response of chapter 1, on samples. And a sum of this form is a convolution, the very thing
# that neural networks have done to images all along, with two differences: the kernel is as long as the sequence, and
# it is not a list of free weights but grows out of three small matrices.

# %%
K = dense_kernel(Ab, Bb, C, len(u))
lag = torch.arange(len(u))[:, None] - torch.arange(len(u))
M = torch.where(lag >= 0, K[lag.clamp(min=0)], 0.0)  # M_lj = K_{l-j}: y = M u
style.check("recurrence and matrix", recur(Ab, Bb, C, u), M @ u, 1e-12)

# %% tags=["hide"]
fig, (left, right) = style.figure(columns=2, height=2.9)
size = M.abs().max().item()
left.imshow(M, cmap="RdBu_r", vmin=-size, vmax=size)
left.set(title="y = M u", xlabel="input u at step", ylabel="output y at step")
left.grid(False)
right.plot(K, ".-")
right.set(title="the kernel: every diagonal of M", xlabel="steps ago", ylabel="weight")
style.caption(
    fig,
    "The whole layer as one matrix. It is zero above the diagonal, since the future does not act on the past, and "
    "constant along every diagonal, since the system does not change with time. So one column says it all: the kernel.",
)

# %% [markdown]
# ## Faster by Fourier
#
# Taken literally, the sum costs $L^2/2$ products. But a convolution is a plain product of spectra: transform,
# multiply, transform back, in about $L\log L$ operations. The one trap is that the discrete Fourier transform lives
# on a circle, where the end of the signal touches its beginning. So one pads with zeros to twice the length, lets the
# tail fall into the padding, and cuts it off.

# %%
wrapped = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(K), n=len(u))  # on the circle: wrong
padded = convolve(u, K)  # over twice the length
style.check("recurrence and padded FFT", padded, recur(Ab, Bb, C, u), 1e-12)
spoilt = (wrapped - padded).abs()

# %% tags=["hide"]
fig, ax = style.figure(height=2.4)
ax.plot(padded, label="padded: right")
ax.plot(wrapped, "--", label="on the circle: the past sees the future")
ax.set(xlabel="step", ylabel="y")
ax.legend()
style.caption(
    fig,
    "Without padding the tail of the last inputs comes back at the beginning. For a model that is meant to predict, "
    "this is the worst of mistakes: it leaks the future into the past.",
)

# %% [markdown]
# ## Combined in pairs, it is a scan
#
# Two steps in a row are again one step. Do $h \mapsto a h + b$, then $h \mapsto a' h + b'$, and you have done
# $h \mapsto (a'a)\,h + (a'b + b')$:
#
# $$ (a', b') \circ (a, b) = (a'a,\; a'b + b'). $$
#
# This operation is associative, so brackets may be put anywhere: combine neighbours, then neighbours of those, like
# adding numbers in a tree. All states follow from a *prefix sum* under $\circ$, in $\log_2 L$ rounds. And nothing
# here asks $a$ to be the same at every step. The convolution does need that; the scan does not. Keep this for chapter
# 7, where it decides the fate of the FFT.
#
# A product of two full matrices in each $\circ$ would be dear, so we go to the coordinates in which $\bar A$ is
# diagonal (exercise 2 of chapter 1):

# %%
values, vectors = torch.linalg.eig(Ab)
a = values.expand(len(u), -1)  # the same at every step
b = u[:, None] * torch.linalg.solve(vectors, Bb.to(vectors))
scan = blelloch(a, b)
y_scan = (scan.h @ (C.to(vectors) @ vectors)).real
style.check("recurrence and scan", y_scan, recur(Ab, Bb, C, u), 1e-12)
print(
    f"{len(u)} steps took {scan.combinations} combinations, of which at most {scan.depth} had to wait for one another"
)

# %% [markdown]
# ## Timed
#
# Now at a realistic size: four sequences of 64 channels, each with a system of 16 real modes of its own, as Mamba has
# them, but with $\Delta$, $B$ and $C$ held constant. The same numbers in five ways:
#
# 1. **loop**: the recurrence, step by step in Python;
# 2. **compiled scan**: `ops.selective_scan`, the recurrence in C++, channel by channel in the cache;
# 3. **tree scan**: Blelloch's tree (chapter 8) in PyTorch, with every state of every step in memory;
# 4. **direct convolution**: kernel, then `conv1d`, the sum as it stands;
# 5. **FFT convolution**: kernel, then Fourier.

# %%
batch, channels, states = 4, 64, 16
A = -torch.arange(1.0, states + 1).repeat(channels, 1) * torch.rand(channels, 1)
dt = torch.logspace(-3, -1, channels)  # a step for each channel
B, C_out = torch.randn(2, states).unbind()


def loop(u: Tensor) -> Tensor:
    Ab, Bb = torch.exp(dt[:, None] * A), dt[:, None] * B  # (channels, states): Mamba's exponential Euler
    h, y = torch.zeros(len(u), channels, states), []
    for u_t in u.unbind(1):  # (batch, channels)
        h = Ab * h + Bb * u_t[..., None]
        y.append(h @ C_out)
    return torch.stack(y, dim=1)


def compiled_scan(u: Tensor) -> Tensor:
    constant = (t.expand(*u.shape[:2], -1) for t in (B, C_out))
    return ops.selective_scan(u, dt.expand_as(u), A, *constant)


def tree_scan(u: Tensor) -> Tensor:
    a = torch.exp(dt[:, None] * A).expand(u.shape[1], len(u), -1, -1)
    b = (dt * u).transpose(0, 1)[..., None] * B  # (length, batch, channels, states)
    return (blelloch(a, b).h @ C_out).transpose(0, 1)


def kernels(length: int) -> Tensor:
    """K (channels, length): exp(l dt A) for l = i s + r as a product; no (channels, states, length) is formed."""
    s = math.isqrt(length - 1) + 1
    starts = torch.exp((dt[:, None] * A)[..., None] * s * torch.arange(s))  # (channels, states, i)
    within = torch.exp((dt[:, None] * A)[..., None] * torch.arange(s))  # (channels, states, r)
    K = (starts * (C_out * B)[:, None]).mT @ within  # (channels, i, r)
    return K.flatten(1)[:, :length] * dt[:, None]


def direct_convolution(u: Tensor) -> Tensor:
    K, L = kernels(u.shape[1]).flip(1)[:, None], u.shape[1]  # conv1d slides without turning the kernel around
    return F.conv1d(F.pad(u.mT, (L - 1, 0)), K, groups=channels).mT


def fft_convolution(u: Tensor) -> Tensor:
    return convolve(u.mT, kernels(u.shape[1])).mT


ways: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # and the greatest length to try
    "loop": (loop, 4096),
    "compiled scan": (compiled_scan, 16384),
    "tree scan": (tree_scan, 1024),
    "direct convolution": (direct_convolution, 1024),
    "FFT convolution": (fft_convolution, 16384),
}


def milliseconds(call: Callable[[Tensor], Tensor], u: Tensor, repeats: int = 3) -> float:
    """The median processor time of a call, after one to warm up."""
    call(u)
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        call(u)
        taken.append(1e3 * (time.process_time() - started))
    return sorted(taken)[repeats // 2]


lengths = [64, 256, 1024, 4096, 16384]
taken = {
    name: [milliseconds(way, torch.randn(batch, length, channels)) for length in lengths if length <= longest]
    for name, (way, longest) in ways.items()
}
style.table(
    ["way", *(f"L = {length}" for length in lengths)],
    [(name, *(f"{ms:.3g} ms" for ms in found), *["-"] * (len(lengths) - len(found))) for name, found in taken.items()],
)

# %% tags=["hide"]
fig, ax = style.figure(height=3.2)
for (name, found), marker in zip(taken.items(), "os^Dv", strict=True):
    ax.loglog(lengths[: len(found)], found, marker=marker, markersize=4, label=name)
ax.set_xticks(lengths, [str(length) for length in lengths])
ax.minorticks_off()
ax.set(xlabel="length of the sequence", ylabel="milliseconds, forwards")
fig.legend(loc="outside lower center", ncols=3)
style.caption(
    fig,
    "Five ways to the same output, on one core, forwards. The direct convolution bends upwards; all others grow in "
    "proportion to the length or nearly so, and differ by constant factors.",
)

# %% [markdown]
# At 1024 steps the direct convolution takes {{ taken["direct convolution"][2] / taken["FFT convolution"][2]:.1f }}
# times as long as the FFT, and the factor grows with the length. Two more things are worth seeing. The loop and the
# compiled scan do *the same arithmetic*; between them lie a factor of
# {{ taken["loop"][2] / taken["compiled scan"][2]:.0f }} and nothing but overhead. "Recurrent" does not mean slow; a
# recurrence in small Python steps is slow. And on this one core the compiled scan needs
# {{ taken["compiled scan"][3] / taken["FFT convolution"][3]:.2f }} times what the FFT needs at 4096 steps: a state
# that stays in the cache is hard to beat. The tree, the hero of parallel machines, is no bargain here. It does more
# work and carries every state through memory, and pays only where hundreds of cores would otherwise wait.
#
# The convolution shines when the state is large and the batch too: the kernel is made once for all sequences, and
# after that the FFT does not care how many modes went into it. It fails as soon as something is not the same at every
# step.
#
# ## Training by convolution, inference by recurrence
#
# `nn.S4D` does both. Given a whole sequence it convolves; given one step, it steps. For the next token a convolution
# would need all inputs so far, and time in proportion. The recurrence needs its state.

# %%
layer = S4D(channels, 32)
history = [64, 256, 1024, 4096]
again, onward = [], []
with torch.no_grad():
    for length in history:
        x = torch.randn(1, length, channels)
        _, state = layer(x)
        again.append(milliseconds(lambda x: layer(x)[0][:, -1], x))
        onward.append(milliseconds(lambda x, state=state: layer.step(x, state)[0], x[:, -1], repeats=21))
style.table(
    ["steps so far", "ms for the next by convolving again", "ms by one step", "numbers kept by the recurrence"],
    [(n, a, o, state.ssm.numel()) for n, a, o in zip(history, again, onward, strict=True)],
)

# %% [markdown]
# That is the bargain in one table, and the reason why the same layer may be trained like a CNN and served like an
# RNN.
#
# ## One system for each channel
#
# A state-space model takes one number in and gives one number out. A layer has hundreds of channels; what happens to
# them? Each gets a system of its own, and they do not meet: with an embedding of 512 there are 512 independent
# systems, each with its own $\Delta$, $A$, $B$, $C$ and state. You may think of attention with 512 heads of one
# channel each. The channels are mixed afterwards, by an ordinary linear layer, step by step.

# %%
wide = S4D(512, 64)
with torch.no_grad():
    _, state = wide(torch.randn(1, 10, 512))
    K = wide.kernel(400)
print(f"the state of one sequence: {tuple(state.ssm.shape)} = sequences, channels, modes, real and imaginary part")
steps = wide.log_dt.exp()
chosen = steps.argsort()[torch.tensor([20, 180, 340, 490])]

# %% tags=["hide"]
fig, axes = style.figure(columns=4, height=2.0, sharex=True)
for ax, channel, colour in zip(axes, chosen, style.COLOURS, strict=False):
    ax.plot(K[channel], color=colour, linewidth=1.0)
    ax.set(xlabel="steps ago", yticks=[])
for ax, title in zip(axes, ("short step", "longer", "longer still", "long step"), strict=True):
    ax.set_title(title)
style.caption(
    fig,
    "The kernels of four of 512 channels before training, by their step. Short steps see far and blurred, long steps "
    "see near and fast changes: a filter bank over many time scales, and nobody had to design it.",
)

# %% [markdown]
# The state of the layer has $512 \times 64$ numbers for each sequence, however long it is. Attention of the same
# width would have kept as many after {{ 512 * 64 // (2 * 512) }} tokens.
#
# ## Check
#
# All modes, and their gradients:

# %%
u = torch.randn(2, 256, channels)
style.check("loop and compiled scan", compiled_scan(u), loop(u), 1e-4)
style.check("loop and tree scan", tree_scan(u), loop(u), 1e-4)
style.check("loop and direct convolution", direct_convolution(u), loop(u), 1e-4)
style.check("loop and FFT convolution", fft_convolution(u), loop(u), 1e-4)
gradients = []
for way in (loop, compiled_scan, fft_convolution):
    leaf = u.clone().requires_grad_()
    gradients.append(torch.autograd.grad(way(leaf).square().sum(), leaf)[0])
style.check("gradients of loop and scan", gradients[1], gradients[0], 1e-4)
style.check("gradients of loop and FFT", gradients[2], gradients[0], 1e-4)
with torch.no_grad():
    state, stepped = None, []
    for t in range(100):
        y, state = layer.step(x[:, t], state)
        stepped.append(y)
    style.check("S4D: at once and step by step", torch.stack(stepped, 1), layer(x[:, :100])[0], 1e-4)

# %% [markdown]
# ## Exercises
#
# **1.** What must be added to $y = K * u$ when the sequence does not start from $h = 0$ but from a state $h_{-1}$?
# Derive it and check.
#
# **2.** Which outputs of the unpadded FFT above are wrong, and by how much padding could one get away if the kernel
# is known to be zero after $W$ steps?
#
# **3.** The kernel of a stable system fades. After how many steps may it be cut off if an error of 0.1 % is allowed?
# Estimate it from the eigenvalues of $\bar A$ and measure.

# %% [markdown] tags=["answer"]
# **1.** The old state fades by itself: $y_l$ gains $C\bar A^{\,l+1} h_{-1}$. A layer can therefore read a long
# sequence in pieces, each by FFT.

# %% tags=["answer"]
v, w = torch.randn(2, 64, dtype=torch.float64)
K = dense_kernel(Ab, Bb, C, 128)
whole = convolve(torch.cat([v, w]), K)
h = torch.zeros(2, dtype=torch.float64)
for v_t in v:
    h = Ab @ h + Bb * v_t
faded = torch.stack([C @ torch.linalg.matrix_power(Ab, l + 1) @ h for l in range(64)])
style.check("a sequence in two pieces", convolve(w, K[:64]) + faded, whole[64:], 1e-12)

# %% [markdown] tags=["answer"]
# **2.** All but the last: output $l$ receives, besides what it should, $K_{l+L-j}u_j$ from every *later* input $j > l$.
# The last output has no later input and is right. If $K$ is zero from lag $W$ on, nothing reaches further than
# $W - 1$ steps beyond the end: $W - 1$ zeros suffice.

# %% tags=["answer"]
print(f"error of the first output {spoilt[0]:.2g}, of the last {spoilt[-1]:.0e}")

# %% [markdown] tags=["answer"]
# **3.** The kernel goes like $\rho^l$ with $\rho$ the largest absolute eigenvalue of $\bar A$. It is below 0.001 of
# its beginning after $\ln 1000 / -\ln\rho$ steps.

# %% tags=["answer"]
rho = values.abs().max().item()
cut = round(torch.log(torch.tensor(1000.0)).item() / -torch.log(torch.tensor(rho)).item())
noise = torch.randn(1000, dtype=torch.float64)
K = dense_kernel(Ab, Bb, C, 1000)
short = torch.where(torch.arange(1000) < cut, K, 0.0)
error = (convolve(noise, short) - convolve(noise, K)).norm() / convolve(noise, K).norm()
print(f"estimated {cut} steps; cut there, the output is wrong by {100 * error:.3f} %")
