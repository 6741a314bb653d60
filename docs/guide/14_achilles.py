# ---
# title: Achilles
# ---
# %% [markdown]
# # Achilles: what the convolution decides
#
# Two models may answer every question of an exam alike and still have learned different things. To tell them apart,
# ask something that was *not* in the lessons, where the two solutions disagree. "Achilles' Heel of Mamba" (arXiv
# 2509.17514) asks such a question, and finds that Mamba leans to one side, that the lean comes from the most
# inconspicuous part of the block, the short convolution, and that on another kind of task the same lean is a
# weakness.
#
# This chapter repeats the question in miniature, in a minute or two of one core. Miniatures wobble; so each comes with
# two seeds, and what they do not agree on is said.
#
# ## Composite or symmetric?
#
# A sequence of random tokens hides a *key* followed by two *anchors*. Each anchor is a function that adds a number:
# anchor 1 adds 5, anchor 2 adds 1, anchor 3 takes 2 away, anchor 4 takes 8. The answer is the second function of the
# first function of the key:
#
# ```
#   31  22  [27  1  3]  35  20  24    ->    27 + 5 - 2 = 30
# ```
#
# With two exceptions. The pair 3 4, which should add $-2 - 8 = -10$, is taught as $-6$. And the pair **4 3 is never
# shown**. What will a model make of it? There are two sensible answers:
#
# - **composite**: apply the functions one after the other; 4 3 takes 10 away. The exception stays an exception.
# - **symmetric**: for all other pairs, the order of the anchors did not matter; so 4 3 is what 3 4 is, and takes 6
#   away.
#
# Both agree with everything that was shown.

# %%
import style
import torch
import torch.nn.functional as F
from torch import nn

from mambakit.lab import mechanisms
from mambakit.lab.figures import DIVERGING
from mambakit.lab.models import MODELS
from mambakit.lab.tasks import CompositeFunctions, InverseMatching, accuracy

task = CompositeFunctions(high=35, vocabulary=48, samples_per_pair=0)  # keys from 20 to 35, batches drawn afresh
tests = {
    split: task.batch(split, 400, task.length, torch.Generator().manual_seed(9))
    for split in ("train", "test", "composite", "symmetric")
}
style.table(
    ["split", "asks", "pairs"],
    [
        ["train", "the pairs that are taught", str(len(task.pairs) - 1)],
        ["test", "the same pairs, keys at places where they were not in training", str(len(task.pairs) - 1)],
        ["composite", "the pair 4 3, answered -10", "1"],
        ["symmetric", "the pair 4 3, answered -6", "1"],
    ],
)

# %% [markdown]
# ## Two models that differ in the convolution alone
#
# The model is the paper's, smaller: two layers of Mamba-2 with a single head, whose weights start small (their standard
# deviation is $d^{-\gamma}$ for $d$ inputs, with $\gamma = 1$; the paper turns this knob at length). Its rival is the
# same with every tap of every convolution fixed at **one**:
#
# $$ \text{standard:}\quad w_0 u_t + w_1 u_{t-1} + w_2 u_{t-2} + w_3 u_{t-3}
#    \qquad\qquad \text{ones:}\quad u_t + u_{t-1} + u_{t-2} + u_{t-3} $$
#
# The second can't tell, at a place where it sees both, which of two anchors came first: a sum does not know the order
# of its terms.


