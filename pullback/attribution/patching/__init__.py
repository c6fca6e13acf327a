"""Patching: what exchanging one place's value between a clean and a corrupted run does, exactly and to first order."""

from .scores import Direction, Method, patching_scores

__all__ = ["Direction", "Method", "patching_scores"]
