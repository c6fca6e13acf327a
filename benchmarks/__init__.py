"""Ours against the peer and the floor, alternating in one process; ratios, never absolute seconds."""
