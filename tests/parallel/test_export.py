"""The training step lowers for accelerators that this machine does not have."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from rollingq_jax.models import dense_attention
from tests.parallel import small_model


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "bfloat16"), ("cuda", "float32")])
def test_the_training_step_lowers(platform, dtype):
    step, state = small_model.step_and_state(attention_fn=dense_attention, dtype=dtype)
    batch = {n: jnp.asarray(v) for n, v in small_model.batch(0).items()}
    bits = jax.random.key_data(state.rng)

    def from_bits(state, bits, batch):
        return step(state.replace(rng=jax.random.wrap_key_data(bits)), batch)[1]

    exported = jax.export.export(jax.jit(from_bits), platforms=[platform])(
        state.replace(rng=None), bits, batch
    )
    assert exported.platforms == (platform,)
    assert len(exported.mlir_module_serialized) > 0
