"""Residual units on [B,C,M,H,W]."""
