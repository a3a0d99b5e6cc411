"""The network against its design: parameter count, identities at initialisation, what each input can reach."""

import copy

import pytest
import torch
from torch import nn

from models.blocks.attention3d import TemporalAttentionBlock
from models.blocks.resnet3d import ResBlock3D
from models.modules import frame_conv
from models.modules.film import FiLM
from models.modules.frame_conv import FrameConv3d
from models.modules.temporal_attention import TemporalAttention, sinusoidal_embedding
from models.video_unet3d import VideoUNet3D, build_model

TINY = {"image_channels": 3, "channel_mults": [1, 2], "res_blocks": 1, "temporal_attn_levels": [1]}
TINY |= {"endpoint_context": 2, "base_channels": 12}  # 3 channels per norm group, as in the default network


def tiny(seed=0, **changes):
    """A tiny network whose zero-initialised layers are shaken awake, so that every path carries signal."""
    torch.manual_seed(seed)
    model = build_model(TINY | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(b=2, c=3, k=2, m=4, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda frames: torch.randn(b, c, frames, size, size, generator=generator)  # noqa: E731
    return draw(m), torch.arange(b) * 300, draw(k), draw(k)


def test_the_default_network_has_exactly_the_designed_parameters():
    with torch.device("meta"):
        model = VideoUNet3D()
    assert sum(p.numel() for p in model.parameters()) == 76_543_683
    assert all(p.requires_grad for p in model.parameters())


def test_an_untrained_network_predicts_zero_velocity():
    model = build_model(TINY)
    assert model(*inputs()).eq(0).all()


SHAPES = [
    ({}, {"m": 1}),
    ({}, {"b": 3, "m": 7}),
    ({"image_channels": 1}, {"c": 1}),
    ({"endpoint_context": 3}, {"k": 3}),
    ({"endpoint_context": 1, "temporal_attn_levels": []}, {"k": 1}),
    ({"channel_mults": [1], "temporal_attn_levels": [0]}, {"size": 6}),
    ({"base_channels": 20, "res_blocks": 2, "channel_mults": [1, 1, 3]}, {"size": 24}),
]


@pytest.mark.parametrize(("changes", "shape"), SHAPES)
def test_velocity_has_the_shape_of_x_t_and_every_parameter_learns(changes, shape):
    model, (x_t, t, start, end) = tiny(**changes), inputs(**shape)
    v = model(x_t, t, start, end)
    assert v.shape == x_t.shape
    v.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # with one frame there is nothing to attend to: the softmax is 1, so queries and keys get no gradient, but v does
    assert idle == []


def test_forward_is_encode_then_denoise():
    model, (x_t, t, start, end) = tiny(), inputs()
    features = model.encode_contexts(start, end)
    assert torch.equal(model(x_t, t, start, end), model.denoise(x_t, t, features))
    later = model.denoise(x_t, t + 50, features)  # features are independent of t and can be reused
    torch.testing.assert_close(later, model(x_t, t + 50, start, end))


def test_clips_of_a_batch_do_not_see_each_other():
    model, (x_t, t, start, end) = tiny(), inputs(b=3)
    together = model(x_t, t, start, end)
    for i in range(3):
        alone = model(*(value[i : i + 1] for value in (x_t, t, start, end)))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_every_observed_frame_the_order_of_the_ends_and_the_timestep_matter():
    model, (x_t, t, start, end) = tiny(), inputs(k=2)
    base = model(x_t, t, start, end)
    assert (model(x_t, t + 100, start, end) - base).abs().max() > 1e-3
    for context in (start, end):
        for frame in range(2):
            context[:, :, frame] += 1
            assert (model(x_t, t, start, end) - base).abs().max() > 1e-3
            context[:, :, frame] -= 1
    assert (model(x_t, t, end, start) - base).abs().max() > 1e-3


def test_context_features_mix_start_then_end_and_keep_the_frames_next_to_the_middle():
    model, (x_t, t, start, end) = tiny(), inputs(k=2)
    features, encoder, stem_inputs = model.encode_contexts(start, end), model.endpoint_encoder, []
    nearest = torch.cat([start[:, :, 1], end[:, :, 0]], dim=1)  # the last start frame, then the first end frame
    assert torch.equal(features.nearest, nearest)
    start_maps, end_maps = (encoder.encoder(context.reshape(2, 6, 16, 16)) for context in (start, end))
    fused = [features.stem, *features.levels, features.bottleneck]
    for feature, fuse, *pair in zip(fused, encoder.fuse, start_maps, end_maps, strict=True):
        torch.testing.assert_close(feature, fuse(torch.cat(pair, dim=1)))
        assert (feature - fuse(torch.cat(pair[::-1], dim=1))).abs().max() > 1e-2
    model.stem.register_forward_pre_hook(lambda stem, given: stem_inputs.append(given[0]))
    model.denoise(x_t, t, features)
    assert torch.equal(stem_inputs[0], torch.cat([x_t, nearest[:, :, None].expand(-1, -1, 4, -1, -1)], dim=1))


def test_frame_order_matters_to_attention_and_positions_are_what_tells_it():
    torch.manual_seed(0)
    attention, tokens = TemporalAttention(16), torch.randn(5, 4, 16)
    reversed_after = attention(tokens).flip(1)
    assert (attention(tokens.flip(1)) - reversed_after).abs().max() > 1e-2
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    torch.testing.assert_close(plain(*[tokens.flip(1)] * 3)[0], plain(*[tokens] * 3)[0].flip(1))


def test_temporal_attention_is_torchs_multihead_attention_on_tokens_with_positions():
    torch.manual_seed(0)
    ours, reference = TemporalAttention(16, heads=4), nn.MultiheadAttention(16, 4, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    reference.out_proj.load_state_dict(ours.out.state_dict())
    tokens = torch.randn(7, 5, 16)
    placed = tokens + sinusoidal_embedding(torch.arange(5), 16)
    torch.testing.assert_close(ours(tokens), reference(placed, placed, placed)[0], rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())


def test_attention_mixes_frames_of_a_pixel_and_no_other_pixel():
    torch.manual_seed(0)
    block = TemporalAttentionBlock(8)
    nn.init.normal_(block.proj.weight)
    block.norm = nn.Identity()  # the norm shares statistics over pixels; attention must not
    x = torch.randn(1, 8, 4, 5, 5)
    poked = x.clone()
    poked[:, :, 2, 1, 3] += 1
    changed = (block(poked) - block(x)).abs().amax((0, 1)) > 1e-6  # [M,H,W]
    assert changed[:, 1, 3].all() and changed.sum() == 4


def test_more_attention_rows_than_cuda_kernels_take():
    torch.manual_seed(0)
    attention, tokens = TemporalAttention(4, heads=4), torch.randn(65_537, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(attention(tokens)[-3:], attention(tokens[-3:]), rtol=1e-4, atol=1e-5)


def test_blocks_start_as_their_shortcut_and_film_as_identity():
    torch.manual_seed(0)
    x, time = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 16)
    assert torch.equal(ResBlock3D(8, 8, 16)(x, time), x)
    assert torch.equal(TemporalAttentionBlock(8)(x), x)
    assert torch.equal(FiLM(5, 8)(x, torch.randn(2, 5, 4, 4)), x)
    wider = ResBlock3D(8, 12, 16)
    assert torch.equal(wider(x, time), wider.shortcut(x))


def test_film_scales_and_shifts_every_frame_alike():
    torch.manual_seed(0)
    film = FiLM(5, 8)
    nn.init.normal_(film.scale.weight)
    nn.init.normal_(film.shift.weight)
    condition, x = torch.randn(2, 5, 4, 4), torch.randn(2, 8, 3, 4, 4)
    result = film(x, condition)
    for frame in range(3):
        expected = x[:, :, frame] * (1 + film.scale(condition)) + film.shift(condition)
        torch.testing.assert_close(result[:, :, frame], expected)


def test_sinusoids_hold_sine_and_cosine_from_unit_to_longest_period():
    embedding = sinusoidal_embedding(torch.tensor([0, 3]), 8)
    frequency = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(embedding[1], torch.cat([(3 * frequency).sin(), (3 * frequency).cos()]))
    assert embedding[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sinusoidal_embedding(torch.tensor([1]), 7).shape == (1, 7)


UNBUILDABLE = [
    ({"base_channels": 10}, r"^base_channels must be a positive multiple of 4 \(got 10\)"),
    ({"channel_mults": []}, "^channel_mults must be one or more positive integers"),
    ({"res_blocks": 0}, "^res_blocks must be at least 1"),
    ({"endpoint_context": 0}, "^endpoint_context must be at least 1"),
    ({"temporal_attn_levels": [2]}, r"^temporal_attn_levels must lie in \[0, 1\].*got 2"),
    ({"base_channels": 10**9}, "integers of at most 4096"),
    ({"res_blocks": "two"}, "integers of at most 4096"),
    ({"channel_mults": 3}, "must be lists of integers"),
    ({"depth": 3}, "model_config must have the keys .*depth"),
]


@pytest.mark.parametrize(("change", "message"), UNBUILDABLE)
def test_a_network_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_model(TINY | change)
    with pytest.raises(ValueError, match="differs in .*res_blocks"):
        build_model({key: value for key, value in TINY.items() if key != "res_blocks"})


def test_inputs_that_do_not_fit_are_refused():
    model, (x_t, t, start, end) = tiny(), inputs()
    for wrong, message in (
        (inputs(k=3), r"start_context must be \[B,3,2,H,W\].*got \(2, 3, 3, 16, 16\)"),
        (inputs(c=1), r"start_context must be \[B,3,2,H,W\]"),
        (inputs(size=18), r"size must be divisible by 4, as each level of the network halves it \(got 18\)"),
        ((x_t, t, start, end[:, :, :1]), r"end_context must be \[B,3,2,H,W\]"),
        ((x_t, t, start, end[:1]), "must have one shape"),
        ((x_t[:, :, :, :8, :8], t, start, end), "batch, height and width of its contexts"),
        ((x_t[:, :1], t, start, end), r"x_t must be \[B,3,M,H,W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*wrong)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_single_small_clip_is_convolved_to_the_same_frames_and_gradients(frames, monkeypatch):
    torch.manual_seed(0)
    conv = FrameConv3d(6, 5)
    x = torch.randn(1, 6, frames, 8, 8, requires_grad=True)
    results = []
    for rows in (0, 10**9):  # torch's Conv3d, then one 2-D convolution per kernel frame
        monkeypatch.setattr(frame_conv, "SLOW_ROWS", rows)
        y = conv(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, conv.weight, conv.bias])
        results.append((y, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # float32 sums of 162 products, reordered


def gradients_of(model):
    v = model(*inputs(seed=1))
    v.square().mean().backward()
    return v.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("form", ["layout", "checkpointing"])
def test_memory_layout_and_activation_checkpointing_change_nothing_but_rounding(form):
    model = tiny()
    other = copy.deepcopy(model)
    if form == "layout":
        other.set_memory_format()  # on a CPU: channels last
        assert model.stem.weight.is_contiguous() and not other.stem.weight.is_contiguous()
    else:
        other.activation_checkpointing = True
    (v, gradients), (v_other, gradients_other) = gradients_of(model), gradients_of(other)
    torch.testing.assert_close(v, v_other, rtol=1e-4, atol=1e-5)
    for one, another in zip(gradients, gradients_other, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-6)  # sums over 8,192 pixels, reordered
