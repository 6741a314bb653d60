# ---
# title: "HiPPO: how a state remembers"
# ---
# %% [markdown]
# # HiPPO: how a state remembers
#
# A state has a few numbers, say 32. The past has thousands. Of all matrices $A$, is there one that makes those 32
# numbers tell as much as possible about everything that ever came in? Take a random one and the answer is dismal, as
# we shall measure. The right one was found in 2020 by asking the question the other way round (HiPPO, arXiv
# 2008.07669): **decide first what the state shall mean, then work out the matrix that keeps it so.**
#
# ## A past in a few coefficients
#
# What is a good summary of a curve in $N$ numbers? Anyone who has fitted a polynomial knows one. Stretch the past to
# the interval from 0 (the beginning) to 1 (now) and store the best fit by a polynomial of degree $N - 1$. In the
# basis of Legendre's polynomials, $p_n(x) = \sqrt{2n+1}\,P_n(2x - 1)$, which are orthonormal on that interval, the
# best fit has the simplest coefficients there are:
#
# $$ h_n(t) = \int_0^1 u(t x)\, p_n(x)\, dx, \qquad\qquad u(tx) \approx \sum_{n<N} h_n(t)\, p_n(x). $$
#
# It is the idea of a Fourier series with another family of curves, one that does not mind that the ends don't meet.

# %%
import math

import numpy as np
import style
import torch

from mambakit.lab.background import (
    discretise,
    legs_memory,
    legt_memory,
    matrix_exponential,
    polynomials,
    projection,
    quadrature,
    reconstruct,
    white_signal,
)
from mambakit.nn import hippo_legs, initial_modes

length = 1000
signal = white_signal(4 * length, 0.024, torch.Generator().manual_seed(3))[:length]
x = (torch.arange(length, dtype=torch.float64) + 0.5) / length
memories = {n: legs_memory(signal, n) for n in (8, 16, 32, 64)}  # the state after every sample
rebuilt = {n: reconstruct(memory[-1], x) for n, memory in memories.items()}
errors = {n: (curve - signal).square().mean().sqrt().item() / signal.std().item() for n, curve in rebuilt.items()}

# %% tags=["hide"]
fig, (left, right) = style.figure(columns=2, height=3.2, gridspec_kw={"width_ratios": (1, 2)})
grid = torch.linspace(0, 1, 300, dtype=torch.float64)
for n, curve in enumerate(polynomials(5, grid).T):
    left.plot(grid, curve, label=f"n = {n}", linewidth=1.2)
left.set(title="the first polynomials", xlabel="from the beginning to now", ylim=(-3.2, 3.4))
right.plot(x, signal, color=style.QUIET, linewidth=2.5, alpha=0.5, label="signal")
for n in (8, 16, 32):
    right.plot(x, rebuilt[n], linewidth=1.2, label=f"N = {n}")
right.set(title="rebuilt from N numbers", xlabel="from the beginning to now", ylim=(-3.2, 4.2))
right.legend(ncols=4, loc="upper center")
style.caption(
    fig,
    "Left: Legendre's polynomials on the past. Right: a signal of a thousand samples and what can be read back from a "
    "state of N numbers, updated sample by sample without ever looking back.",
)

# %% [markdown]
# The curves on the right were *not* fitted to the signal. A state of $N$ numbers was moved on a thousand times by the
# rule below, and then read once. With 32 numbers the error is {{ 100 * errors[32]:.0f }} % of the signal's spread,
# with 64 it is {{ 100 * errors[64]:.1f }} %.
#
# ## The matrix that keeps it so
#
# Now differentiate the definition. With $h_n = \frac1t\int_0^t u(s)\, p_n(s/t)\, ds$ there are three places where $t$
# appears:
#
# $$ h_n' = \frac{1}{t}\Big(\underbrace{p_n(1)\,u(t)}_{\text{the new value}} - \underbrace{h_n}_{\text{from } 1/t} -
#    \underbrace{\tfrac1t\!\int_0^t u(s)\, x\,p_n'(x)\,\big|_{x = s/t}\, ds}_{
#    \text{the past shrinks to make room}}\Big). $$
#
# But $x\,p_n'(x)$ is a polynomial of degree $n$, hence a sum of $p_0, \dots, p_n$, so that the last integral is a sum
# of the coefficients $h_0, \dots, h_n$ that we have already. Everything is linear in $h$ and in $u$:
#
# $$ h' = \frac{1}{t}\,(A h + B u), \qquad
#    A_{nk} = -\begin{cases} \sqrt{(2n+1)(2k+1)} & k < n \\ n + 1 & k = n \\ 0 & k > n\end{cases},
#    \qquad B_n = p_n(1) = \sqrt{2n+1}. $$
#
# This is **HiPPO-LegS**. We need not believe the formula: $-A_{nk}$ must be the coefficient of $p_k$ in
# $p_n + x\,p_n'$, an integral that Gauss' quadrature does exactly.

