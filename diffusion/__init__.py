"""Noise schedule, training objective and sampler; knows the network only by its two methods."""
