"""`python -m edge`: the same command line as `radfleet-edge`."""

from edge.cli import main

main()
