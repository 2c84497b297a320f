"""Campaigns of federated learning as a durable state machine, and the average of what hospitals send."""
