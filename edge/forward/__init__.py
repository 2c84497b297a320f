"""Routing and forwarding: what happens to a received object, queues to other archives, and fetching from them."""
