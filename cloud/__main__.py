"""`python -m cloud`: the same command line as `radfleet-cloud`."""

from cloud.cli import main

if __name__ == "__main__":  # a spawned child imports this module under another name
    main()
