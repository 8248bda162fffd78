"""A trace of some training steps, and compiled programs that are kept from run to run."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

log = logging.getLogger(__name__)

FIRST_CALL, LAST_CALL = 4, 8  # the first calls compile, and fill the pipeline


@contextlib.contextmanager
def profiled(train_step: Callable[..., Any], folder: epath.Path) -> Iterator[Callable[..., Any]]:
    """The step, of which calls 4 to 8 are traced, with all that happens between them.

    A run that ends in between leaves the trace up to there; one that ends before, a warning.
    The folder gets what `jax.profiler` writes: XProf reads it, and `perfetto_trace.json.gz` goes to
    ui.perfetto.dev. Each process traces its own devices.
    """
    calls, tracing = 0, False
    remote = "://" in os.fspath(folder)
    local = tempfile.mkdtemp() if remote else os.fspath(folder)

    def start(args: Any) -> None:
        nonlocal tracing
        jax.block_until_ready(args)
        jax.profiler.start_trace(local, create_perfetto_trace=True)
        tracing = True

    def stop() -> None:
        nonlocal tracing
        jax.profiler.stop_trace()
        tracing = False
        if remote:  # the profiler writes local files alone
            copy_tree(local, folder)

    def traced(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == FIRST_CALL:
            start(args)
        results = train_step(*args)
        if calls == LAST_CALL:
            jax.block_until_ready(results)
            stop()
        return results

    try:
        yield traced
    finally:
        if tracing:
            stop()
        elif calls < FIRST_CALL:
            log.warning("no profile: %d steps were made and the trace begins with step 4", calls)


def copy_tree(source: str, target: epath.Path) -> None:
    """Copies a local folder's files into a folder that may be on gs://."""
    for root, _, names in os.walk(source):
        to = target / os.path.relpath(root, source)
        to.mkdir(parents=True, exist_ok=True)
        for name in names:
            epath.Path(os.path.join(root, name)).copy(to / name, overwrite=True)


def default_cache() -> str:
    """`rollingq_jax/xla` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "rollingq_jax", "xla")


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder, local or gs://; none where the name is empty.

    A folder that JAX was given already (`JAX_COMPILATION_CACHE_DIR`) stays.
    """
    if folder and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", folder)
