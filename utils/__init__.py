"""Pure tensor functions on clips, bytes on disk, checkpoints, and flag types; imports nothing of the project."""
