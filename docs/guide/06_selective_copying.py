# ---
# title: Selective copying
# ---
# %% [markdown]
# # Selective copying
#
# The models of the last chapter remember for thousands of steps and train as fast as a convolution. What is left to
# wish for? This chapter is about one small task that they fail, while looking perfectly suited for it. The reason they
# fail is the reason Mamba exists.
#
# ## Two tasks that look alike
#
# **Copying.** A few letters, then silence, then a row of question marks: write the letters down, one for each mark.
#
# **Selective copying.** The same letters, but scattered among the silence. Write them down in their order, without the
# gaps (arXiv 2312.00752, section 4.1.1).

# %%
import time
from collections.abc import Callable

import style
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.lab.background import convolve
from mambakit.lab.tasks import Batch, InductionHeads, SelectiveCopying, accuracy
from mambakit.nn import Backbone

selective = SelectiveCopying(length=32, data_tokens=4, vocabulary=8)  # token 0 is silence, 7 asks, 1 to 6 are letters
WHOLE = selective.length + selective.data_tokens


def draw_selective(size: int, generator: torch.Generator) -> Batch:
    """Letters at random places."""
    return selective.batch("train", size, WHOLE, generator)


def draw_copying(size: int, generator: torch.Generator) -> Batch:
    """The same, but for the letters being the first tokens of all."""
    tokens, letters, group = draw_selective(size, generator)
    tokens[:, : selective.length] = 0
    tokens[:, : selective.data_tokens] = letters
    return Batch(tokens, letters, group)


Draw = Callable[[int, torch.Generator], Batch]
TASKS: dict[str, Draw] = {"copying": draw_copying, "selective copying": draw_selective}
for name, draw in TASKS.items():
    print(name)
    for tokens, answers, _ in zip(*draw(3, torch.Generator().manual_seed(3)), strict=True):
        row = "".join("·abcdef?"[token] for token in tokens)
        print(f"   {row}  ->  {''.join('·abcdef?'[answer] for answer in answers)}")

# %% [markdown]
# For a person both are the same task. Look at them through the eyes of a machine that measures *distances in time*,
# and they could not be more different. In copying, the answer to every question mark stands exactly
# {{ selective.length }} places before it. In selective copying it stands anywhere.
#
# ## The best convolution there is
#
# A linear time-invariant layer, S4 or any other, is a convolution with a fixed kernel (chapter 3):
#
# $$ y_t = \sum_{l \ge 0} K_l\, u_{t-l} . $$
#
# $K_l$ says what becomes of an input that is $l$ steps old, whatever it is and whatever came in between. For copying
# one lag is enough, $l =$ {{ selective.length }}: a delay line. For selective copying the lag differs from sequence to
# sequence, and the kernel can't.
#
# No training is needed to find out how far a kernel gets. Write tokens as one-hot vectors and let every $K_l$ be a
# full matrix, so that no layer of this kind, with any $A$, $B$, $C$ and any number of channels, can do better. What
# should come out is one-hot too, so the best kernel is a problem of least squares, solved in closed form.


# %%
def windows(tokens: Tensor, at: int) -> Tensor:
    """What a causal kernel sees at position `at`, the latest token first: (batch, lags * vocabulary)."""
    seen = F.one_hot(tokens[:, : at + 1].flip(1)).float()
    return F.pad(seen, (0, 0, 0, tokens.shape[1] - at - 1)).flatten(1)


def best_kernel(tokens: Tensor, targets: Tensor, marks: range) -> Tensor:
    """K (lags * vocabulary, vocabulary) by least squares, for some of the question marks at once."""
    first = tokens.shape[1] - targets.shape[1]
    X = torch.cat([windows(tokens, first + m) for m in marks]).double()
    Y = torch.cat([F.one_hot(targets[:, m], selective.vocabulary) for m in marks]).double()
    ridge = 1e-3 * torch.eye(X.shape[1], dtype=torch.float64)  # inputs that never occur must not make it singular
    return torch.linalg.solve(X.T @ X + ridge, X.T @ Y).float()


def logits_of(kernels: list[Tensor], tokens: Tensor) -> Tensor:
    """What the kernel of each question mark answers there, (batch, marks, vocabulary)."""
    first = tokens.shape[1] - len(kernels)
    return torch.stack([windows(tokens, first + m) @ K for m, K in enumerate(kernels)], dim=1)


