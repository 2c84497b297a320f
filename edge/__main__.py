"""`python -m edge`: the same command line as `radfleet-edge`."""

from edge.cli import main

if __name__ == "__main__":  # a spawned child imports this module under another name
    main()
