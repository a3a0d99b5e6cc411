"""What a run needs beside network and loss: state, optimiser, kinds of clips, presets, validation, checkpoints, log."""
