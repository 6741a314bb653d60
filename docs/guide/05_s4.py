# ---
# title: "S4: memory at scale, and its limit"
# ---
# %% [markdown]
# # S4: memory at scale, and its limit
#
# HiPPO gave us a matrix that remembers. To make a network layer of it, one obstacle is left: cost. A layer has
# hundreds of channels, and a dense $A$ of $64\times64$ in each of them, for thousands of steps, is far too much. The
# obvious remedy, to go to the eigenvectors, failed in the last chapter: they are so nearly parallel that double
# precision drowns. S4 (*Structured State Space Sequence model*, arXiv 2111.00396) found a way around. A year later
# S4D (arXiv 2206.11893) found that one can simply walk through the wall.

# %%
import math
import time

import style
import torch
from torch import Tensor, nn

from mambakit.lab.background import (
    convolve,
    dense_kernel,
    diagonalised_legs,
    discretise,
    modes_kernel,
    polynomials,
    white_signal,
)
from mambakit.lab.mechanisms import run_with_cache
from mambakit.nn import S4D, Backbone, hippo_legs, initial_modes

torch.set_num_threads(1)
N = 64
A, B = hippo_legs(N)
P = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
S = A + P[:, None] * P + 0.5 * torch.eye(N, dtype=torch.float64)
print(f"A + P P^T + 1/2: the largest entry of S + S^T is {(S + S.T).abs().max():.0e}")
legs = diagonalised_legs(N)
print(f"condition number of its eigenvectors: {torch.linalg.cond(legs.vectors):.6f}")

# %% [markdown]
# ## Normal plus a little
#
# Look at HiPPO's matrix once more. Below the diagonal stands $-\sqrt{(2n+1)(2k+1)}$, a product of something of $n$
# and something of $k$: a matrix of rank one, cut off at the diagonal. Add half of that rank-one matrix, $PP^\top$
# with $P_n = \sqrt{n + 1/2}$, and what remains is $-\frac12$ plus a matrix $S$ with $S^\top = -S$, as the code above
# confirms:
#
# $$ A = -\tfrac12 + S - PP^\top . $$
#
# A skew-symmetric matrix is the best-natured of all: its eigenvectors are orthogonal, condition number 1, and its
# eigenvalues purely imaginary. So in the right basis HiPPO's matrix is *diagonal plus a term of rank one* (S4's
# authors say NPLR, normal plus low rank):
#
# $$ A = V\,(\Lambda - pp^*)\,V^*, \qquad \Lambda = \mathrm{diag}\big(-\tfrac12 \pm i\omega_n\big), \qquad p = V^*P. $$
#
# ## S4's kernel in ten lines
#
# With $\bar A$ from the bilinear rule, how does one get $K_l = C\bar A^l\bar B$ for all $l$ without a single power of
# $\bar A$? By asking for its spectrum instead. At a point $z$ on the unit circle the sum of all $K_l z^l$ is a
# geometric series, and the bilinear rule makes it neat:
#
# $$ \hat K(z) = C(1 - z\bar A)^{-1}\bar B = C\Big(\tfrac{1-z}{\Delta} - \tfrac{1+z}{2}A\Big)^{-1}B . $$
#
# The matrix to invert is diagonal plus rank one, and for that there is a formula (Woodbury's): with
# $D = \frac{1-z}{\Delta} - q\Lambda$ and $q = \frac{1+z}{2}$,
#
# $$ (D + q\,pp^*)^{-1} = D^{-1} - \frac{q\, D^{-1}pp^*D^{-1}}{1 + q\,p^*D^{-1}p} . $$
#
# Only sums over the modes are left. Evaluate at the $L$ roots of unity, transform back by FFT, done. (The series is
# infinite and the kernel has $L$ terms: replacing $C$ by $C(1 - \bar A^L)$ cuts it off.)


