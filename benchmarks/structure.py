"""Counts of the package's structure: `python -m benchmarks.structure [ROOT]`.

Modules, lines and imports are read from the source. The files on the way from one event of a run
to another are those that a tiny training run enters between the two, by the interpreter's profiler:
what a reader has to open to follow it.
"""

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "rollingq_jax"

# A run of two epochs on the demo's smallest relative, traced from before its imports are done.
RUN = """
import json, sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
rng = np.random.default_rng(0)
arrays = {}
for split, count in {"train": 16, "valid": 8, "test": 8}.items():
    arrays[split + "/label"] = (np.arange(count) % 2).astype(np.int32)
    arrays[split + "/a"] = rng.normal(size=(count, 3)).astype(np.float32)
    arrays[split + "/b"] = rng.normal(size=(count, 4)).astype(np.float32)
np.savez(sys.argv[2] + "/data.npz", **arrays)
from rollingq_jax.train import default_config, train_and_evaluate
config = default_config()
config.update_from_flattened_dict({
    "epochs": 2, "batch_size": 8, "log_every": 1, "optimizer.warmup_epochs": 1.0,
    "data.name": "arrays", "data.path": sys.argv[2] + "/data.npz", "data.prefetch": 0,
    "model.dim": 8, "model.depth": 1, "model.num_heads": 2})
events = []
def profile(frame, event, argument):
    if event == "call":
        path = frame.f_code.co_filename
        if "/rollingq_jax/" in path:
            name, callers = frame.f_code.co_name, []
            while name in ("roll", "seal", "record_digest") and frame:
                callers.append(frame.f_code.co_filename)
                frame = frame.f_back
            callers = {c.split("/rollingq_jax/")[-1] for c in callers if "/rollingq_jax/" in c}
            events.append((path.split("/rollingq_jax/")[-1], name, sorted(callers)))
sys.setprofile(profile)
train_and_evaluate(config, sys.argv[2] + "/run", quiet=True, test=False)
sys.setprofile(None)
print(json.dumps(events))
"""

# Files entered from the last call of the first function to the next call of the second.
WAYS = {
    "from a batch to the step": ({"collate"}, {"train_step"}),
    "from the step to metrics.jsonl": ({"advance"}, {"write"}),
}
# Files on the call stack of a function.
STACKS = {"from the command to the trigger": {"roll"}, "saving": {"seal", "record_digest"}}


def imports(path: Path) -> int:
    """Lines of a module that belong to import statements."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in found)


def files_between(
    events: list[tuple[str, str, list[str]]], first: set[str], last: set[str]
) -> list[str]:
    """Files entered from the last call of one function to the next call of another."""
    ends = [i for i, (_, name, _) in enumerate(events) if name in last]
    for end in ends:
        starts = [i for i in range(end) if events[i][1] in first]
        if starts:
            return sorted({path for path, _, _ in events[starts[-1] : end + 1]})
    return []


def main() -> None:
    """Prints the counts of a checkout."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    sources = sorted((root / PACKAGE).rglob("*.py"))
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in sources]
    total, imported = sum(lines), sum(map(imports, sources))
    print(f"modules {sum(path.name != '__init__.py' for path in sources)}")
    print(f"lines {total:,}; {total / len(lines):.0f} in the mean")
    print(f"imports {imported:,} lines, {100 * imported / total:.1f} %")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, str(root), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    events = json.loads(done.stdout.splitlines()[-1])
    for words, (first, last) in WAYS.items():
        files = files_between(events, first, last)
        print(f"files {words}: {len(files)} ({', '.join(files)})")
    for words, names in STACKS.items():
        files = next((callers for _, name, callers in events if name in names), [])
        print(f"files {words}: {len(files)} ({', '.join(files)})")


if __name__ == "__main__":
    main()