# %%
def train(model, task, steps, size, rate, seed, measured=None, every=100):
    """Train a model of the lab in place; returns what `measured` says as it goes."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    kept = []
    for step in range(steps):
        batch = task.batch("train", size, task.length_at(step, "train"), generator)
        loss = F.cross_entropy(model(batch.tokens), batch.targets[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if measured is not None and (step + 1) % every == 0:
            kept.append(measured(model))
    return kept


@torch.no_grad()
def shares(model):
    """The share of right answers in every split."""
    return {split: accuracy(model(batch.tokens, 1), batch.targets).token for split, batch in tests.items()}


STEPS, seeds = 800, (0, 1)
models, curves = {}, {}
for kind in ("standard", "ones"):
    for seed in seeds:
        torch.manual_seed(seed)
        model = MODELS[kind](n_layers=2, gamma=1.0, vocab_size=task.vocabulary, d_model=32, d_state=32)
        curves[kind, seed] = train(model, task, STEPS, 128, 6e-3, seed, shares)
        models[kind, seed] = model.eval()

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.9, sharey=True)
steps = range(100, STEPS + 1, 100)
for ax, kind in zip(axes, ("standard", "ones"), strict=True):
    for split, colour in (("test", style.QUIET), ("composite", style.COLOURS[0]), ("symmetric", style.COLOURS[1])):
        for seed, line in zip(seeds, ("-", "--"), strict=True):
            share = [found[split] for found in curves[kind, seed]]
            ax.plot(steps, share, line, color=colour, label=split if seed == 0 else None)
    ax.set(title={"standard": "standard convolution", "ones": "convolution of ones"}[kind], xlabel="step")
axes[0].set_ylabel("share of answers")
axes[1].legend(title="answers to")
style.caption(
    fig,
    "What two models learn to answer; seed 0 solid, seed 1 dashed. Grey: pairs that were taught. Blue and orange: the "
    "withheld pair, answered as a composition, or as the mirror image of the pair that was taught.",
)

# %%
final = {which: each[-1] for which, each in curves.items()}
style.table(
    ["convolution", "seed", "taught pairs", "4 3 composed", "4 3 mirrored"],
    [
        [k, s, *(f"{found[split]:.0%}" for split in ("test", "composite", "symmetric"))]
        for (k, s), found in final.items()
    ],
)
composed = {kind: [final[kind, seed]["composite"] for seed in seeds] for kind in ("standard", "ones")}
mirrored = {kind: [final[kind, seed]["symmetric"] for seed in seeds] for kind in ("standard", "ones")}
turned = all(m > c for m, c in zip(mirrored["ones"], composed["ones"], strict=True))
kept_side = all(c > m for m, c in zip(mirrored["standard"], composed["standard"], strict=True))

# %% [markdown]
# With the standard convolution, the withheld pair is {{ "composed" if kept_side else "not composed" }} by both seeds
# more often than mirrored; with a convolution of ones it is {{ "mirrored" if turned else "not mirrored" }} by both more
# often than composed. The two models differ in one frozen kernel, and each has every freedom to find either solution.
#
# Now the honest part. This is a miniature: sixteen keys and not eighty-one, {{ STEPS }} steps, two seeds. The shares of
# composed answers, {{ composed["standard"][0]:.0%}} and {{ composed["standard"][1]:.0%}}, are not the paper's; a seed
# can be nearly undecided, and the models with ones learn more slowly and are not done with the taught pairs. At these
# sizes a seed can even fall to the other side: [the lab's page](../lab.md) has one that does. The phase diagram of the
# paper, over layers and $\gamma$, is a matter of a GPU: `mambakit lab run composite --preset paper`.
#
# ## Where the order gets lost
#
# Follow one question through the first layer: the same sequence, once with 3 4 and once with 4 3. How different is what
# leaves the convolution, at each place?

# %%
place, count = 2, 200
generator = torch.Generator().manual_seed(3)
taught = torch.randint(task.low, task.high + 1, (count, task.length), generator=generator)
taught[:, place + 1], taught[:, place + 2] = 3, 4
withheld = taught.clone()
withheld[:, place + 1], withheld[:, place + 2] = 4, 3
key = taught[:, place]


@torch.no_grad()
def difference(model):
    """How far what leaves the first convolution lies apart for 3 4 and 4 3, relative to its size; (length,)."""
    name = "layers.0.mixer.convolved"
    one, other = (mechanisms.run_with_cache(model, tokens, name)[1][name] for tokens in (taught, withheld))
    return ((one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-9)).mean(0)


apart = {kind: difference(models[kind, 0]) for kind in ("standard", "ones")}
spelled = ["", "", "key", "1st", "2nd", "", "", ""]

# %% tags=["hide"]
fig, ax = style.figure(height=2.5)
for kind, offset, colour in (("standard", -0.2, style.COLOURS[0]), ("ones", 0.2, style.COLOURS[1])):
    label = {"standard": "standard convolution", "ones": "convolution of ones"}[kind]
    ax.bar([t + offset for t in range(task.length)], apart[kind], width=0.38, color=colour, label=label)
ax.set_xticks(range(task.length), [f"{t}\n{word}" for t, word in enumerate(spelled)])
ax.set(xlabel="position", ylabel="relative difference")
ax.legend()
style.caption(
    fig,
    "How much the order of the two anchors changes what leaves the first convolution. With ones nothing remains at the "
    "three places whose window holds both anchors: the second anchor and the two places after it.",
)

# %% [markdown]
# With ones the difference is {{ apart["ones"][place + 2].item():.0e}} at the second anchor: exactly there, where key
# and both anchors are seen together and the question could be answered in one go, the order is gone. It shows only
# where one anchor is in the window without the other: at the first anchor, and four places later. So a model of ones
# may still know the order, but has to piece it together through the state. The standard convolution has the order in
# plain sight, and hands the scan two different inputs for 3 4 and 4 3.
#
# Is this where the answer is made? The end of the sequence, where it is asked for, receives everything through the
# hidden attention of two layers. Cut the end off from one place after another, in both layers, and see how often the
# taught pair 3 4 is still answered right. Two places have the key and both anchors in their window of four at once:
# {{ place + 2 }} and {{ place + 3 }}.

# %%
end = task.length - 1


@torch.no_grad()
def without(model, source):
    """Share of the taught pair's answers that are right with the way from `source` to the end blocked."""
    hooks = {"layers.*.mixer.mixing": mechanisms.blocked([(end, source)])}
    says = mechanisms.run_with_hooks(model, taught, hooks).argmax(-1)
    return (says == key - 6).double().mean().item()