# %%
def s4_kernel(legs, C: Tensor, Ab: Tensor, dt: float, length: int) -> Tensor:
    """K (length,) of HiPPO-LegS under the bilinear rule, from its spectrum; C is in the coordinates of A."""
    C = (C - C @ torch.linalg.matrix_power(Ab, length)).to(legs.vectors) @ legs.vectors
    z = torch.exp(-2j * math.pi * torch.arange(length, dtype=torch.float64) / length)
    q = (1 + z) / 2
    D = ((1 - z) / dt)[:, None] - q[:, None] * legs.modes  # (length, modes)
    CB, CP = (C * legs.B / D).sum(1), (C * legs.P / D).sum(1)
    PB, PP = (legs.P.conj() * legs.B / D).sum(1), (legs.P.conj() * legs.P / D).sum(1)
    return torch.fft.ifft(CB - q * CP * PB / (1 + q * PP)).real


length, dt = 2048, 0.01
torch.manual_seed(0)
C = torch.randn(N, dtype=torch.float64)
Ab, Bb = discretise(A, B, dt, "bilinear")
style.check(
    "S4's kernel and powers of the dense matrix",
    s4_kernel(legs, C, Ab, dt, length),
    dense_kernel(Ab, Bb, C, length),
    1e-8,
)

# %% [markdown]
# ## S4D: just leave it out
#
# Then somebody tried to train with $\Lambda$ alone, the term $pp^*$ struck out (DSS, arXiv 2203.14343), and it worked
# as well. S4D explained why: for large $N$ the diagonal system with $B/2$ does nearly what LegS does. We can look.
# The exact kernels are $e^{-t}p_n(e^{-t})$ from the last chapter:

# %%
t = torch.linspace(0, 4, 400, dtype=torch.float64)
exact = torch.exp(-t)[:, None] * polynomials(2, torch.exp(-t))
root = math.sqrt(3.0)
answer = torch.stack([1 - torch.exp(-t), root * (torch.exp(-t) - torch.exp(-2 * t))], dim=1)  # the integrals: u = 1
knock, step = {}, {}
for n in (8, 32, 128, 512):
    modes = diagonalised_legs(n)
    back = (modes.vectors[:2] * modes.B / 2).T  # the first two states, from the modes
    knock[n] = (torch.exp(t[:, None] * modes.modes) @ back).real
    step[n] = (torch.expm1(t[:, None] * modes.modes) / modes.modes @ back).real


def off(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


rows = [(n, off(knock[n], exact), off(step[n], answer)) for n in knock]
style.table(["modes", "off, to a knock", "off, to a step"], rows)

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.8)
for ax, found, wanted in zip(axes, (knock, step), (exact, answer), strict=True):
    for n in (8, 32):
        ax.plot(t, found[n][:, 1], label=f"{n} modes", linewidth=1.0)
    ax.plot(t, wanted[:, 1], color=style.QUIET, linestyle="--", label="LegS")
    ax.set(xlabel="time")
axes[0].set(title="state 1 after a knock", ylabel="state")
axes[1].set_title("state 1 under a constant input")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
style.caption(
    fig,
    "LegS with its term of rank one left out. The answer to a knock is covered in ripples, finer with more modes but "
    "no smaller; under a steady input they cancel.",
)

# %% [markdown]
# The answer to a sharp knock never comes right: the ripples become finer, not smaller. But they cancel on anything
# smooth, and the answer to a step is off by {{ rows[0][2]:.3f }} with 8 modes and by {{ rows[-1][2]:.4f }} with 512.
# Good enough, it turned out, and everything becomes simple. A mode is one complex number; its conjugate twin need not
# be stored, since the two add up to twice the real part:
#
# $$ h_t = \bar A \odot h_{t-1} + \bar B\,u_t, \qquad y_t = 2\,\mathrm{Re}(C h_t),
#    \qquad K_l = 2\,\mathrm{Re}\sum_n C_n \bar B_n \bar A_n^{\,l} . $$
#
# That is `nn.S4D`, and once the modes are free numbers one may also begin with others than HiPPO's. Four beginnings
# are in use:
#
# | name | $A_n$ | what it is |
# |---|---|---|
# | `legs` | $-\frac12 + i\omega_n$ | HiPPO-LegS without its rank-one term |
# | `inv` | $-\frac12 + i\frac N\pi\big(\frac{N}{2n+1} - 1\big)$ | a formula close to those |
# | `lin` | $-\frac12 + i\pi n$ | evenly spaced: a Fourier series that fades |
# | `real` | $-(n + 1)$ | plain decays; Mamba begins with these |