# %%
N = 32
A, B = hippo_legs(N)
points, weights = quadrature(N + 1)
values = polynomials(N, points)  # p_k at the points, (points, N)
slopes = np.polynomial.legendre.legval(2 * points.numpy() - 1, np.polynomial.legendre.legder(np.eye(N)))  # (N, points)
slopes = 2 * torch.from_numpy(slopes).T * torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)  # p_n'
derived = -(values * weights[:, None]).T @ (values + points[:, None] * slopes)  # (k, n)
style.check("A of the formula and A by differentiation", derived.T, A, 1e-10)

# %% tags=["hide"]
fig, (left, right) = style.figure(columns=2, height=2.9)
picture = left.imshow(-A, cmap=style.SEQUENTIAL)
left.set(xlabel="k", ylabel="n", title="-A, 32 states")
left.grid(False)
fig.colorbar(picture, ax=left)
for n in range(4):
    right.plot(memories[32][:, n], label=f"n = {n}", linewidth=1.2)
right.set(xlabel="samples read", ylabel="coefficient", title="the state while it reads", ylim=(-1.9, 1.9))
right.legend(ncols=2, loc="upper right")
style.caption(
    fig,
    "Left: the matrix that remembers. Below the diagonal each coefficient is corrected by all smoother ones; above it "
    "is zero, so the first N coefficients do not depend on how many follow. Right: the first four numbers of the state "
    "while the signal comes in. They move less and less, for each sample is a smaller share of the past.",
)

# %% [markdown]
# ## No clock
#
# Look at the $1/t$. Play the signal twice as fast and $t$ runs half as long, but $dt/t$ is the same: the state ends
# up with the same numbers. LegS has no time scale, nothing to tune. In steps, $\Delta/t$ is simply $1/k$ for the
# $k$-th sample.
#
# Its sibling **LegT** remembers only a window of the last $\theta$ seconds, with constant matrices and a sharp edge.
# Here both have read the same signal, played at two speeds:

# %%
slow = white_signal(8 * length, 0.01, torch.Generator().manual_seed(5))[: 2 * length]
fast = slow[::2]
both = {"LegS": legs_memory, "LegT, window 1000": lambda s, n: legt_memory(s, n, length)}
rows = []
for name, memory in both.items():
    h_slow, h_fast = memory(slow, 24)[-1], memory(fast, 24)[-1]
    rows.append((name, *h_slow[:3].tolist(), *h_fast[:3].tolist(), ((h_slow - h_fast).norm() / h_slow.norm()).item()))
style.table(["memory", "h0 slow", "h1 slow", "h2 slow", "h0 fast", "h1 fast", "h2 fast", "relative difference"], rows)

# %% [markdown]
# ## Against other matrices
#
# Is a special matrix needed at all? With enough digits almost any invertible map from past to state could be undone.
# So let us be practical: a number in a network is known to about one part in a hundred. We give every memory 32
# states, feed it 512 samples, disturb each state by 1 % of its own spread, and let it be read by the **best possible
# linear reader**, which can be written down because the signals have a known covariance $\Sigma$: with $h = Wu$, the
# reader is $\Sigma W^\top(W\Sigma W^\top + \text{noise})^{-1}$. Nobody can blame the reader.
#
# The candidates: LegS with its $1/t$; the same matrices at a constant step, which is what **S4** made of it; a random
# stable matrix (Gaussian, largest eigenvalue 1, so that it forgets as little as it may); the diagonal matrices of S4D
# (chapter 5); and plain decays $-1, \dots, -32$, the kind that Mamba begins with.

# %%
span, states, noise, band = 512, 32, 0.01, 0.05
generator = torch.Generator().manual_seed(0)
A, B = hippo_legs(states)


