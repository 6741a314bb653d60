# ---
# title: Four ways through a sequence
# ---
# %% [markdown]
# # Four ways through a sequence
#
# A text, a price, a heartbeat: values that come one after another, and a question at every step. What comes next? Is
# this normal? A sequence layer turns inputs $x_1, \dots, x_L$ into outputs $y_1, \dots, y_L$, where $y_t$ may depend
# on everything up to $x_t$ and on nothing after it. There are four ways to build one, and they differ in a single
# respect: **what they keep of the past**.
#
# | | what is kept of the past | how $y_t$ comes about |
# |---|---|---|
# | recurrent network (RNN) | a vector $h$ of fixed size | $h_t = \tanh(W h_{t-1} + V x_t)$ |
# | convolution (CNN) | the last few inputs | $y_t = \sum_{k < W} K_k\, x_{t-k}$ |
# | attention (Transformer) | everything | $y_t = \sum_{s \le t} \mathrm{softmax}_s(q_t \cdot k_s)\, v_s$ |
# | state-space model (SSM) | a state $h$ of fixed size | $h_t = \bar A_t h_{t-1} + \bar B_t x_t$, $\; y_t = C_t h_t$ |
#
# The RNN and the SSM look alike. The difference is a $\tanh$ that is not there, and this guide is about how much
# follows from leaving it out. But first: measure. Every figure and every number in these chapters was produced by the
# code that stands beside it, on the machine that built this page.

# %%
import time
from collections.abc import Callable
from functools import partial

import style
import torch
from torch import Tensor, nn

from mambakit.nn import S4D, Attention, Mamba

torch.manual_seed(0)
WIDTH = 64


