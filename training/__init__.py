"""What a training run is made of, beside the loop in train_video_ddpm.py."""
