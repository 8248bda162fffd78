"""RollingQ in JAX: keep a multimodal Transformer's attention looking at the sample."""
