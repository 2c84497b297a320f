"""Real servers as child processes, and a whole fleet on one machine: what the demo, the bench and the tests stand on."""