# %%
kernel_length = 400
random_C = torch.randn(16, dtype=torch.complex128)
beginnings = {name: initial_modes(name, 32) for name in ("legs", "inv", "lin", "real")}
kernels = {name: modes_kernel(*modes, random_C, 0.01, kernel_length) for name, modes in beginnings.items()}

# %% tags=["hide"]
fig, axes = style.figure(rows=2, columns=4, height=3.8)
for column, (name, (modes, _)) in enumerate(beginnings.items()):
    upper, lower = axes[:, column]
    upper.plot(modes.real, modes.imag, ".", color=style.COLOURS[column])
    upper.set(title=name, xlim=(-17, 1.5), yscale="symlog", ylim=(-1, 600), yticks=[0, 1, 10, 100])
    lower.plot(kernels[name], color=style.COLOURS[column], linewidth=1.0)
    lower.set(xlabel="steps ago", yticks=[])
axes[0, 0].set_ylabel("imaginary part")
axes[1, 0].set_ylabel("kernel")
style.caption(
    fig,
    "Above: the modes in the complex plane (real part across). Below: the kernel that each makes with the same random "
    "C. Three of them ring; plain decays cannot.",
)

# %% [markdown]
# ## Something to do: remember for 64 steps
#
# A task that is easy to state and needs memory: repeat a random signal 64 steps later. We train a tiny model, 16
# channels of S4D between two linear layers, a few seconds for each beginning.

# %%
LENGTH, DELAY = 256, 64
generator = torch.Generator().manual_seed(0)


def signals(count: int) -> Tensor:
    """Random signals (count, LENGTH, 1) without their highest frequencies."""
    return torch.stack([white_signal(4 * LENGTH, 0.2, generator)[:LENGTH] for _ in range(count)]).float()[..., None]


class DelayLine(nn.Module):
    def __init__(self, init: str) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(1, 16), nn.Linear(16, 1)
        self.mixer = S4D(16, 64, init=init, dt_min=0.003)

    def forward(self, u: Tensor) -> Tensor:
        return self.decode(self.mixer(self.encode(u))[0])


def miss(model: nn.Module, u: Tensor) -> Tensor:
    """The mean square error of the delayed signal, as a share of its variance."""
    return (model(u)[:, DELAY:] - u[:, :-DELAY]).square().mean() / u.var()


