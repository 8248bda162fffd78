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
# Where the package is not installed yet, in a clone of the repository:
# %pip install ".[demo,datasets]"

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
# three seeds, a model of a few thousand parameters. The numbers say nothing about the paper's data.

# %%
import tempfile
from pathlib import Path

import jax
import numpy as np

from rollingq_jax.analysis.metrics import paired_difference
from rollingq_jax.train import default_config, train_and_evaluate

folder = Path(tempfile.mkdtemp())
jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # seeds share programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

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


# %%
def run(arm, seed):
    """The summary of one run; the arms differ in `rolling.enabled` alone."""
    config = default_config()
    config.seed = seed
    config.epochs = 4
    config.batch_size = 32
    config.optimizer.learning_rate = 0.05
    config.optimizer.warmup_epochs = 1.0
    config.rolling.enabled = arm == "rollingq"
    config.rolling.max_rotations = 3
    config.data.name = "arrays"
    config.data.path = str(folder / "data.npz")
    config.model.dim = 16
    config.model.depth = 1
    return train_and_evaluate(config, folder / f"{arm}-{seed}", quiet=True)


seeds = range(3)
summaries = {arm: [run(arm, seed) for seed in seeds] for arm in ("attention", "rollingq")}
accuracy = {
    arm: np.array([summary["test_accuracy"] for summary in found])
    for arm, found in summaries.items()
}
print("rotations:", [summary["rotations"] for summary in summaries["rollingq"]])

# %% [markdown]
# A row of the table has the mean and the standard deviation over seeds. Both arms share each seed's
# split and first parameters, so what counts is the difference **within** a seed: its mean, a
# bootstrap interval of 95 %, and how often each arm won.

# %%
for arm, values in accuracy.items():
    print(f"{arm:10} {100 * values.mean():5.1f} % ± {100 * values.std(ddof=1):.1f}")
difference = paired_difference(accuracy["rollingq"], accuracy["attention"])
print(difference)

# %% [markdown]
# - An interval that holds 0 means: these runs do not tell the arms apart. One below 0 means that the
#   method did harm on these data, with these settings. Three seeds are few; the comparison's default
#   is ten.
# - Accuracy alone does not show the method's point. `attention_share` says where the class token
#   looks; `python -m rollingq_jax.evaluate --workdir RUN --probes` says whether it follows the sample
#   as one modality turns into noise.
# - Published numbers come from one way of splitting and one way of choosing the best epoch. The page
#   *The authors' code* in the documentation lists what differs here, and how to have it back.