marks = range(selective.data_tokens)
rows, shared = [], {}
for name, draw in TASKS.items():
    seen, new = (draw(10_000, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    shared[name] = best_kernel(seen.tokens, seen.targets, marks)
    rows.append((name, *accuracy(logits_of([shared[name]] * len(marks), new.tokens), new.targets)))
own = [best_kernel(seen.tokens, seen.targets, range(m, m + 1)) for m in marks]
rows.append(("selective copying, a kernel for each mark", *accuracy(logits_of(own, new.tokens), new.targets)))
style.table(
    ["the best kernel for", "tokens right, %", "sequences right, %"],
    [(name, 100 * token, 100 * sequence) for name, token, sequence in rows],
)

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.4, sharey=True)
for ax, (name, K) in zip(axes, shared.items(), strict=True):
    letters = K.reshape(WHOLE, selective.vocabulary, selective.vocabulary)[:, 1:-1, 1:-1]  # from letters to letters
    itself, all_letters = letters.diagonal(dim1=1, dim2=2).mean(1), letters.mean((1, 2))
    ax.bar(range(WHOLE), (itself - all_letters) * 6 / 5, color=style.COLOURS[0])  # above its weight for the others
    ax.set(title=name, xlabel="age of the input, steps")
axes[0].set_ylabel("weight of a letter\nfor itself")
style.caption(
    fig,
    "The best kernels. Copying is a delay line: one lag, weight one. For selective copying a letter may be of any "
    "age, and the best that a fixed kernel can do is to listen to all ages a little.",
)

# %% [markdown]
# One of {{ selective.vocabulary - 2 }} letters guessed blindly is right in {{ 100 / (selective.vocabulary - 2):.0f}} %
# of cases, and the best of all kernels in {{ 100 * rows[1][1]:.0f}} %. It has found out *which letters occurred*, and
# answers every question mark alike, with the most frequent. Be generous and give each question mark a kernel of its
# own: {{ 100 * rows[2][1]:.0f}} % of the letters, but {{ 100 * rows[2][2]:.0f}} % of the sequences. That one goes by
# place: an early letter was *probably* the first. But order is a matter of what came before what, not of how long ago.
#
# ## Networks, trained
#
# That was one linear layer. A real model stacks several with nonlinearities in between, and the whole is not linear
# any more. So we train two, of the same width, depth and size, which differ in their layers alone: S4D, whose step,
# $B$ and $C$ are fixed once training is over, and Mamba, which makes them anew from each token. (Chapter 7 says how;
# for now it is enough that it can.) Training ends early once a model answers every test sequence.


# %%
class Reader(nn.Module):
    """Embedding, blocks of one mixer, head: logits at the last tokens."""

    def __init__(self, mixer: str, options: dict[str, int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(selective.vocabulary, 32)
        self.backbone = Backbone(32, 2, mixer, options)
        self.head = nn.Linear(32, selective.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.backbone(self.embedding(tokens))
        return self.head(hidden[:, -selective.data_tokens :])


MODELS = {"S4D": ("s4d", {"d_state": 80}), "Mamba": ("mamba", {"d_state": 16})}
STEPS, EVERY = 1200, 50


def train(name: str, draw: Draw) -> tuple[Reader, list[tuple[int, float, float]], float]:
    """The model, (step, token accuracy, sequence accuracy) along its training, and the seconds of a step."""
    torch.manual_seed(0)
    model, generator = Reader(*MODELS[name]), torch.Generator().manual_seed(1)
    test = draw(256, torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS, pct_start=0.1)
    curve, seconds = [(0, *accuracy(model(test.tokens).detach(), test.targets))], 0.0
    while curve[-1][0] < STEPS and curve[-1][2] < 1.0:
        started = time.perf_counter()
        for _ in range(EVERY):
            tokens, targets, _ = draw(16, generator)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
        seconds += time.perf_counter() - started
        with torch.no_grad():
            curve.append((curve[-1][0] + EVERY, *accuracy(model(test.tokens), test.targets)))
    return model, curve, seconds / curve[-1][0]


trained = {(task, name): train(name, draw) for task, draw in TASKS.items() for name in MODELS}

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.8, sharey=True)
for ax, task in zip(axes, TASKS, strict=True):
    for name, colour in zip(MODELS, style.COLOURS, strict=False):
        steps, token, sequence = zip(*trained[task, name][1], strict=True)
        ax.plot(steps, token, color=colour, linestyle=":", label=f"{name}, tokens")
        ax.plot(steps, sequence, color=colour, label=f"{name}, whole sequences")
        ax.plot(steps[-1], sequence[-1], "o", color=colour, markersize=4)
    ax.set(title=task, xlabel="training step", xlim=(-0.03 * STEPS, 1.03 * STEPS), ylim=(-0.03, 1.05))
axes[0].set_ylabel("right, share of the test set")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
style.caption(
    fig,
    "Learning curves. Copying: the time-invariant S4D has it almost at once, Mamba needs longer. Selective copying: "
    "Mamba learns it, S4D creeps. A dot marks the end of a training.",
)

# %%
style.table(
    ["task", "model", "parameters", "steps trained", "tokens right, %", "sequences right, %", "ms a step"],
    [
        (task, name, sum(p.numel() for p in model.parameters()), at, 100 * token, 100 * sequence, 1e3 * seconds)
        for (task, name), (model, [*_, (at, token, sequence)], seconds) in trained.items()
    ],
)
ends = {key: curve[-1] for key, (_, curve, _) in trained.items()}

# %% [markdown]
# Read the table one model at a time. Copying is *easier* for S4D: a delay is what its kernels are made of, and
# it was done after {{ ends["copying", "S4D"][0] }} steps, where Mamba took {{ ends["copying", "Mamba"][0] }}. On
# selective copying S4D got {{ 100 * ends["selective copying", "S4D"][1]:.0f}} % of the tokens and
# {{ 100 * ends["selective copying", "S4D"][2]:.0f}} % of the sequences right in
# {{ ends["selective copying", "S4D"][0] }} steps, Mamba {{ 100 * ends["selective copying", "Mamba"][1]:.1f}} % and
# {{ 100 * ends["selective copying", "Mamba"][2]:.1f}} % in {{ ends["selective copying", "Mamba"][0] }}.
#
# Set S4D beside the table before: its {{ 100 * ends["selective copying", "S4D"][1]:.0f}} % of the tokens are to be
# compared with the {{ 100 * rows[2][1]:.0f}} % that linear kernels reach, one for each mark. The nonlinearities between
# its layers tell the question marks apart. Counting letters through fixed kernels is what it finds hard. It is not
# impossible for a stack of them, and with so little silence a longer training would still gain; at the paper's length
# of 4096 S4 is reported with 18.3 % and the selective layer with 97.0 %, the rest of the model being the same
# (arXiv 2312.00752, table 1). And this is one seed of a small model: where the curves end depends on it.
#
# ## Which answers go wrong?
#
# The first answer is the oldest letter, the last one the newest. Where does the time-invariant model lose them?

# %%
tokens, targets, _ = draw_selective(2_000, torch.Generator().manual_seed(4))
with torch.no_grad():
    logits = {name: trained["selective copying", name][0](tokens) for name in MODELS}
logits["kernel for each mark"] = logits_of(own, tokens)
right = {name: (answer.argmax(-1) == targets).float().mean(0) for name, answer in logits.items()}

# %% tags=["hide"]
fig, ax = style.figure(height=2.4)
for i, (name, share) in enumerate(right.items()):
    ax.bar(torch.arange(1, 5) + 0.27 * (i - 1), share, width=0.25, label=name, color=style.COLOURS[i])
ax.axhline(1 / 6, color=style.INK, linestyle=":", linewidth=1, label="blind guess")
ax.set(xlabel="place of the letter among the letters", ylabel="right", xticks=[1, 2, 3, 4], ylim=(0, 1.05))
fig.legend(loc="outside upper center", ncols=4)
style.caption(
    fig,
    "Accuracy by the place of the answer. First and last letters can be guessed by where they stand; for those in the "
    "middle one must count. S4D follows the fixed kernels, Mamba counts.",
)

# %% [markdown]
# ## What would be enough
#
# Suppose a model could **stop its clock** at every dot. Silence would then take no time at all, the letters would
# stand one right after the other as far as the state can tell, and selective copying would *be* copying. The lag to
# every answer would be known again, counted in letters.
#
# But whether the clock runs must depend on the token that comes in. In S4D the clock is the step $\Delta$, learned but
# the same for each token. Let the input choose it, and the model is no longer time-invariant: no fixed kernel, no
# convolution, no FFT. That is the trade of the next chapter.
#
# ## The other task that needs it: induction heads
#
# Selective copying needs a memory that ignores. The second task of Mamba's paper needs one that *associates*: when a
# token comes that came before, say what followed it then. Transformers grow pairs of attention heads for this, called
# induction heads, and much of learning from a prompt is traced back to them (arXiv 2209.11895).

# %%
induction = InductionHeads(length=24, vocabulary=16)
for row, answer, _ in zip(*induction.batch("train", 3, 24, torch.Generator().manual_seed(5)), strict=True):
    print("".join("abcdefghijklmno*"[token] for token in row), " -> ", "abcdefghijklmno"[answer])

# %% [markdown]
# Again the lag is unknown, and again the best fixed kernel can but guess. What is needed here is to *open* the state
# for one token, the one after the star, and to keep it shut through all the others. Chapter 11 trains it, and asks for
# it at lengths never trained on.
#
# ## Check
#
# An S4D layer stays a fixed convolution however it was trained: its recurrence, step by step, against its kernel.
# And Mamba's answers are the same whether it reads a sequence at once or token by token, with a state in its hand.

# %%
layer = trained["selective copying", "S4D"][0].backbone.layers[0].mixer
with torch.no_grad():
    log_Ab, Bb = layer.discretised()
    C, u = torch.view_as_complex(layer.C), torch.randn(WHOLE, layer.d_model, generator=torch.Generator().manual_seed(6))
    h, by_steps = torch.zeros_like(Bb), []
    for u_t in u:
        h = torch.exp(log_Ab) * h + Bb * u_t[:, None]
        by_steps.append(2 * (C * h).sum(-1).real)
    style.check(
        "the trained S4D step by step and as a convolution",
        torch.stack(by_steps, dim=1),
        convolve(u.T, layer.kernel(WHOLE)),
        1e-4,
    )

    model, state, found = trained["selective copying", "Mamba"][0], None, []
    for t in range(WHOLE):
        hidden, state = model.backbone(model.embedding(tokens[:64, t : t + 1]), state)
        found.append(model.head(hidden))
    style.check(
        "the trained Mamba whole and token by token",
        torch.cat(found[selective.length :], dim=1),
        model(tokens[:64]),
        1e-4,
    )

# %% [markdown]
# ## Exercises
#
# **1.** How right would a model be that knows which letters occurred and how often, but nothing of their order?
# Compare with the best kernel.
#
# **2.** Give the kernel a crutch: replace every letter by one that also says how many letters came before it (*first
# a*, *second a*, ...). Does one fixed kernel now solve selective copying? And if each question mark may have a kernel
# of its own? Which part of a selective model plays which role?
#
# **3.** How does the best kernel fare as the silence grows? Plot its accuracy for lengths from 4, where there is no
# silence at all, to 32.

# %% [markdown] tags=["answer"]
# **1.** It should always name the most frequent letter. With $n$ letters of 6 kinds drawn at random, simulate:

# %% tags=["answer"]
counts = F.one_hot(targets, selective.vocabulary).sum(1)
unordered = (counts.amax(1) / selective.data_tokens).mean().item()
print(f"order unknown: {100 * unordered:.0f} %; best kernel: {100 * rows[1][1]:.0f} %")

# %% [markdown] tags=["answer"]
# Hardly anything separates them: a kernel knows the letters, and next to nothing of their order.
#
# **2.** One kernel for all marks still fails. It sees *first a* and *second b*, but not which of them it is being
# asked for: a linear layer adds up what it sees, and the question mark can only add a constant. With a kernel for each
# mark it is solved. So two things are missing in a time-invariant layer: what is *written* must depend on the input
# (that is $\Delta$ and $B$: the crutch), and what is *read* must (that is $C$: the kernel chosen by the mark).


# %% tags=["answer"]
def numbered(tokens: Tensor) -> Tensor:
    """The same sequences with the letters numbered: the n-th letter k, n from 0, becomes the token 6 n + k."""
    letter = (tokens > 0) & (tokens < selective.vocabulary - 1)
    asked = torch.where(tokens > 0, 6 * selective.data_tokens + 1, 0)
    return torch.where(letter, 6 * (letter.cumsum(1) - 1) + tokens, asked)


code, new_code = numbered(seen.tokens[:4_000]), numbered(tokens)
for says, each in (("one kernel", [marks] * len(marks)), ("its own", [range(m, m + 1) for m in marks])):
    crutch = [best_kernel(code, seen.targets[:4_000], some) for some in each]
    print(f"{says}: {100 * accuracy(logits_of(crutch, new_code), targets).token:.0f} % of the tokens")

# %% [markdown] tags=["answer"]
# **3.** Without silence selective copying is copying, and a delay of four solves it. Every dot that is added blurs
# the lag.

# %% tags=["answer"]
lengths, shares = [4, 5, 6, 8, 12, 16, 24, 32], []
for length in lengths:
    task = SelectiveCopying(length=length, data_tokens=4, vocabulary=8)
    seen, new = (task.batch("train", 4_000, length + 4, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    K = best_kernel(seen.tokens, seen.targets, marks)
    shares.append(accuracy(logits_of([K] * len(marks), new.tokens), new.targets).token)
fig, ax = style.figure(height=2.2)
ax.plot(lengths, shares, marker="o", markersize=4)
ax.axhline(unordered, color=style.QUIET, linestyle=":", linewidth=1)
ax.text(32, unordered - 0.08, "order unknown", ha="right", color=style.QUIET, fontsize=8)
ax.set(xlabel="tokens before the question marks", ylabel="tokens right", ylim=(0, 1.05))
style.caption(fig, "The best fixed kernel on selective copying, by length. Four letters without silence are certain.")
