"""Nothing is compiled any more once each kind of step has run."""

import functools
import json

import jax
import pytest

from rollingq_jax.train.loop import train_and_evaluate
from rollingq_jax.train.parallel import WRAPPERS
from rollingq_jax.train.steps import eval_step
from tests.parallel import small_model
from tests.train.train_cases import tiny_config, write_arrays

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name for the event
EPOCHS = 4


@pytest.fixture
def on_compilation():
    """Registers a function that is called whenever a program is compiled."""
    listeners = []

    def register(function):
        def listener(event, *_, **__):
            if event == COMPILED:
                function()

        jax.monitoring.register_event_duration_secs_listener(listener)
        listeners.append(listener)

    yield register
    for listener in listeners:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize("parallel", sorted(small_model.LAYOUTS))
def test_steps_that_roll_and_padded_batches_need_no_program_of_their_own(parallel, on_compilation):
    step, state = small_model.step_and_state()
    layout = small_model.LAYOUTS[parallel](
        step, functools.partial(eval_step, model=small_model.model())
    )
    state = layout.put_state(state)
    number, compiled_at = 0, []
    on_compilation(lambda: compiled_at.append(number))
    for number in range(small_model.STEPS):
        state, sums, _ = layout.train_step(state, layout.put_batch(small_model.batch(number)))
        layout.eval_step(state, layout.put_batch(small_model.batch(number)))
        jax.block_until_ready(sums)
    assert set(compiled_at) == {0}
    assert layout.get(state).rolling.count.sum() > 0


@pytest.mark.parametrize("parallel", sorted(WRAPPERS))
def test_a_run_compiles_in_its_first_epoch_alone(parallel, on_compilation, tmp_path):
    write_arrays(tmp_path / "data.npz")
    workdir, compiled_after = tmp_path / "run", []

    def epochs_done():
        path = workdir / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return sum(json.loads(row)["split"] == "valid" for row in rows)

    on_compilation(lambda: compiled_after.append(epochs_done()))
    config = tiny_config(tmp_path / "data.npz", epochs=EPOCHS, parallel=parallel)
    train_and_evaluate(config, workdir, quiet=True)
    assert epochs_done() == EPOCHS
    assert 0 in compiled_after
    assert not set(compiled_after) & set(range(1, EPOCHS))
