"""Trains and tests: python train.py --config configs/av_digits.py --workdir runs/demo."""

import sys

from rollingq_jax.train.cli import run_command, train_command

if __name__ == "__main__":
    sys.exit(run_command(train_command, sys.argv))