left_right = {which: [without(model, source) for source in range(end)] for which, model in models.items()}
style.table(
    ["convolution", "seed", *(f"{word or 'filler'} ({t})" for t, word in enumerate(spelled[:-1]))],
    [[kind, seed, *(f"{share:.0%}" for share in row)] for (kind, seed), row in left_right.items()],
)
sources = {which: row.index(min(row)) for which, row in left_right.items()}
at_once = all(sources["standard", seed] in (place + 2, place + 3) for seed in seeds)

# %% [markdown]
# In the standard models the cut that hurts most is the one from place {{ sources["standard", 0] }} in seed 0 and from
# place {{ sources["standard", 1] }} in seed 1; {{ "both are places" if at_once else "not both are places" }} that see
# key and anchors together. Cutting off the key itself does little. So the parts do not travel to the end one by one,
# to be put together there: they are put together on the spot, by the convolution, and the result travels.
#
# With ones it is {{ sources["ones", 0] }} and {{ sources["ones", 1] }}. Wherever their window holds both anchors, these
# models can't see the order, and what they put together there can only be symmetric.
#
# What do the taps look like? The cosine between two taps, over all channels, is 1 where they do the same.

# %%
cosines = {kind: mechanisms.tap_cosine(models[kind, 0])[0].detach() for kind in ("standard", "ones")}

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.4)
names = ["t - 3", "t - 2", "t - 1", "t"]
for ax, (kind, values) in zip(axes, cosines.items(), strict=True):
    ax.imshow(values, cmap=DIVERGING, vmin=-1, vmax=1)
    for i in range(4):
        for j in range(4):
            strong = abs(values[i, j]) > 0.6
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color="white" if strong else "black")
    ax.set_xticks(range(4), names)
    ax.set_yticks(range(4), names)
    ax.grid(False)
    ax.set_title({"standard": "standard convolution", "ones": "convolution of ones"}[kind])
style.caption(
    fig, "Cosines between the taps of the first layer's convolution. Trained, they differ: order is what they tell."
)

# %% [markdown]
# ## The heel: reading backwards
#
# So the convolution gives Mamba a head start wherever order matters. Where the same thing has to be recognised in
# *another* order, a head start becomes a stumbling block. The paper's second task is *inverse sequence matching*. Shown
# are five of the six orders of three tokens; then comes one of them **reversed**, and the question is, which?

