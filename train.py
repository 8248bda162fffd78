"""Trains and tests: python train.py --config configs/av_digits.py --workdir runs/demo."""

import sys

from rollingq_jax.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv))
