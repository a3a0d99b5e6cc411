"""Measurements behind every claim of speed: variants timed in turn inside one run, as ratios to a stated reference."""
