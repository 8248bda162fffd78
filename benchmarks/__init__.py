"""Timings as ratios within one run. They need jax, flax, optax and chex; torch is optional."""
