"""Layers without a residual and without a notion of U-Net level."""
