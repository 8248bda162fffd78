"""Methods against modality imbalance that the paper compares with, each in one small file.

They join a training step through the hooks in `hooks.py`, and work without our training code: OGM
is an optax transformation, the others are functions of logits, tokens or batches.
"""
