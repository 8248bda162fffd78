"""What tests need to start processes of one run on this machine."""

import os
import re
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNT = "--xla_force_host_platform_device_count"


def free_address():
    """An address at which a coordinator can listen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def environment(devices=0):
    """This process's, with so many devices; with 0 as many as the other one says itself."""
    flags = re.sub(
        f"{COUNT}=[0-9]+", f"{COUNT}={devices}" if devices else "", os.environ["XLA_FLAGS"]
    )
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
