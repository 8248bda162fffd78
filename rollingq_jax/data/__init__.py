"""Data sets, the pipeline that batches them, and the transformations in between.

A data set is a `rollingq_jax.data.dataset.Dataset`: random-access splits of examples plus a
description of each modality. `rollingq_jax.data.load.load_dataset` makes one from a
configuration; `rollingq_jax.data.pipeline.train_batches` and
`rollingq_jax.data.pipeline.eval_batches` turn a split into batches.
"""
