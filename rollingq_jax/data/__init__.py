"""Data sets, the pipeline that batches them, and the transformations in between.

A data set is a :class:`~rollingq_jax.data.types.Dataset`: random-access splits of examples plus a
description of each modality. :func:`~rollingq_jax.data.load.load_dataset` makes one from a
configuration; :func:`~rollingq_jax.data.pipeline.train_batches` and
:func:`~rollingq_jax.data.pipeline.eval_batches` turn a split into batches.
"""