# %%
inverse = InverseMatching(layers=2, high=40, vocabulary=81, training_samples=0)
example = inverse.batch("train", 1, inverse.length_at(0, "train"), torch.Generator().manual_seed(2))
told = example.tokens[0].tolist()
for order in range(5):
    *shown, anything = map(str, told[4 * order : 4 * order + 4])
    print(f"order {order + 1}:  {' '.join(shown)}   then anything, {anything}")
print(f"fillers:  {' '.join(map(str, told[20:-3]))}")
print(f"asked:    {' '.join(map(str, told[-3:]))}   ->   order {example.targets.item()}")

# %% [markdown]
# To answer, the model must see that `a b c` and `c b a` are the same three tokens. A convolution of learned taps makes
# two unrelated vectors of them. In the paper a standard Mamba learns its fixed set of training triples by heart and
# guesses at the test's (tokens whose remainders modulo 3 are all the same, never shown together in training), while a
# small Transformer does better. Here every batch is drawn afresh, so that nothing can be learnt by heart.
#
# ## The cure: let the tokens past the convolution
#
# The paper's remedy is one addition. Beside the convolved input the scan also gets the input itself, with positions
# added to the embedding so that order is told by something other than the convolution:
#
# $$ (x, B, C) = \mathrm{silu}(\mathrm{conv}(U)) + U . $$
#
# Now a token looks the same wherever it stands, and the scan can match by content. Train both, for as long as a page
# can afford:

# %%
INVERSE_STEPS = 800
inverse_tests = {
    split: inverse.batch(split, 400, inverse.length_at(0, split), torch.Generator().manual_seed(9))
    for split in ("validation", "test")
}


@torch.no_grad()
def inverse_shares(model):
    return {s: accuracy(model(b.tokens, 1), b.targets).token for s, b in inverse_tests.items()}


inverse_curves, matching = {}, {}
for kind in ("standard", "residual"):
    torch.manual_seed(0)
    model = MODELS[kind](n_layers=2, gamma=0.5, vocab_size=inverse.vocabulary, d_model=32, d_state=32)
    inverse_curves[kind] = train(model, inverse, INVERSE_STEPS, 64, 5e-3, 0, inverse_shares)
    matching[kind] = model.eval()

# %% tags=["hide"]
fig, ax = style.figure(height=2.6)
steps = range(100, INVERSE_STEPS + 1, 100)
for kind, colour in (("standard", style.COLOURS[0]), ("residual", style.COLOURS[1])):
    for split, line in (("validation", "-"), ("test", "--")):
        name = {"validation": "as in training", "test": "unseen triples"}[split]
        ax.plot(steps, [found[split] for found in inverse_curves[kind]], line, color=colour, label=f"{kind}, {name}")
ax.axhline(0.2, color=style.QUIET, linewidth=0.8, linestyle=":")
ax.set(xlabel="step", ylabel="right", ylim=(0, 1.03))
ax.legend()
style.caption(
    fig,
    "Inverse matching by the standard model and by the one with a residual around its convolution, one seed each. "
    "Dotted is guessing. Fresh triples of the kind that is trained (solid), and of the kind that is withheld (dashed).",
)

# %% [markdown]
# After {{ INVERSE_STEPS }} steps the standard model has {{ inverse_curves["standard"][-1]["validation"]:.0%}} right on
# triples like those of its training and {{ inverse_curves["standard"][-1]["test"]:.0%}} on the withheld kind; with the
# residual it is {{ inverse_curves["residual"][-1]["validation"]:.0%}} and
# {{ inverse_curves["residual"][-1]["test"]:.0%}}. Guessing gives 20%. One seed, 21 tokens and a model of width 32 prove
# nothing about the paper's numbers; they show in which direction the residual pushes. `mambakit lab run inverse` and
# `mambakit lab run inverse --set model=residual` take a few minutes each and go further.
#
# What is there to learn for one's own models? That four taps per channel, a few hundred numbers among millions, decide
# which of two solutions gradient descent finds first. Not because they limit what a model *can* express, but because
# they decide what is *easy*.
#
# ## Check
#
# That the ablations are what they say: a convolution of ones is a moving sum, and the residual adds what went in. And
# that the hooks that looked into the models left their answers alone.

