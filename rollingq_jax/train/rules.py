"""What the fields of a run's configuration may hold."""

from rollingq_jax.baselines.build import BUILDERS
from rollingq_jax.models.fields import FLAG, INT32_MAX, Rule, integer, is_integer, one_of, real

OPTIMIZERS = ("sgd", "adam")
PARALLEL = ("jit", "pmap")
NONFINITE = ("stop", "skip")


def _at_least(low: float) -> Rule:
    return real(f"a number >= {low:g}", lambda v: v >= low)


TEXT = Rule("a string", lambda v: isinstance(v, str), str)

RULES = {
    "": {
        "seed": integer(0, 2**32 - 1),
        "epochs": integer(1),
        "batch_size": integer(1),
        "log_every": integer(1),
        "parallel": one_of(PARALLEL),
        "vit_weights": TEXT,
        "plain_twin": FLAG,
        "nonfinite": one_of(NONFINITE),
    },
    "optimizer": {
        "name": one_of(OPTIMIZERS),
        "learning_rate": real("a number > 0", lambda v: v > 0),
        "momentum": real("a number in [0, 1)", lambda v: 0 <= v < 1),
        "weight_decay": _at_least(0),
        "warmup_epochs": _at_least(0),
        "clip_norm": _at_least(0),
    },
    "rolling": {
        "enabled": FLAG,
        "beta": _at_least(0),
        "rho": _at_least(0),
        "max_rotations": Rule(
            f"an integer >= 0 and at most {INT32_MAX:,}, or None for no limit",
            lambda v: v is None or (is_integer(v) and 0 <= v <= INT32_MAX),
            lambda v: v if v is None else int(v),
        ),
        "check_every": integer(0),
        "window": real("a number in (0, 1]", lambda v: 0 < v <= 1),
        "method": one_of(("geodesic", "svd")),
        "joint": FLAG,
    },
    "baseline": {
        "name": Rule(
            "an empty string or one of " + ", ".join(filter(None, BUILDERS)),
            lambda v: isinstance(v, str) and v in BUILDERS,
            str,
        ),
        "epochs": integer(0),
        "ogm_alpha": _at_least(0),
        "pmr_alpha": _at_least(0),
        "pmr_momentum": real("a number in [0, 1)", lambda v: 0 <= v < 1),
        "drop_rate": real("a number in [0, 1)", lambda v: 0 <= v < 1),
        "joint_weight": _at_least(0),
    },
    "compare": {
        "tune_seeds": integer(1, 1_000_000),
        "grid": Rule(
            "a mapping of fields to tuples of values", lambda v: hasattr(v, "keys"), lambda v: v
        ),
    },
    "checkpoint": {
        "every_epochs": integer(1),
        "every_steps": integer(0),
        "every_minutes": _at_least(0),
        "keep": integer(1),
    },
    "upstream_compat": {
        "last_batch_air": FLAG,
        "statistics_pass": FLAG,
        "extra_schedule_step": FLAG,
        "unclipped_cosine": FLAG,
    },
}
# Of `config.data`, what every data set has; its loader checks the rest.
DATA_RULES = {"prefetch": integer(0, 1024)}  # each batch made ahead has a thread
