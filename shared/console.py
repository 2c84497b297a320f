"""How a command line ends: an error is one line, its cure another, and a number; never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from shared.errors import ConfigError, RadfleetError


def run_cli(app: Callable[[], None]) -> None:
    """Runs a command line; a RadfleetError becomes text on standard error and its family's exit code."""
    try:
        app()
    except RadfleetError as exc:
        err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        err.print(f"Error: {exc.message}", style="bold red")
        for fault in exc.faults if isinstance(exc, ConfigError) else ():
            err.print(f"  {fault}")
        if exc.cure:
            err.print(f"Cure: {exc.cure}")
        sys.exit(exc.exit_code)