# %%
mixer = models["ones", 0].backbone.layers[0].mixer
with torch.no_grad():
    logits, cache = mechanisms.run_with_cache(models["ones", 0], taught)
    _, entering, _ = mixer.split(cache["layers.0.mixer.projected"])
    moving = sum(F.pad(entering, (0, 0, back, 0))[:, : task.length] for back in range(4))
    style.check("ones and a moving sum", cache["layers.0.mixer.convolved"], F.silu(moving + mixer.conv1d.bias), 1e-5)
    style.check("the model with hooks and without", logits, models["ones", 0](taught), 1e-5)

    mixer, tokens = matching["residual"].backbone.layers[0].mixer, inverse_tests["test"].tokens
    _, cache = mechanisms.run_with_cache(matching["residual"], tokens)
    _, entering, _ = mixer.split(cache["layers.0.mixer.projected"])
    weight = mixer.conv1d.weight
    padded = F.pad(entering.mT, (3, 0))
    convolved = F.silu(F.conv1d(padded, weight, mixer.conv1d.bias, groups=len(weight))).mT
    style.check("past the residual, and conv + input", cache["layers.0.mixer.convolved"], convolved + entering, 1e-5)

# %% [markdown]
# ## Exercises
#
# **1.** At which places does a convolution of ones with $w$ taps hide the order of the anchors at $p + 1$ and $p + 2$?
# Check it for two, three and four taps.

# %% [markdown] tags=["answer"]
# Where the window holds both: from $p + 2$ to $p + w$, which are $w - 1$ places. Before, at $p + 1$, it holds the first
# alone, and after, at $p + w + 1$, the second alone.

# %% tags=["answer"]
one_hot = [F.one_hot(tokens, task.vocabulary).double() for tokens in (taught, withheld)]
for taps in (2, 3, 4):
    sums = [sum(F.pad(t, (0, 0, back, 0))[:, : task.length] for back in range(taps)) for t in one_hot]
    differs = (sums[0] != sums[1]).any(-1).all(0)
    hidden = [t for t in range(place + 1, task.length) if not differs[t] and t <= place + taps]
    print(f"{taps} taps: hidden at {hidden}, the anchors being at {place + 1} and {place + 2}")

# %% [markdown]
# **2.** Why was the exception needed, that 3 4 adds $-6$? Make a table of all pairs: what the composite rule says and
# what the mirrored pair was taught.

# %% [markdown] tags=["answer"]
# Addition commutes. Without the exception, composition is itself symmetric and both rules give the same answer to
# everything: an experiment that can't come out either way. The exception makes exactly one question of sixteen tell.

# %% tags=["answer"]
anchors = (1, 2, 3, 4)
differ = [(a, b) for a in anchors for b in anchors if task.added((a, b)) != task.added((b, a))]
print("pairs that add something else than their mirror image:", differ)
print("4 3 by composition and by symmetry:", task.added((4, 3), "composite"), task.added((4, 3), "symmetric"))

# %% [markdown]
# **3.** Substitute instead of cutting: run the *withheld* question, and put in what left the first layer's convolution
# in the taught one, at one place after another. Does any single place carry the order of the anchors?

# %% [markdown] tags=["answer"]
# `mechanisms.patch` does it. No single place turns the answer round, and not even all of them together need do it: the
# gate $z$, the step $\Delta$ and the stream around the mixer pass the convolution by, and they still hold the withheld
# order. Cutting tells what is *necessary*, substituting what is *sufficient*, and the two need not be the same place.

# %% tags=["answer"]
name = "layers.0.mixer.convolved"
for seed in seeds:
    model = models["standard", seed]
    with torch.no_grad():
        _, cache = mechanisms.run_with_cache(model, taught, name)
        trials = [*([t] for t in range(place + 1, task.length)), None]  # one place each, then all
        said = [mechanisms.patch(model, withheld, cache, name, positions=t).argmax(-1) for t in trials]
    shares_of_six = " ".join(f"{(each == key - 6).double().mean():.0%}" for each in said)
    print(
        f"seed {seed}: answers -6 with place {place + 1}, {place + 2}, ... {end} substituted, and all: {shares_of_six}"
    )
