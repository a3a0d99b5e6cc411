"""The two networks: the denoiser (x_t, t, start_context, end_context) -> v, and the predictor."""
