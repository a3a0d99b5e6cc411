"""Pure tensor functions on clips, bytes on disk, checkpoints, flags, devices, processes; imports no other room."""
