"""A modality that is not ours: DCMTK's `storescu` (C++), with its own view of what was accepted."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sent:
    """What `storescu` says: how many objects it offered and how many were answered with Success (0x0000)."""

    offered: int
    accepted: int
    output: str


def store(
    files: Sequence[Path],
    *,
    port: int,
    called: str,
    calling: str = "MODALITY",
    nodelay: bool = True,
    options: Sequence[str] = (),
) -> Sent:
    """Sends the files in one association and returns what the sender saw; a refusal is counted, not raised."""
    to = ["127.0.0.1", str(port), *map(str, files)]
    command = ["storescu", "-v", *options, "-aet", calling, "-aec", called, *to]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "TCP_NODELAY": "01"[nodelay]},
    )
    output = done.stdout + done.stderr
    accepted = len(re.findall(r"Received Store Response \(Success\)", output))
    return Sent(len(files), accepted, output)


def echo(*, port: int, called: str, calling: str = "MODALITY") -> bool:
    """Tells whether C-ECHO succeeds."""
    command = ["echoscu", "-aet", calling, "-aec", called, "127.0.0.1", str(port)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
