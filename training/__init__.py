"""What a training run needs beside network and loss: its state, checkpoints, log, and several processes."""