def constant(Ab: torch.Tensor, Bb: torch.Tensor) -> torch.Tensor:
    """W (span, states): what each of the inputs, oldest first, leaves in the last state of h <- Ab h + Bb u."""
    h, kept = Bb, []
    for _ in range(span):
        kept.append(h)
        h = Ab @ h if Ab.dim() == 2 else Ab * h
    W = torch.stack(kept[::-1])
    return torch.cat([W.real, W.imag], dim=1) if W.is_complex() else W


def scaled() -> torch.Tensor:
    """The same for LegS, whose step shrinks like 1/k."""
    W = torch.zeros(span, states, dtype=torch.float64)
    for k in range(1, span + 1):
        Ab, Bb = discretise(A, B, 1 / k, "bilinear")
        W = W @ Ab.T
        W[k - 1] = Bb
    return W


G = torch.randn(states, states, dtype=torch.float64, generator=generator)
candidates = {
    "LegS": scaled(),
    "LegS, constant step (S4)": constant(*discretise(A, B, 3 / span, "bilinear")),
    "diagonal, S4D-LegS": constant(*discretise(*initial_modes("legs", states), 3 / span, "zoh")),
    "diagonal, S4D-Lin": constant(*discretise(*initial_modes("lin", states), 3 / span, "zoh")),
    "plain decays": constant(*discretise(*initial_modes("real", 2 * states), 3 / span, "zoh")),  # no imaginary parts
    "random": constant(
        G / torch.linalg.eigvals(G).abs().max(), torch.randn(states, dtype=torch.float64, generator=generator)
    ),
}
ages = torch.arange(span, dtype=torch.float64)
covariance = torch.sinc(band * (ages[:, None] - ages))  # of noise without frequencies above the band


def blur(W: torch.Tensor) -> torch.Tensor:
    """The error (span,) of the best linear reading at each place of the past, as a share of the signal's spread."""
    of_states = W.T @ covariance @ W
    disturbed = of_states + torch.diag(noise**2 * of_states.diagonal() + 1e-15)
    reader = torch.linalg.solve(disturbed, W.T @ covariance)  # (states, span)
    return (covariance - covariance @ W @ reader).diagonal().clamp(min=0).sqrt()


blurs = {name: blur(W) for name, W in candidates.items()}
style.table(
    ["memory of 32 states", "error over all", "newest eighth", "middle", "oldest eighth"],
    [
        (name, b.square().mean().sqrt().item(), b[-64:].mean().item(), b[224:288].mean().item(), b[:64].mean().item())
        for name, b in blurs.items()
    ],
)

# %% tags=["hide"]
fig, ax = style.figure(height=3.4)
for (name, b), line in zip(blurs.items(), ("-", "-", "--", "--", ":", ":"), strict=True):
    ax.plot(span - 1 - ages, b, line, label=name)
ax.invert_xaxis()
ax.set(xlabel="samples ago", ylabel="error of the best reading", ylim=(-0.02, 1.05))
fig.legend(loc="outside lower center", ncols=3)
style.caption(
    fig,
    "What the best linear reader gets wrong, by how long ago it was: 0 is perfect, 1 is knowing nothing. The signals "
    "have fewer degrees of freedom than a memory has states, so that in principle each could hold them.",
)

# %% [markdown]
# LegS remembers the beginning as well as the present; in the middle it is a little worse, as every polynomial fit is
# sharpest at its ends. A random matrix of the same size, which has just as many numbers to store, forgets nearly
# everything but the last few samples: its modes fade at almost the same rates and say the same thing thirty-two
# times. (Its error also dips at the very beginning: before the first sample there was silence, and the slowest mode
# noticed when it ended.) The diagonal matrices stand between. Look at S4D-Lin: its frequencies are multiples of one,
# so it confuses a sample with the one a period of {{ 2 * span // 3 }} samples earlier; it is sharp only where that
# other one lies outside.
#
# ## Recent and old
#
# It is often said that HiPPO "pays more attention to the recent past". Is that so? For LegS it is not: its measure is
# flat. It is true for what S4 made of it. At a constant step, $h' = Ah + Bu$ without the $1/t$, time is stretched:
# with $t = \ln\tau$ the past lies on a logarithmic clock. What an input leaves in state $n$ after $t$ seconds is
#
# $$ (e^{tA}B)_n = e^{-t}\, p_n(e^{-t}), $$
#
# Legendre's polynomials in $e^{-t}$: fine where $e^{-t}$ changes fast, that is now, and coarser the further back. The
# step $\Delta$ decides what "far back" means, and since S4 learns $\Delta$ for each channel, a layer holds many
# memories, some short and sharp, some long and blurred.

