"""Scalars for TensorBoard, written without TensorFlow and without a thread.

The record format (length, checksum, data, checksum) and the messages are those of TensorBoard's
event files; `tensorboardX` supplies the messages and the checksum. Its own writer works in a thread
that does not survive a full disk.
"""

import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class EventLog:
    """One event file, of one process's part of a run.

    Args:
      folder: where TensorBoard will look.
      step: the step from which the run goes on; what older files say of later steps is hidden.

    Raises:
      OSError: here and in `write`, the file cannot be written. It is open while it is written and
        no longer.
    """

    def __init__(self, folder: str, step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        where = f"{socket.gethostname()}.{os.getpid()}.{step}"
        name = f"events.out.tfevents.{time.time():.0f}.{where}"
        self._path = os.path.join(folder, name)
        self._append(
            [
                Event(wall_time=time.time(), file_version="brain.Event:2"),
                Event(
                    wall_time=time.time(),
                    step=step + 1,
                    session_log=SessionLog(status=SessionLog.START),
                ),
            ]
        )

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds every float of rows of `metrics.jsonl`, as `<split>/<name>`."""
        events = []
        for row in rows:
            values = [
                Summary.Value(tag=f"{row['split']}/{name}", simple_value=value)
                for name, value in row.items()
                if isinstance(value, float)
            ]
            summary = Summary(value=values)
            events.append(Event(wall_time=time.time(), step=row["step"], summary=summary))
        self._append(events)

    def _append(self, events: Iterable[Event]) -> None:
        with open(self._path, "ab") as file:
            file.write(b"".join(_record(event.SerializeToString()) for event in events))


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checks[0] + data + checks[1]