class CausalConvolution(nn.Module):
    """y_t from the last `taps` inputs, called as the other layers are; its state is those inputs."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.taps, self.conv = taps, nn.Conv1d(width, width, taps)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        past = x.new_zeros(x.shape[0], self.taps - 1, x.shape[2]) if state is None else state
        x = torch.cat([past, x], dim=1)
        return self.conv(x.transpose(1, 2)).transpose(1, 2), x[:, 1 - self.taps :]


layers: dict[str, nn.Module] = {
    "RNN (LSTM)": nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "convolution": CausalConvolution(WIDTH, taps=8),
    "attention": Attention(WIDTH, n_heads=4),
    "SSM (Mamba)": Mamba(WIDTH),
}


def numbers_in(state: object) -> int:
    """How many numbers a state holds."""
    return state.numel() if isinstance(state, Tensor) else sum(map(numbers_in, state))  # type: ignore[call-overload]


x = torch.randn(1, 1000, WIDTH)
with torch.no_grad():
    rows = [
        (name, sum(p.numel() for p in layer.parameters()), numbers_in(layer(x[:, :100])[1]), numbers_in(layer(x)[1]))
        for name, layer in layers.items()
    ]
style.table(["layer", "parameters", "numbers kept after 100 steps", "numbers kept after 1000 steps"], rows)

# %% [markdown]
# All four are called in one way, `y, state = layer(x, state)`, and all are {{ WIDTH }} channels wide. Only attention
# keeps more the longer it reads. That is its strength, nothing is ever lost, and its price.
#
# ## What training costs
#
# Training reads whole sequences, forwards and backwards through the gradient. One sequence, one core, a growing
# length:

# %%
lengths = [64, 128, 256, 512, 1024, 2048, 4096]


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median processor time of a call: of one core, whatever else the machine is doing."""
    call()
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return sorted(taken)[repeats // 2]


def training_step(layer: nn.Module, x: Tensor) -> None:
    layer(x)[0].square().mean().backward()


torch.set_num_threads(1)
training: dict[str, list[float]] = {name: [] for name in layers}
for name, layer in layers.items():
    for length in lengths:
        step = partial(training_step, layer, torch.randn(1, length, WIDTH))
        training[name].append(1e3 * seconds(step, repeats=5 if length < 2000 else 3))
style.table(
    ["layer", "ms for 256 steps", "ms for 4096 steps", "factor of the last doubling"],
    [(name, taken[lengths.index(256)], taken[-1], taken[-1] / taken[-2]) for name, taken in training.items()],
)

# %% tags=["hide"]
fig, ax = style.figure(height=3.2)
for (name, taken), marker in zip(training.items(), "os^D", strict=True):
    ax.loglog(lengths, taken, marker=marker, markersize=4, label=name)
ax.set(xlabel="length of the sequence", ylabel="milliseconds, forwards and backwards")
ax.set_xticks(lengths, [str(length) for length in lengths])
ax.minorticks_off()
ax.legend()
style.caption(
    fig,
    "Time of one training step against the length, on one core of the machine that built this page. A line of "
    "slope one doubles with the length; attention bends upwards, towards slope two.",
)

# %% [markdown]
# Attention compares every step with every earlier one, $L^2/2$ pairs, so that each doubling of the length tends to
# take four times as long. The others do the same work again at each step and tend to twice. At the last doubling it
# was {{ training["attention"][-1] / training["attention"][-2]:.1f }} for attention and
# {{ training["SSM (Mamba)"][-1] / training["SSM (Mamba)"][-2]:.1f }} for Mamba. Note also what the curves do *not*
# say: that a Mamba is faster at any length. Short sequences are what attention is good at.
#
# One core hides something, though: what *many* cores could do at the same time. On a GPU the question is not only how
# many operations there are but how many have to **wait for one another**:
#
# | | operations | longest chain of operations that wait |
# |---|---|---|
# | RNN | $L$ | $L$: $h_t$ needs $\tanh$ of $h_{t-1}$, and there is no way around |
# | convolution | $L\,W$ | 1 |
# | attention | $L^2$ | 1 (and a sum over $L$) |
# | SSM | $L$ | $\log_2 L$: without the $\tanh$ the steps can be combined in pairs (chapter 8) |
#
# This is why RNNs went out of fashion, and it is what SSMs repair.
#
# ## What the next token costs
#
# To generate, one reads what there is and then goes token by token. Here is the time for *one more* token, and the
# memory that must be kept for it, after a prefix of growing length.

# %%
prefixes = [64, 256, 1024, 4096, 16384]
token = torch.randn(1, 1, WIDTH)
decoding: dict[str, list[float]] = {name: [] for name in layers}
memory: dict[str, list[float]] = {name: [] for name in layers}
with torch.no_grad():
    for name, layer in layers.items():
        for length in prefixes:
            _, state = layer(torch.randn(1, length, WIDTH))
            decoding[name].append(1e6 * seconds(partial(layer, token, state), repeats=41))
            memory[name].append(4 * numbers_in(state) / 1024)  # KiB of float32
slowdown = {name: taken[-1] / taken[0] for name, taken in decoding.items()}

# %% tags=["hide"]
fig, (left, right) = style.figure(columns=2, height=3.4)
for name, marker in zip(layers, "os^D", strict=True):
    left.loglog(prefixes, decoding[name], marker=marker, markersize=4, label=name)
    right.loglog(prefixes, memory[name], marker=marker, markersize=4)
for ax in (left, right):
    ax.set_xticks(prefixes, [str(length) for length in prefixes])
    ax.minorticks_off()
    ax.set_xlabel("tokens read before")
left.set(title="time for one more token", ylabel="microseconds")
right.set(title="memory kept", ylabel="KiB")
fig.legend(loc="outside lower center", ncols=4)
style.caption(
    fig,
    "One more token after a prefix: time (left) and memory (right). Attention reads its whole cache for every token; "
    "the other three neither know nor care how long the prefix was.",
)

# %% [markdown]
# From {{ prefixes[0] }} to {{ prefixes[-1] }} tokens, attention's next token became {{ slowdown["attention"]:.1f }}
# times as dear, Mamba's {{ slowdown["SSM (Mamba)"]:.1f }} times, and attention's memory grew
# {{ memory["attention"][-1] / memory["attention"][0]:.0f }} times. A model has dozens of layers, and a server
# hundreds of conversations: it is this memory that fills the GPU. (At these small sizes much of the time is the cost
# of calling Python at all. The library's `nn.Stepper` removes that; here we want to compare like with like.)
#
# ## Gradients: vanishing and exploding
#
# An RNN has a second trouble, known since the early nineties. To learn that $y_t$ depends on something $k$ steps
# back, the gradient must travel those $k$ steps, and each multiplies it by $\mathrm{diag}(\tanh')\,W$. A product of
# $k$ similar matrices goes like $\rho^k$: it dies out, or it explodes. We measure
# $\lVert \partial y_t / \partial x_{t-k} \rVert$ directly.

# %%
STEPS = 200


def reach(layer: nn.Module, trials: int = 4) -> Tensor:
    """The norm of the gradient of the last output on the input k steps before it, (STEPS,), k = 0 first."""
    norms = []
    for _ in range(trials):
        x = torch.randn(1, STEPS, WIDTH, dtype=torch.float64).requires_grad_()
        direction = torch.randn(WIDTH, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((layer(x)[0][0, -1] * direction).sum(), x)
        norms.append(gradient[0].norm(dim=-1).flip(0))
    return torch.stack(norms).mean(0)


def rnn(scale: float) -> nn.RNN:
    """An RNN as PyTorch draws it, its recurrent weights times `scale`."""
    layer = nn.RNN(WIDTH, WIDTH, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0 *= scale
    return layer


torch.manual_seed(1)
reaches = {
    "RNN": reach(rnn(1.0)),
    "RNN, recurrent weights times 8": reach(rnn(8.0)),
    "LSTM": reach(nn.LSTM(WIDTH, WIDTH, batch_first=True, dtype=torch.float64)),
    "S4D": reach(S4D(WIDTH, 64, dtype=torch.float64)),
    "Mamba": reach(Mamba(WIDTH, dtype=torch.float64)),
}
kept = {name: (norms[100] / norms[0]).item() for name, norms in reaches.items()}
decades = {name: (norms[100] / norms[0]).log10().item() for name, norms in reaches.items()}

# %% tags=["hide"]
fig, ax = style.figure(height=3.4)
for (name, norms), line in zip(reaches.items(), ("-", "--", "-.", "-", ":"), strict=True):
    ax.semilogy(norms, line, label=name)
ax.set(xlabel="steps back", ylabel="norm of the gradient", ylim=(1e-18, 1e9))
fig.legend(loc="outside lower center", ncols=3)
style.caption(
    fig,
    "How strongly the last output depends on the input some steps back, for fresh layers, in float64. The RNN forgets "
    "exponentially fast, or explodes; an SSM starts with many time scales, the longest of hundreds of steps.",
)

# %% [markdown]
# After 100 steps the RNN keeps about $10^{ {{ decades["RNN"]:.0f }} }$ of its gradient, the LSTM
# $10^{ {{ decades["LSTM"]:.0f }} }$, Mamba $10^{ {{ decades["Mamba"]:.0f }} }$, S4D {{ 100 * kept["S4D"]:.0f }} %.
# With recurrent weights eight times as large the RNN's gradient is instead multiplied by about
# $10^{ {{ decades["RNN, recurrent weights times 8"]:.0f }} }$ over the same distance. Between the two lies a knife's
# edge, and training pushes off it.
#
# In an SSM the same derivative is written down in one line, since nothing bends it:
# $\partial h_t/\partial h_{t-k} = \bar A^k = e^{k\Delta A}$. We choose how fast it fades by choosing $\Delta A$, mode
# by mode, and as long as the real part of $A$ is negative, nothing can explode. The memory is designed, not hoped
# for. (Mamba's curve falls at first, then hardly at all: the first four inputs also come through its short
# convolution, and a fresh state still speaks in a whisper. Training turns up the volume; what counts is the slope.)
#
# ## What this guide builds
#
# 1. [A mass on a spring](01_spring.md): state, input, output, and what a matrix in an exponent means.
# 2. [Discretisation](02_discretisation.md): from flowing time to steps, and which rule is how wrong.
# 3. [Three modes](03_three_modes.md): one layer as recurrence, convolution and scan.
# 4. [HiPPO](04_hippo.md): how a state of fixed size remembers a long past.
# 5. [S4](05_s4.md): the model that made it practical, and what it cannot do.
# 6. [Selective copying](06_selective_copying.md): the task on which a fixed memory fails.
# 7. [Selection](07_selection.md): Mamba's idea, a memory that its input steers.
# 8. [The scan](08_scan.md): a recurrence in parallel.
# 9. [Fusion](09_fusion.md): what fast memory has to do with it.
# 10. [The block](10_block.md): the rest of the layer.
# 11. [Induction](11_induction.md): learning a pattern and carrying it to sequences a thousand times as long.
# 12. [SSD](12_ssd.md): Mamba-2, a recurrence that is also a matrix.
# 13. [Rotation](13_rotation.md): Mamba-3, and what counting needs.
# 14. [A weak spot](14_achilles.md): where the block's convolution misleads it.
# 15. [Decoding](15_decoding.md): the state while a text is written.
#
# Each chapter ends with a check, in which two ways of computing the same thing must agree, and three exercises with
# answers.
#
# ## Check
#
# A layer that keeps a state may be stopped and carried on. Whole sequence or token by token, all four must give the
# same:

# %%
x = torch.randn(1, 50, WIDTH)
with torch.no_grad():
    for name, layer in layers.items():
        state, steps = None, []
        for t in range(50):
            y, state = layer(x[:, t : t + 1], state)
            steps.append(y)
        style.check(f"{name}, at once and token by token", torch.cat(steps, dim=1), layer(x)[0], 1e-5)

# %% [markdown]
# ## Exercises
#
# **1.** A convolution of $W$ taps sees the last $W$ inputs. Stack layers, the taps of layer $l$ being $2^l$ steps apart
# (*dilated*). How many layers of two taps see the last 1024 inputs? Verify it by a gradient.
#
# **2.** From how many tokens on does the cache of attention exceed the state of Mamba at this width? Compute, then
# count.
#
# **3.** Remove the $\tanh$ from an RNN and draw its recurrent matrix orthogonal. What becomes of the gradient over
# 200 steps? Why is this not the end of the story?

# %% [markdown] tags=["answer"]
# **1.** Ten layers: their reaches add up, $1 + 2 + 4 + \dots + 512 = 1023$ steps back. The logarithm is what makes
# WaveNet possible.

# %% tags=["answer"]
signal = torch.zeros(1, 1, 1200, requires_grad=True)
y = signal
for level in range(10):
    y = nn.functional.conv1d(nn.functional.pad(y, (2**level, 0)), torch.ones(1, 1, 2), dilation=2**level)
(gradient,) = torch.autograd.grad(y[0, 0, -1], signal)
print(f"inputs that the last output sees: {int((gradient != 0).sum())}")

# %% [markdown] tags=["answer"]
# **2.** Attention keeps a key and a value of {{ WIDTH }} numbers, and a position, for each token; Mamba keeps
# {{ numbers_in(layers["SSM (Mamba)"](token)[1]) }} numbers in all.

# %% tags=["answer"]
mamba_state = numbers_in(layers["SSM (Mamba)"](token)[1])
computed = mamba_state // (2 * WIDTH + 1) + 1
counted = next(n for n in range(1, 1000) if numbers_in(layers["attention"](torch.randn(1, n, WIDTH))[1]) > mamba_state)
print(f"from {computed} tokens on (computed), {counted} (counted)")

# %% [markdown] tags=["answer"]
# **3.** It neither fades nor grows: an orthogonal matrix keeps lengths. But such a layer never forgets, either: noise
# from the beginning of time drowns the present, and there is no way to say what may go. A useful memory fades at
# *chosen* rates, which is $A$, or lets the input decide, which is selection.

# %% tags=["answer"]
W = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
gradient, norms = torch.randn(WIDTH, dtype=torch.float64), []
for _ in range(200):
    norms.append(gradient.norm().item())
    gradient = W.T @ gradient
print(f"the gradient's norm after 200 steps, over that at first: {norms[-1] / norms[0]:.12f}")
