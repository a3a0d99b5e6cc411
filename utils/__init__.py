"""Tensors, images, files, checkpoints, flags, devices: what several rooms need."""
