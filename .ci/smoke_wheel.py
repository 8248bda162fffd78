"""Run from an environment that holds the built wheel alone: import it, roll once, fold.

Usage: ``python smoke_wheel.py`` in a folder that does not hold the source.
"""

import importlib.resources
import subprocess
import sys

import jax
import jax.numpy as jnp

import rollingq_jax as rq


def main() -> None:
    """Import, roll on keys that lie unevenly around the query, run a model, print the result."""
    assert "site-packages" in rq.__file__, rq.__file__
    package = importlib.resources.files("rollingq_jax")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("configs", "av_digits.py").is_file()
    # A command without its extra, and a name that has to come from one: a line that says so.
    done = subprocess.run([sys.executable, "-m", "rollingq_jax", "train"], capture_output=True)
    assert done.returncode == 2 and b"rollingq-jax[train]" in done.stderr, done.stderr
    try:
        _ = rq.load
    except ModuleNotFoundError as error:
        assert "rollingq-jax[train]" in str(error), error
    roller = rq.rolling_query(beta=0.0, rho=0.0, max_rotations=1)
    state = roller.init(num_modalities=2, dim=8, num_heads=1)
    query = jnp.eye(8)[:1]
    mean_keys = jnp.stack([jnp.eye(8)[0], jnp.eye(8)[1]])[:, None, None]
    state, info = roller.update(roller.observe(state, query, mean_keys), query)
    assert bool(info.rolled[0]) and int(state.count[0]) == 1
    config = {
        "num_classes": 3,
        "dim": 16,
        "depth": 1,
        "num_heads": 2,
        "encoders": {"audio": {"kind": "vector"}, "visual": {"kind": "vector"}},
    }
    model = rq.build_model(config)
    batch = {"audio": jnp.ones((2, 5)), "visual": jnp.ones((2, 7)), "label": jnp.zeros(2, int)}
    logits, _ = model.apply(model.init(jax.random.key(0), batch), batch)
    assert logits.shape == (2, 3)
    loaded = {name.split(".")[0] for name in sys.modules}
    assert not loaded & {"tensorflow", "tensorflow_datasets", "grain", "orbax", "matplotlib"}
    print(f"rollingq-jax {rq.__version__} from the wheel: rolled by {float(info.angle[0]):.3f} rad")


if __name__ == "__main__":
    main()
