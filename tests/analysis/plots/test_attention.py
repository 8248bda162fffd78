"""Token weights land where the model cut the token from."""

import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax.analysis.plots import attention as tokens
from rollingq_jax.data.sources.media_folder import byte_tokens, text_pieces
from rollingq_jax.models.encoders import cut_example

SHAPES = {
    "spectrogram": ((13, 22, 1), (4, 3)),
    "image": ((9, 14, 3), (4, 3)),
    "video": ((5, 8, 9, 3), (2, 4, 4)),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_each_token_weight_covers_the_patch_that_the_model_cut(kind):
    shape, patch = SHAPES[kind]
    # Number the elements, let the model cut its patches, and look where the numbers went.
    numbers = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    cut = np.asarray(cut_example(kind, jnp.asarray(numbers)[None], patch))[0]
    spatial = shape[:-1]
    expected = np.full(spatial, np.nan)
    for token, elements in enumerate(cut):
        expected[np.unravel_index(elements // shape[-1], spatial)] = token
    found = tokens.weights_on_input(np.arange(len(cut)), kind, shape, patch)
    np.testing.assert_array_equal(found, expected)
    assert tokens.num_tokens(kind, shape, patch) == 1 + len(cut)


def test_the_papers_token_counts():
    # Sizes that upstream feeds: CREMA-D audio, Kinetics-Sounds audio, three frames.
    assert tokens.token_grid("spectrogram", (257, 188, 1), (16, 16)) == (11, 16)
    assert tokens.token_grid("spectrogram", (1024, 128, 1), (16, 16)) == (8, 64)
    assert tokens.token_grid("video", (3, 224, 224, 3), (1, 16, 16)) == (3, 14, 14)


@pytest.mark.parametrize("kind, shape", [("sequence", (7, 3)), ("tokens", (7,)), ("vector", (7,))])
def test_kinds_without_patches(kind, shape):
    count = 1 if kind == "vector" else 7
    assert tokens.token_grid(kind, shape) == (count,)
    np.testing.assert_array_equal(
        tokens.weights_on_input(np.arange(count), kind, shape), np.arange(count)
    )


def test_attention_is_split_in_alphabetical_order_without_the_fusion_token():
    attention = np.arange(2 * 6.0).reshape(2, 6)
    parts = tokens.split_attention(attention, {"b": 2, "a": 3})
    np.testing.assert_array_equal(parts["a"], attention[:, 1:4])
    np.testing.assert_array_equal(parts["b"], attention[:, 4:])


def test_mistakes_name_what_is_wrong():
    with pytest.raises(ValueError, match="lengths ask for 4"):
        tokens.split_attention(np.ones(6), {"a": 3})
    with pytest.raises(ValueError, match="'smell'"):
        tokens.token_grid("smell", (3,))
    with pytest.raises(ValueError, match="2 sizes"):
        tokens.token_grid("image", (8, 8, 1), (2, 2, 2))


def test_words_have_the_mean_weight_of_their_tokens():
    ids = byte_tokens("né a  b".encode(), 12)
    weights = np.arange(12.0)
    # n is byte 0, é bytes 1 and 2; a is byte 4 and b byte 7; what follows is padding.
    words = [("né", 1.0), ("a", 4.0), ("b", 7.0)]
    assert tokens.weighted_words(ids, weights, text_pieces(ids)) == words
    subwords = ("un", "even", " ", "key ", "s")
    found = tokens.weighted_words(np.arange(1, 6), np.arange(5.0), subwords)
    assert found == [("uneven", 0.5), ("key", 3.0), ("s", 4.0)]
    assert tokens.weighted_words(np.array([7, 0, 9]), np.arange(3.0)) == [("7", 0.0), ("9", 2.0)]
    assert tokens.weighted_words(np.zeros(3, int), np.ones(3)) == []
