# ---
# jupyter:
#   jupytext:
#     comment_magics: false
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: "1.3"
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RollingQ in a training run
#
# Spoken and handwritten digits: nothing to download, the data are made on the first use. Some epochs
# of a small model show the cycle: attention goes to one modality, the query is turned, and it looks
# again. This needs `pip install "rollingq-jax[demo]"`.

# %%
# In Colab, or wherever the package is not installed yet:
# %pip install "rollingq-jax[demo]"

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import rollingq_jax as rq
from rollingq_jax.data.load import load_dataset
from rollingq_jax.train import default_config, train_and_evaluate

# %% [markdown]
# ## Train
#
# The same fields as in `configs/av_digits.py`, with a smaller model and fewer epochs than that
# experiment has, and with `rho` 0: the query is turned half-way between the mean keys.
# The head rolls at an epoch's end when its imbalance is above `beta`.

# %%
config = default_config()
config.epochs = 8
config.batch_size = 128
config.log_every = 2
config.optimizer.learning_rate = 0.05
config.optimizer.warmup_epochs = 1.0
config.rolling.beta = 0.2
config.rolling.rho = 0.0
config.rolling.max_rotations = 3
config.data.name = "av_digits"
config.model.dim = 32
config.model.depth = 1
with config.unlocked():
    config.model.encoders = {
        "audio": {"kind": "spectrogram", "patch": (8, 8)},
        "visual": {"kind": "image", "patch": (2, 2)},
    }

folder = Path(tempfile.mkdtemp())
summary = train_and_evaluate(config, folder / "rolling", quiet=True)
print(f"test accuracy {summary['test_accuracy']:.3f}, rotations {summary['rotations']}")

# %% [markdown]
# ## Watch the cycle
#
# Every row of `metrics.jsonl` is one record. Rows of the split `roll` are the rotations.

# %%
rows = [json.loads(line) for line in (folder / "rolling/metrics.jsonl").read_text().splitlines()]
train = [row for row in rows if row["split"] == "train"]
rolls = [row for row in rows if row["split"] == "roll"]
for row in rolls:
    print(
        f"epoch {row['epoch']}: turned by {row['angle_degrees']:.0f} degrees, imbalance "
        f"{row['imbalance_before']:.2f} before and {row['imbalance_after']:.2f} after"
    )

figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
steps = [row["step"] for row in train]
top.plot(steps, [row["imbalance"] for row in train], color="black")
top.set(ylabel="imbalance", title="Attention leans, and is turned back")
for name, colour in (("audio", "#0072B2"), ("visual", "#D55E00")):
    share = [row[f"attention_share/{name}"] for row in train]
    bottom.plot(steps, share, color=colour, label=name)
bottom.set(xlabel="step", ylabel="attention share", ylim=(0, 1))
bottom.legend(frameon=False)
for row in rolls:
    top.axvline(row["step"], linestyle="--", color="grey")
    bottom.axvline(row["step"], linestyle="--", color="grey")

# %% [markdown]
# The run has drawn its own pictures as well, and put them into `report.html`:

# %%
pictures = sorted((folder / "rolling/figures").glob("*.png"))
print(*[picture.name for picture in pictures], sep="\n")
Image(filename=str(pictures[0]))

# %% [markdown]
# ## Predict
#
# `rq.load` reads the run back, with its rotation. Attention that looks at the sample goes to the
# modality that is clear, and away from the one that is noisy.

# %%
predict = rq.load(folder / "rolling")
test = load_dataset(config.data, seed=config.seed).splits["test"].columns
probabilities, share = predict({name: test[name] for name in ("audio", "visual")})
correct = probabilities.argmax(axis=-1) == test["label"]
contrast = test["quality_audio"] - test["quality_visual"]
correlation = np.corrcoef(share["audio"][:, 0], contrast)[0, 1]
print(f"accuracy {correct.mean():.3f}, correlation of share and quality {correlation:+.2f}")

figure, axes = plt.subplots(figsize=(6, 4))
axes.scatter(contrast, share["audio"][:, 0], s=6, alpha=0.4, color="#0072B2")
axes.set(
    xlabel="how much clearer the audio is than the image",
    ylabel="attention share of the audio",
    title="One point a test example",
)

# %% [markdown]
# A modality can be missing. It is left out of the batch, and takes no attention:

# %%
alone = predict({"audio": test["audio"]})
print(f"from sound alone: {(alone.probabilities.argmax(axis=-1) == test['label']).mean():.3f}")
assert (alone.attention_share["visual"] == 0).all()

# %% [markdown]
# One short run says nothing about whether the method helps. That takes several seeds and settings
# chosen on validation data: `python -m rollingq_jax.compare`, see `04_paper`.