def train(model: nn.Module, updates: int = 150) -> list[float]:
    optimizer, course = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(updates):
        loss = miss(model, seen[torch.randint(len(seen), (16,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    return course


seen, unseen = signals(256), signals(64)
models, courses = {}, {}
started = time.process_time()
for init in ("legs", "lin", "real"):
    torch.manual_seed(0)
    models[init] = DelayLine(init)
    courses[init] = train(models[init])
spent = time.process_time() - started
with torch.no_grad():
    final = {init: miss(model, unseen).item() for init, model in models.items()}
style.table(["beginning", "error on new signals, share of the variance"], list(final.items()))

probe = unseen[:1].clone().requires_grad_()
(weights,) = torch.autograd.grad(models["lin"](probe)[0, -1, 0], probe)
weights = weights[0, :, 0].flip(0)  # by how many steps ago
peak = int(weights.abs().argmax())

# %% tags=["hide"]
fig, (left, middle, right) = style.figure(columns=3, height=2.8)
for init, course in courses.items():
    left.semilogy(course, label=init)
left.set(title="training", xlabel="update", ylabel="error / variance")
left.legend()
with torch.no_grad():
    heard, said = unseen[0, :, 0], models["lin"](unseen[:1])[0, :, 0]
middle.plot(heard[100 - DELAY : 200 - DELAY], color=style.QUIET, linewidth=2.5, alpha=0.5, label="wanted")
middle.plot(said[100:200], linewidth=1.2, label="given")
middle.set(title="lin, a new signal", xlabel="step", ylim=(-3, 4.4))
middle.legend(loc="upper center", ncols=2)
right.plot(weights)
right.set(title="what it listens to", xlabel="steps ago", ylabel="gradient")
style.caption(
    fig,
    "Learning to repeat a signal 64 steps later. Left: the error by update. Middle: a new signal, wanted and given. "
    "Right: the gradient of the last output on each input: one peak, and little else.",
)

# %% [markdown]
# All three models together took {{ spent:.0f }} seconds of one core. The two that ring get within
# {{ 100 * min(final["legs"], final["lin"]):.1f }} % of the variance; what `lin` listens to has its peak {{ peak }}
# steps back. The plain decays are left at {{ 100 * final["real"]:.0f }} %. A sum of decays is smooth and can't have a
# sharp peak anywhere but now: for *this* task imaginary parts are everything. (Mamba gets by without them, since it
# does not need a peak at a distance. It can decide, at each token, to keep it.)
#
# ## What a time-invariant system cannot do
#
# The model above will repeat everything, for ever, 64 steps later. Now change the task: *repeat only the values that
# matter, and as soon as you are asked.* The delay is then different each time, and noise has to be ignored. Can a
# longer training help, or a larger state? No. Write the layer as a matrix, $y = Mu$. Its entry $M_{ts} = K_{t-s}$
# depends on the distance and on nothing else. It is the same for a value and for noise, and the same whatever was
# asked.
#
# The same matrix can be computed for a Mamba layer (arXiv 2403.01590 calls it hidden attention). We feed both with
# two different inputs, before any training:

# %%
torch.manual_seed(0)
inputs = torch.randn(2, 48, 16) * 3
stack = Backbone(16, 1, "mamba", {"d_state": 8})
with torch.no_grad():
    _, cache = run_with_cache(stack, inputs, "layers.*.mixer.mixing")
mamba_M = cache["layers.0.mixer.mixing"][:, 0]  # of the first channel, (inputs, 48, 48)


def mixing_of_s4d(layer: S4D) -> Tensor:
    """M of the first channel: its kernel along the diagonals."""
    K = layer.kernel(48)[0].detach()
    lag = torch.arange(48)[:, None] - torch.arange(48)
    return torch.where(lag >= 0, K[lag.clamp(min=0)], 0.0)


s4d_M = mixing_of_s4d(models["lin"].mixer).expand(2, -1, -1)  # the input plays no part
changes = {name: ((M[1] - M[0]).norm() / M[0].norm()).item() for name, M in (("S4D", s4d_M), ("Mamba", mamba_M))}

# %% tags=["hide"]
fig, axes = style.figure(columns=4, height=2.2)
for ax, M, title in zip(
    axes,
    (*s4d_M, *mamba_M),
    ("S4D, one input", "S4D, another", "Mamba, one input", "Mamba, another"),
    strict=True,
):
    size = M.abs().max().item()
    ax.imshow(M, cmap="RdBu_r", vmin=-size, vmax=size)
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
style.caption(
    fig,
    "How each output (down) depends on each input (across), for two different inputs. S4D has one pattern, constant "
    "along its diagonals, for all inputs. Mamba makes another for each.",
)

# %% [markdown]
# Between the two inputs S4D's matrix changes by {{ 100 * changes["S4D"]:.0f }} %, Mamba's by
# {{ 100 * changes["Mamba"]:.0f }} %. Depth and nonlinearities between the layers soften the verdict but do not lift
# it: each layer moves information by fixed distances. The next chapter puts it to the test with the task that made
# the difference famous, *selective copying*.
#
# ## Check

# %%
layer = S4D(2, 16, init="lin", dtype=torch.float64)
modes, B_lin = initial_modes("lin", 16)
C_layer = torch.view_as_complex(layer.C.detach())
by_hand = torch.stack([modes_kernel(modes, B_lin, C_layer[d], layer.log_dt[d].exp().item(), 100) for d in range(2)])
style.check("the layer's kernel and the sum over modes", layer.kernel(100).detach(), by_hand, 1e-10)
twins = torch.cat([modes, modes.conj()])
Ab, Bb = discretise(twins, torch.cat([B_lin, B_lin.conj()]), layer.log_dt[0].exp().item(), "zoh")
full = (torch.cat([C_layer[0], C_layer[0].conj()]) * Bb) @ Ab[:, None] ** torch.arange(100)
style.check("half of the modes and all of them", by_hand[0], full.real, 1e-10)
rebuilt = legs.vectors @ (torch.diag(legs.modes) - legs.P[:, None] * legs.P.conj()) @ legs.vectors.mH
style.check("HiPPO's matrix and normal plus rank one", rebuilt.real, A, 1e-10)

# %% [markdown]
# ## Exercises
#
# **1.** Put two time-invariant layers one after the other, without anything nonlinear in between. What is the kernel
# of the whole? What does depth bring then?
#
# **2.** Leave the modes of `lin` fixed and choose only $C$, by least squares, so that $K$ is as close as possible to
# a delay of 64 (for signals like ours). How good is it with 8, 16, 32 and 64 states? What limits it?
#
# **3.** A dense $A$ needs $N^2 L$ multiplications for its kernel. How many does S4's kernel take, how many S4D's?
# Measure all three for $N = 64$ and $L = 2048$.

# %% [markdown] tags=["answer"]
# **1.** The convolution of the two kernels: again one kernel, again time-invariant. Linear depth brings nothing that
# a larger state would not. What makes a stack of S4 layers more than one layer is the nonlinearity between them.

# %% tags=["answer"]
first, second = (
    modes_kernel(*initial_modes(name, 16), torch.randn(8, dtype=torch.complex128), 0.05, 200)
    for name in ("lin", "legs")
)
u = torch.randn(200, dtype=torch.float64)
style.check("two layers and one", convolve(convolve(u, first), second), convolve(u, convolve(first, second)), 1e-10)

# %% [markdown] tags=["answer"]
# **2.** The output is linear in the real and imaginary parts of $C$, so one least-squares problem answers. A delay of
# 64 steps at a bandwidth of 0.2 holds about 13 independent numbers in flight, each needing a state; below that it
# cannot work. With a step of 0.02 more than 32 states don't help: all frequencies are multiples of one, of a period
# of 100 steps, so the kernel peaks again at lag 164. A step of 0.005 moves that echo out of sight, but then it takes
# more modes to reach the highest frequency.

# %% tags=["answer"]
u = signals(16).double()[..., 0]
for step_size, states in ((0.02, 8), (0.02, 16), (0.02, 32), (0.02, 64), (0.005, 64), (0.005, 128)):
    modes, B_lin = initial_modes("lin", states)
    knobs = torch.cat([torch.eye(len(modes)), 1j * torch.eye(len(modes))]).to(modes)  # C one by one
    bases = torch.stack([modes_kernel(modes, B_lin, knob, step_size, LENGTH) for knob in knobs])
    features = convolve(u[:, None].expand(-1, len(bases), -1), bases).mT[:, 2 * DELAY :].flatten(0, 1)
    wanted = u[:, DELAY:-DELAY].flatten()
    best = torch.linalg.lstsq(features, wanted[:, None], driver="gelsd").solution[:, 0]
    K = best @ bases
    print(
        f"step {step_size}, {states} states: error {off(features @ best, wanted) ** 2:.4f} of the variance, "
        f"kernel {K[64]:.2f} at lag 64 and {K[164]:.2f} at lag 164"
    )

# %% [markdown] tags=["answer"]
# **3.** S4: four sums over $N$ modes at $L$ points, and an FFT, so about $4NL + L\log L$ (plus $\bar A^L$, a few
# products of matrices). S4D: $NL/2$ complex powers. Both are linear in $N$. A complex power is dear, though, so that
# the layer makes all powers as products of two short lists of them:

# %% tags=["answer"]
Ab, Bb = discretise(A, B, dt, "bilinear")
half, B_half = initial_modes("legs", N)
C_half = torch.randn(N // 2, dtype=torch.complex128)
style.table(
    ["kernel", "milliseconds"],
    [
        ("dense", 1e3 * style.measure(lambda: dense_kernel(Ab, Bb, C, length), 3)),
        ("S4", 1e3 * style.measure(lambda: s4_kernel(legs, C, Ab, dt, length), 3)),
        ("S4D, by powers", 1e3 * style.measure(lambda: modes_kernel(half, B_half, C_half, dt, length), 3)),
        ("S4D, by products", 1e3 * style.measure(lambda: S4D(1, N, dtype=torch.float64).kernel(length), 3)),
    ],
)
