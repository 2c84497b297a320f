"""Real servers as child processes, and a whole fleet on one machine: for the demo, the bench and the tests."""
