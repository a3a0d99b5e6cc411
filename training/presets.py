"""Flags that go together: what --preset fills in, what --resume may not change, what --init takes over."""

from typing import Any

# What a checkpoint was trained as: network, clips and diffusion, which --init takes over.
INHERITED_FLAGS = {"num_frames", "size", "frame_stride", "color_mode", "endpoint_context", "base_channels"}
INHERITED_FLAGS |= {"channel_mults", "res_blocks", "temporal_attn_levels", "timesteps", "beta_schedule", "noise_offset"}
INHERITED_FLAGS |= {"noise_correlation", "cfg_drop_prob", "temporal_loss_weight", "predictor", "predictor_width"}
INHERITED_FLAGS |= {"residual_scale"}
# What --resume may not change.
FIXED_FLAGS = INHERITED_FLAGS | {"init", "seed", "val_ratio", "max_videos", "predictor_steps", "optimizer"}

# Predict and refine: what won in docs/results.md, for any size of network and clips.
REFINE = {"predictor": "learned", "optimizer": "muon", "lr": 1e-3, "warmup_steps": 100, "ema_decay": 0.995}
REFINE |= {"noise_correlation": 0.5, "vis_steps": 3, "vis_guidance_scale": 1.0}
# The same in about five minutes of one CPU thread: small frames, a small network.
DEMO = REFINE | {"out_dir": "outputs/demo", "size": 32, "num_workers": 0, "cache_videos": True, "lr": 2e-3}
DEMO |= {"base_channels": 24, "channel_mults": [1, 2], "res_blocks": 1, "temporal_attn_levels": [1], "warmup_steps": 50}
DEMO |= {"epochs": 45, "predictor_steps": 1000, "ema_decay": 0.99, "vis_every": 9, "log_every": 50}
TRAIN_PRESETS: dict[str, dict[str, Any]] = {"demo": DEMO, "refine": REFINE}
