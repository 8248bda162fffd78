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
# # The paper's data sets, and how to read the tables
#
# The experiments of Ni et al. (ICML 2025, [arXiv 2506.11465](https://arxiv.org/abs/2506.11465)) use
# CREMA-D (six emotions, voice and face), Kinetics-Sounds (31 actions) and CMU-MOSEI (sentiment; text,
# audio, video). Their licences do not let anyone pass them on: download them from their owners, then
# run the commands below. They need an accelerator and hours. This notebook itself runs in a minute,
# on data that stand in for them.

# %%
# Where the package is not installed yet, in the folder notebooks/ of a clone:
# %pip install "..[demo,datasets]"

# %% [markdown]
# ## Prepare, then train
#
# `prepare` reads a download once, cuts spectrograms and frames as the authors' code does, and writes
# records. `python -m rollingq_jax.prepare --help` names the data sets and what each wants in
# `--source`.
#
# ```bash
# python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir DATA
# python train.py --config configs/crema_d.py --config.data.path=DATA --workdir runs/crema_d
# ```
#
# The configurations `configs/crema_d.py`, `configs/kinetics_sounds.py` and `configs/cmu_mosei.py` say
# at their top what they need and which numbers were published. The paper starts its encoders from an
# ImageNet-21k ViT-B/16: `--config.vit_weights=FILE`.
#
# ## Compare
#
# ```bash
# python -m rollingq_jax.compare --config configs/crema_d.py --config.data.path=DATA \
#   --arms concat,attention,rollingq --seeds 10 --workdir runs/compare
# ```
#
# Each arm is tuned on validation data with the same grid; `selection.json` holds what was chosen
# before any test set was read. `results.json`, `results.csv` and `report.html` hold the table.
#
# ## Reading the table, on stand-in data
#
# Two modalities of feature vectors, one far easier than the other; plain attention and RollingQ,
# five seeds, a model of a few thousand parameters. The numbers say nothing about the paper's data.

# %%
import contextlib
import io
import logging
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import Markdown

from rollingq_jax.compare import compare
from rollingq_jax.comparison.results import written_difference, written_mean
from rollingq_jax.train import default_config

logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoints' words on how long they took
folder = Path(tempfile.mkdtemp())

rng = np.random.default_rng(0)
means = {"audio": 1.2 * rng.normal(size=(4, 8)), "visual": 0.5 * rng.normal(size=(4, 8))}
arrays = {}
for split, count in (("train", 256), ("valid", 64), ("test", 512)):
    label = (np.arange(count) % 4).astype(np.int32)
    arrays[f"{split}/label"] = label
    for name, mean in means.items():
        noise = 1.5 * rng.normal(size=(count, 8))
        arrays[f"{split}/{name}"] = (mean[label] + noise).astype(np.float32)
np.savez(folder / "data.npz", **arrays)

# %% [markdown]
# The command above is this function. It prints a line for each run, which is left out here.

# %%
config = default_config()
config.epochs = 4
config.batch_size = 32
config.optimizer.learning_rate = 0.05
config.optimizer.warmup_epochs = 1.0
config.rolling.max_rotations = 3
config.data.name = "arrays"
config.data.path = str(folder / "data.npz")
config.model.dim = 16
config.model.depth = 1

with contextlib.redirect_stdout(io.StringIO()):
    result = compare(config, folder / "compare", arms="attention,rollingq", num_seeds=5)

# %% [markdown]
# Both arms share each seed's split and first parameters, so what counts is the difference **within**
# a seed: its mean, a bootstrap interval of 95 %, and how often each arm won.
#
# - An interval that holds 0 means: these runs do not tell the arms apart. One below 0 means that the
#   method did harm on these data, with these settings. Five seeds are the least that count; the
#   command's default is ten.
# - Accuracy alone does not show the method's point. The attention share says where the class token
#   looks; `python -m rollingq_jax.evaluate --workdir RUN --probes` says whether it follows the sample
#   as one modality turns into noise.
# - Published numbers come from one way of splitting and one way of choosing the best epoch. The page
#   *The authors' code* in the documentation lists what differs here, and how to have it back.
#
# ## What it says
#
# The sentences and the numbers are those of the command's report:

# %%
accuracy, share = (result["table"][name] for name in ("test_accuracy", "attention_share/audio"))
lines = [
    *result["verdicts"],
    "| arm | test accuracy | difference | share of the audio |\n| --- | --- | --- | --- |",
]
for arm, line in accuracy.items():
    difference = written_difference("test_accuracy", line) if "difference" in line else ""
    cells = written_mean("test_accuracy", line), difference, f"{share[arm]['mean']:.2f}"
    lines[-1] += f"\n| {arm} | {' | '.join(cells)} |"
Markdown("\n\n".join(lines))
