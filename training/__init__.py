"""What a run needs beside network and loss: state, optimiser, validation, checkpoints, log, several processes."""
