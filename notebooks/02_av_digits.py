# ---
# jupyter:
#   jupytext:
#     comment_magics: false
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The cycle, and its end, in a training run
#
# Spoken and handwritten digits: nothing to download, the data are made on the first use. A modality
# that is easier to learn draws the class token's attention, whatever the sample shows. RollingQ
# turns the query back whenever that happens. Here the same model is trained with rotations and
# without, and the two are laid side by side. It takes about a minute on two cores.

# %%
# Where the package is not installed yet, in the folder notebooks/ of a clone:
# %pip install "..[demo]"

# %%
import json
import logging
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import rollingq_jax as rq
from rollingq_jax.data.load import load_dataset
from rollingq_jax.train import default_config, train_and_evaluate

# %% [markdown]
# ## Train, twice
#
# These are the fields of `configs/av_digits.py`, the demo of the README, with half its epochs. The
# noise in an example is the same in every epoch; how much there is varies from example to example,
# in both modalities. A
# loss for each modality (`joint`) keeps both encoders learning. The trigger is checked every 8
# steps, and there is no limit on rotations. With `plain_twin` the run is followed by the same
# without rotations.

# %%
logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoints' words on how long they took

config = default_config()
config.epochs = 12
config.plain_twin = True
config.optimizer.learning_rate = 0.08
config.rolling.beta = 0.05
config.rolling.check_every = 8
config.rolling.window = 1.0
config.rolling.max_rotations = None
config.baseline.name = "joint"
config.model.depth = 1
config.model.fusion_token_scale = 0.1
with config.unlocked():
    config.data.regime = "hard_train"
    config.data.test_pairings = 3
    config.model.encoders = {
        "audio": {"kind": "spectrogram", "patch": (16, 16)},
        "visual": {"kind": "image", "patch": (4, 4)},
    }

folder = Path(tempfile.mkdtemp())
summary = train_and_evaluate(config, folder / "run", quiet=True)
print(f"test accuracy {summary['test_accuracy']:.3f}, rotations {sum(summary['rotations'])}")

# %% [markdown]
# ## What attention did
#
# Every row of `metrics.jsonl` is one record; rows of the split `valid` are the epochs' ends, rows of
# the split `roll` the rotations.


# %%
def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


rows = {
    "with rotations": read_rows(folder / "run/metrics.jsonl"),
    "without": read_rows(folder / "run/plain/metrics.jsonl"),
}
looks = {
    "with rotations": {"color": "#0072B2"},
    "without": {"color": "#D55E00", "linestyle": "--"},
}
panels = {
    "imbalance": "imbalance of\ncosine scores",
    "attention_share/audio": "attention share\nof the audio",
    "accuracy": "accuracy on\nvalidation data",
}

rolls = [row["step"] for row in rows["with rotations"] if row["split"] == "roll"]
steps_per_epoch = rows["without"][-1]["step"] / config.epochs

figure, axes = plt.subplots(3, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
for ax, (field, label) in zip(axes, panels.items(), strict=True):
    for name, found in rows.items():
        valid = [row for row in found if row["split"] == "valid"]
        epochs, values = [row["epoch"] for row in valid], [row[field] for row in valid]
        ax.plot(epochs, values, label=name, linewidth=2, **looks[name])
    for step in rolls:
        line = ax.axvline(step / steps_per_epoch, color="#CC79A7", alpha=0.4)
    line.set_label("rotation of the query")
    ax.set(ylabel=label)
axes[1].axhline(0.5, linestyle=":", color="grey")
axes[1].annotate("even", (1, 0.5), xycoords=("axes fraction", "data"), color="grey", va="center")
axes[2].set(xlabel="epoch")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %%
for name, found in rows.items():
    last = [row for row in found if row["split"] == "valid"][-1]
    print(
        f"{name:15} imbalance {last['imbalance']:.2f}, share of the audio "
        f"{last['attention_share/audio']:.2f}, validation accuracy {last['accuracy']:.3f}"
    )

# %% [markdown]
# Without rotations the query leans to the audio within two epochs, and stays there. Where its share
# happens to come near one half for an epoch, accuracy has its peak, and attention leaves again. With
# rotations the imbalance builds up and is taken back, again and again, until it stays below `beta`.

# %% [markdown]
# ## The favored modality, all noise
#
# `rq.load` reads a run back, with its rotation, and takes raw arrays. It is the checkpoint that was
# best on validation data: without rotations one at which the share passed one half. What if the
# audio is replaced by noise? (Validation data: the test set was read once, above.)

# %%
valid = load_dataset(config.data, seed=config.seed).splits["valid"].columns
audio = valid["audio"]
noise = np.random.default_rng(0).normal(audio.mean(), audio.std(), audio.shape).astype(np.float32)
predictors = {"without": rq.load(folder / "run/plain"), "with rotations": rq.load(folder / "run")}

print("share of the audio     as it is   all noise")
for name, predict in predictors.items():
    shares = [
        predict({"audio": heard, "visual": valid["visual"]}).attention_share["audio"].mean()
        for heard in (audio, noise)
    ]
    print(f"{name:20}   {shares[0]:8.2f}   {shares[1]:9.2f}")

# %% [markdown]
# Neither leaves the audio as it should. Where the query stands by its preference is one thing, and
# that is what rotations set right; how well attention tells noise is another.

# %% [markdown]
# ## Does attention look at the sample?
#
# Attention that looks at the sample goes to the modality that is clear, and away from the one that
# is noisy.

# %%
probabilities, share = predict({name: valid[name] for name in ("audio", "visual")})
correct = probabilities.argmax(axis=-1) == valid["label"]
contrast = valid["quality_audio"] - valid["quality_visual"]
correlation = np.corrcoef(share["audio"][:, 0], contrast)[0, 1]
print(f"accuracy {correct.mean():.3f}, correlation of share and quality {correlation:+.2f}")

order = np.array_split(np.argsort(contrast), 10)
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.scatter(contrast, share["audio"][:, 0], s=6, alpha=0.4, color="#0072B2")
axes.plot(
    [contrast[tenth].mean() for tenth in order],
    [share["audio"][tenth, 0].mean() for tenth in order],
    "s-",
    color="#D55E00",
    label="mean of each tenth",
)
axes.set(
    xlabel="noise in the image minus noise in the audio (standard deviations)",
    ylabel="attention share of the audio",
    title="A point is a validation example",
)
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# It does, a little: the slope is real and small. What rotations end first of all is the preference;
# how much the look at the sample adds is a question for many seeds and for a control in which every
# token has the same weight. The documentation's page on results has both.

# %% [markdown]
# A modality can be missing. It is left out of the batch, and takes no attention:

# %%
alone = predict({"audio": valid["audio"]})
print(f"from sound alone: {(alone.probabilities.argmax(axis=-1) == valid['label']).mean():.3f}")
assert (alone.attention_share["visual"] == 0).all()

# %% [markdown]
# The run has drawn its own pictures as well, and put them into `report.html`, one file that opens
# without a network:

# %%
print("\n".join(sorted(path.name for path in (folder / "run/figures").iterdir())))
assert (folder / "run/report.html").exists()
