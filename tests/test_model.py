"""VideoUNet3D against its design: parameters, identities at the start, what each input reaches."""

import pytest
import torch
from torch import nn

from models.blocks.attention3d import TemporalAttentionBlock
from models.blocks.resnet3d import ResBlock3D
from models.modules import frame_conv
from models.modules.film import FiLM
from models.modules.frame_conv import FrameConv3d
from models.modules.temporal_attention import TemporalAttention, sinusoidal_embedding
from models.video_unet3d import VideoUNet3D

TINY = {
    "base_channels": 12,  # three channels to a norm group, as in the default network
    "channel_mults": [1, 2],
    "res_blocks": 1,
    "temporal_attn_levels": [1],
}


def shaken(module, seed=0, by=0.05):
    """The module in eval mode, with noise on every weight: nothing stays at its initial zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tiny(**changes):
    torch.manual_seed(0)
    return shaken(VideoUNet3D(**{**TINY, **changes}))


def inputs(b=2, c=3, k=2, m=4, size=16):
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(b, c, m + 2 * k, size, size, generator=generator)
    start, x_t, end = clips.split([k, m, k], dim=2)
    return x_t, torch.arange(b) * 300, start, end


def close(actual, expected):
    """Equal up to sums of float32 in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_default_network_has_the_designed_parameters_and_starts_at_zero_velocity():
    with torch.device("meta"):
        model = VideoUNet3D()
    assert sum(parameter.numel() for parameter in model.parameters()) == 76_543_683
    assert VideoUNet3D(**TINY)(*inputs()).eq(0).all()


SHAPES = [
    ({}, {"m": 1}),
    ({"image_channels": 1}, {"b": 3, "c": 1, "m": 7}),
    ({"endpoint_context": 3}, {"k": 3}),
    ({"endpoint_context": 1, "temporal_attn_levels": []}, {"k": 1}),
    ({"channel_mults": [1], "temporal_attn_levels": [0]}, {"size": 6}),
    ({"base_channels": 20, "res_blocks": 2, "channel_mults": [1, 1, 3]}, {"size": 24}),
]


@pytest.mark.parametrize(("changes", "shape"), SHAPES)
def test_velocity_has_the_shape_of_x_t_and_every_parameter_learns(changes, shape):
    model = tiny(**changes)
    x_t, *given = inputs(**shape)
    v = model(x_t, *given)
    assert v.shape == x_t.shape
    v.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


def test_clips_of_a_batch_do_not_see_each_other_and_their_features_serve_every_t():
    model = tiny()
    x_t, t, start, end = inputs(b=3)
    together = model(x_t, t, start, end)
    for i in range(3):
        features = model.encode_contexts(start[i, None], end[i, None])
        later = model.denoise(x_t[i, None], t[i, None] + 100, features)
        single = model.denoise(x_t[i, None], t[i, None], features)
        close(single[0], together[i])
        assert (later - single).abs().max() > 1e-3


def test_a_guide_stands_beside_each_noisy_frame_in_place_of_the_nearest_frames():
    x_t, t, start, end = inputs()
    nearest = torch.cat([start[:, :, 1:], end[:, :, :1]], dim=1).expand(-1, -1, 4, -1, -1)
    guided = tiny(guide_channels=6)
    guided.load_state_dict(tiny().state_dict())
    close(guided(x_t, t, start, end, nearest), tiny()(x_t, t, start, end))
    other = nearest.clone()
    other[:, :, 2] += 1
    change = (guided(x_t, t, start, end, other) - guided(x_t, t, start, end, nearest)).abs()
    assert change.mean((0, 1, 3, 4)).argmax() == 2


