"""What the features of a TFDS data set become.

============================== ====================================================================
feature                        becomes
============================== ====================================================================
Image                          uint8 [H, W, C]; resized to ``image_size`` squared if it has no fixed
                               size
Text                           tokens: 1 + the value of each byte, ``text_length`` of them
Tensor, fixed shape            by shape, as own arrays
Tensor [None, D], floats       a sequence cut or padded to ``sequence_length``, with a mask
Tensor [None], integers        tokens, cut or padded to ``sequence_length``
============================== ====================================================================
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.data.columns import fit_shape
from rollingq_jax.data.images import resize_image
from rollingq_jax.data.infer import infer_kind
from rollingq_jax.data.media_arrays import BYTE_VOCABULARY, byte_tokens
from rollingq_jax.data.options import option
from rollingq_jax.data.types import Example, ModalityInfo
from rollingq_jax.errors import ConfigError, DataError


class Form(NamedTuple):
    """A modality, and what makes its fields of an example from a record's value."""

    info: ModalityInfo
    convert: Callable[[Any], Example]


def make_form(name: str, feature: Any, kind: str | None, config_data: Any) -> Form:
    """How a TFDS feature becomes a modality.

    Args:
      name: of the modality.
      feature: TFDS's description of the feature.
      kind: what the user says it is, or None to go by shape; images and text are what they are.
      config_data: see :func:`rollingq_jax.data.tfds_source.load`.

    Raises:
      DataError: the feature cannot be used.
      ConfigError: it holds token ids, and ``vocab_size`` is not set.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return _image_form(name, feature, option(config_data, "image_size", 64, minimum=1))
    if isinstance(feature, tfds.features.Text):
        length = option(config_data, "text_length", 128, minimum=1)
        info = ModalityInfo(name, "tokens", (length,), "int32", BYTE_VOCABULARY)
        return Form(info, lambda value: {name: byte_tokens(value, length)})
    shape, dtype = feature.shape, feature.np_dtype
    if isinstance(shape, dict) or np.dtype(dtype).kind not in "biuf":
        raise DataError(f"data.features: {name}: {feature!r} cannot be used as a modality")
    length = option(config_data, "sequence_length", 128, minimum=1)
    if None in shape[1:] or (shape[:1] == (None,) and len(shape) > 2):
        raise DataError(
            f"data.features: {name}: shape {list(shape)}; only the first axis of a sequence "
            "[None, D] or of tokens [None] may vary"
        )
    varies = shape[:1] == (None,)
    fixed = (length, *shape[1:]) if varies else tuple(shape)
    kind = kind or infer_kind(fixed, dtype, name)
    vocab_size = None
    if kind == "tokens":
        vocab_size = option(config_data, "vocab_size", 0)
        if vocab_size < 2:
            raise ConfigError(
                f"data.vocab_size: {vocab_size}; {name!r} holds token ids: at least 2"
            )
    fixed, add_axis = fit_shape(name, fixed, kind)
    pixels = kind in ("image", "video") and dtype == np.uint8
    dtype = "int32" if kind == "tokens" else "uint8" if pixels else "float32"
    info = ModalityInfo(name, kind, fixed, dtype, vocab_size)

    def convert(value: Any) -> Example:
        value = np.asarray(value)
        array = value[..., None] if add_axis else value
        if vocab_size and array.size and not 0 <= array.min() <= array.max() < vocab_size:
            raise DataError(f"{name}: token ids {array.min()} to {array.max()}; below {vocab_size}")
        if not varies:
            return {name: array.astype(dtype)}
        padded = np.zeros(fixed, dtype)
        padded[: len(array)] = array[:length]
        if kind == "tokens":
            return {name: padded}
        return {name: padded, f"{name}_mask": np.arange(length) < len(array)}

    return Form(info, convert)


def _image_form(name: str, feature: Any, size: int) -> Form:
    """Images of a fixed size stay; others become RGB of ``size`` squared."""
    if np.dtype(feature.np_dtype) != np.uint8:
        raise DataError(f"data.features: {name}: images of {feature.np_dtype}; must be uint8")
    if None not in feature.shape:
        info = ModalityInfo(name, "image", tuple(feature.shape), "uint8")
        return Form(info, lambda value: {name: np.asarray(value)})

    def convert(value: Any) -> Example:
        image = np.asarray(value)
        image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]
        return {name: resize_image(np.ascontiguousarray(image), (size, size))}

    return Form(ModalityInfo(name, "image", (size, size, 3), "uint8"), convert)
