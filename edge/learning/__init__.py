"""Local training and judging on confirmed cases, in a process of its own: a node's only one with torch."""