def test_features_fuse_start_then_end_and_keep_the_frames_next_to_the_middle():
    model = tiny()
    _, _, start, end = inputs()
    features = model.encode_contexts(start, end)
    nearest = torch.cat([start[:, :, 1:], end[:, :, :1]], dim=1)
    assert torch.equal(features.guide, nearest)

    # Every map is the fusion of both ends' maps.
    encoder = model.endpoint_encoder
    start_maps, end_maps = (encoder.encoder(ends.reshape(2, 6, 16, 16)) for ends in (start, end))
    maps = [features.stem, *features.levels, features.bottleneck]
    assert [feature.shape[-1] for feature in maps] == [16, 16, 8, 4]
    for feature, fuse, *pair in zip(maps, encoder.fuse, start_maps, end_maps, strict=True):
        close(feature, fuse(torch.cat(pair, dim=1)))


def test_networks_that_cannot_be_built_and_contexts_that_do_not_fit_are_refused():
    for change in (
        {"base_channels": 10},
        {"base_channels": 0},
        {"channel_mults": []},
        {"channel_mults": [1, 0]},
        {"res_blocks": 0},
        {"temporal_attn_levels": [2]},
        {"temporal_attn_levels": [-1]},
    ):
        with pytest.raises(ValueError, match=f"--{next(iter(change))}"):
            VideoUNet3D(**{**TINY, **change})
    model = tiny()
    _, _, start, end = inputs()
    for name, *wrong in (
        ("start_context", start[:, :1], end[:, :1]),
        ("start_context", start[:, :, :1], end[:, :, :1]),
        ("start_context", start[0], end[0]),
        ("end_context", start, end[:1]),
        ("--size", start[..., :14, :], end[..., :14, :]),
        ("--size", start[..., :14], end[..., :14]),
    ):
        with pytest.raises(ValueError, match=name):
            model.encode_contexts(*wrong)


def test_temporal_attention_is_torchs_attention_over_the_frames_of_each_pixel():
    torch.manual_seed(0)
    ours = TemporalAttention(16, heads=4)
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    reference.in_proj_weight.data = ours.qkv.weight.data
    reference.in_proj_bias.data = ours.qkv.bias.data
    reference.out_proj.load_state_dict(ours.out.state_dict())
    block = shaken(TemporalAttentionBlock(16), by=1.0)
    block.attention = ours
    x = torch.randn(2, 16, 5, 3, 4)
    mixed = torch.empty_like(x)
    for row in range(3):
        for column in range(4):
            tokens = block.norm(x)[..., row, column].transpose(1, 2)  # [B,M,C]
            tokens = tokens + sinusoidal_embedding(torch.arange(5), 16)
            mixed[..., row, column] = reference(tokens, tokens, tokens)[0].transpose(1, 2)
    close(block(x), x + block.proj(mixed))


def test_untrained_blocks_are_identities_and_film_modulates_every_frame_alike():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 4)
    assert torch.equal(ResBlock3D(8, 8, 16)(x, torch.randn(2, 16)), x)
    assert torch.equal(TemporalAttentionBlock(8)(x), x)
    film = FiLM(5, 8)
    condition = torch.randn(2, 5, 4, 4)
    assert torch.equal(film(x, condition), x)
    modulated = shaken(film, by=1.0)(x, condition)
    for frame in range(3):
        expected = x[:, :, frame] * (1 + film.scale(condition)) + film.shift(condition)
        torch.testing.assert_close(modulated[:, :, frame], expected)


def test_sinusoids_hold_sine_and_cosine_from_unit_to_longest_period():
    embedding = sinusoidal_embedding(torch.tensor([0, 3]), 8)
    angle = 3 * torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(embedding[1], torch.cat([angle.sin(), angle.cos()]))
    assert embedding[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_single_small_clip_is_convolved_to_the_same_frames_and_gradients(frames, monkeypatch):
    torch.manual_seed(0)
    conv = FrameConv3d(6, 5)
    x = torch.randn(1, 6, frames, 8, 8, requires_grad=True)
    forms = []
    for rows in (0, 10**9):  # torch's Conv3d, then 2-D convolutions
        monkeypatch.setattr(frame_conv, "SLOW_ROWS", rows)
        y = conv(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, conv.weight, conv.bias])
        forms.append([y, *gradients])
    # Sums of 162 products in another order.
    torch.testing.assert_close(*forms, rtol=1e-4, atol=1e-4)
