"""The network: (x_t, t, start_context, end_context) -> v, and the predictor that it may refine."""
