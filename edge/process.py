"""One process of the node: `python -m edge.process NAME EDGE.TOML`, what the supervisor starts.

Not through the command line, which imports what every command needs: the door's memory is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge import app
from edge.config import load_config
from edge.identity import read_identity
from shared.console import run_cli
from shared.log import configure
from shared.supervise import stop_on_signals


def main() -> None:
    """Runs the process until SIGTERM."""
    name, path = sys.argv[1:]
    stop = stop_on_signals()
    config = load_config(Path(path))
    node = read_identity(config.state)
    configure(name, **({"site": node.site, "node": node.node} if node else {}))
    app.run_process(name, config, stop)


if __name__ == "__main__":
    run_cli(main)
