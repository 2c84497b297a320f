"""`python -m cloud`: the same command line as `radfleet-cloud`."""

from cloud.cli import main

main()
