"""The trainer: refits heads, averages rounds, builds candidates; and the gate that judges them."""
