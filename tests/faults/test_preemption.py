"""A notice of preemption to one of two processes: both save the same step and leave."""

import signal
from pathlib import Path

from tests.faults.fault_cases import end, read_metrics, size, steps_saved, until


def test_both_processes_stop_at_one_step(command, tmp_path):
    workdir = tmp_path / "run"
    processes = command.start_two(workdir, STEP_SECONDS="0.5")
    assert until(lambda: size(workdir / "metrics.jsonl") > 900, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert [end(process, 60) for process in processes] == [75, 75]
    saved = max(steps_saved(workdir))
    for path in (workdir, tmp_path / "second"):
        assert f"stopped at step {saved}, which is saved" in Path(f"{path}.err").read_text()
    assert [row["step"] for row in read_metrics(workdir)][-1] <= saved
    code, _ = command.run(workdir)  # one process goes on from there
    assert code == 0
    steps = [row["step"] for row in read_metrics(workdir) if row["split"] == "train"]
    assert steps == list(range(1, 19))
