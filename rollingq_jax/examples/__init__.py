"""RollingQ dropped into other people's attention, each in one short file that runs.

    python -m rollingq_jax.examples.plain_jax
    python -m rollingq_jax.examples.linen_attention
    python -m rollingq_jax.examples.nnx_attention
    python -m rollingq_jax.examples.nnx_attention_fn
    python -m rollingq_jax.examples.pooled_query
    python -m rollingq_jax.examples.scanned_layers
    python -m rollingq_jax.examples.decoder
    python -m rollingq_jax.examples.cross_attention
    python -m rollingq_jax.examples.latent_query
    python -m rollingq_jax.examples.equinox_attention

Each has a `train(data, num_epochs)` for two modalities of token sequences. What all of them supply
is class queries and mean keys. They need nothing but the package's core; the last needs Equinox.
"""
