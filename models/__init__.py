"""The network: (x_t, t, start_context, end_context) -> v."""
