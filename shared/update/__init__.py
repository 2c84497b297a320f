"""What a hospital learned, as bytes: the layout both sides agree on, and the codec."""
