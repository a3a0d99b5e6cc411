"""MP4 files in, uint8 clips out."""