# %%
ago = torch.linspace(0, 5, 300, dtype=torch.float64)
few, start = hippo_legs(4)
fading = matrix_exponential(ago[:, None, None] * few) @ start
formula = torch.exp(-ago)[:, None] * polynomials(4, torch.exp(-ago))

# %% tags=["hide"]
fig, ax = style.figure(height=2.6)
for n in range(4):
    ax.plot(ago, fading[:, n], label=f"n = {n}")
ax.set(xlabel="how long ago", ylabel="weight in state n")
ax.legend(ncols=4)
style.caption(
    fig,
    "LegS at a constant step: what an input of some time ago still contributes to the first four states. All details "
    "crowd at the recent end.",
)

# %% [markdown]
# ## Check
#
# The state that was moved on sample by sample against the integral that defines it, for a function that both can
# have; and the kernels of the constant system against Legendre's polynomials.


# %%
def smooth(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(7 * x) + 0.5 * torch.cos(3 * x)


nodes, weights = quadrature(40)
best = projection(smooth(nodes), weights, nodes, 12)
samples = smooth((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
style.check("LegS sample by sample and the integral", legs_memory(samples, 12)[-1], best, 5e-3)
style.check("exp(tA) B and Legendre's polynomials", fading, formula, 1e-10)

# %% [markdown]
# ## Exercises
#
# **1.** How many coefficients does a sine with $c$ full periods in the past need, for an error of 1 %? Measure for
# $c = 1, 2, 4, 8, 16$ and guess the law.
#
# **2.** LegT keeps a window. Feed a single pulse and follow the norm of the state. What happens at the window's edge,
# and what if $N$ is small?
#
# **3.** The eigenvalues of LegS are simply $-1, -2, \dots, -N$, those of "plain decays". Yet one remembers and the
# other does not. What differs? Compute the condition number of the eigenvectors for $N = 4, 8, 16, 24$.

# %% [markdown] tags=["answer"]
# **1.** About $\pi$ per period (the polynomial of degree $n$ has $n$ zeros, a sine of $c$ periods $2c$, and near the
# middle the zeros lie $\pi/2$ times wider than on average), plus a few more to get the last digits right.

# %% tags=["answer"]
nodes, weights = quadrature(200)
for periods in (1, 2, 4, 8, 16):
    wave = torch.sin(2 * math.pi * periods * nodes)
    power = projection(wave, weights, nodes, 120).square().cumsum(0)  # of the first n coefficients
    rest = (1 - power / (weights * wave.square()).sum()).clamp(min=0).sqrt()
    needed = int((rest > 0.01).sum()) + 1
    print(f"{periods:2} periods: {needed} coefficients, {needed / periods:.1f} per period")

# %% [markdown] tags=["answer"]
# **2.** The norm stays up while the pulse is in the window and drops when it leaves. With few states the edge is
# soft: what left is not cancelled exactly, because a short polynomial cannot follow a jump.

# %% tags=["answer"]
pulse = torch.zeros(600, dtype=torch.float64)
pulse[0] = 1.0
for states_kept in (8, 64):
    norms = legt_memory(pulse, states_kept, 300).norm(dim=1)
    inside, outside = norms[50:250].mean().item(), norms[350:550].mean().item()
    print(f"{states_kept} states: norm {inside:.3f} inside the window of 300, {outside:.4f} outside")

# %% [markdown] tags=["answer"]
# **3.** The eigenvectors. Those of LegS are so nearly parallel that going to its eigenbasis multiplies errors by the
# condition number below. The memory lies in the *difference* of almost equal modes, digits that a diagonal system
# with 1 % of noise has lost. So S4 could not simply diagonalise its matrix. How it managed all the same is the next
# chapter.

# %% tags=["answer"]
for n in (4, 8, 16, 24):
    vectors = torch.linalg.eig(hippo_legs(n)[0]).eigenvectors
    print(f"N = {n}: condition number {torch.linalg.cond(vectors):.1e}")
