"""Measurements of speed: variants in turn, as ratios to a stated reference."""
