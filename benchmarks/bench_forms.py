"""Exact forms of the network's two dear operations, its 3x3x3 convolution and its temporal attention, timed in turn.

    python benchmarks/bench_forms.py

All forms of an operation give the same numbers to rounding, which is checked first. The network uses Conv3d with
channels last, by kernel frame where SLOW_ROWS says so, and attention as matrix products.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import Variant, add_common_flags, compare, interleave, save_findings
from models.modules import frame_conv
from models.modules.frame_conv import FrameConv3d
from models.modules.temporal_attention import TemporalAttention
from utils.flags import Parser, resolve_device

Forms = dict[str, Callable[[], Tensor]]  # name: one run, on an input of its own making

FRAMES = 4
CONVOLUTIONS = (  # batch, input and output channels, height = width: of the demo's network, then of the default one
    (1, 24, 24, 32), (1, 48, 24, 32), (1, 96, 96, 8), (2, 24, 24, 32), (8, 24, 24, 32), (8, 48, 24, 32),
    (8, 48, 48, 16), (1, 96, 96, 64), (1, 192, 96, 64), (1, 384, 384, 16),
)  # fmt: skip
ATTENTIONS = ((1, 48, 16), (8, 48, 16), (1, 192, 32), (2, 192, 32), (1, 384, 16))  # batch, channels, height = width


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    add_common_flags(parser, rounds=7)
    return parser


# --- convolution ------------------------------------------------------------------------------------------------------


def torch_conv(conv: FrameConv3d, x: Tensor) -> Tensor:
    """What torch makes of it."""
    return functional.conv3d(x, conv.weight, conv.bias, padding=1)


def by_kernel_frame(conv: FrameConv3d, x: Tensor) -> Tensor:
    """One 2-D convolution per kernel frame, clip by clip."""
    return torch.stack([conv.by_kernel_frame(clip.transpose(0, 1)).transpose(0, 1) for clip in x])


def neighbours_as_channels(conv: FrameConv3d, x: Tensor) -> Tensor:
    """Each frame with its two neighbours as channels of one 2-D convolution."""
    b, c, m, h, w = x.shape
    padded = functional.pad(x, (0, 0, 0, 0, 1, 1))
    windows = torch.cat([padded[:, :, k : k + m] for k in range(3)], dim=1)  # [B,3C,M,H,W]
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # [C_out,3C,3,3]
    y = functional.conv2d(windows.transpose(1, 2).reshape(b * m, 3 * c, h, w), weight, conv.bias, padding=1)
    return y.view(b, m, -1, h, w).transpose(1, 2)


def convolution_forms(
    b: int, c_in: int, c_out: int, size: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Every form, on one random input."""
    conv = FrameConv3d(c_in, c_out).to(device)
    last = FrameConv3d(c_in, c_out).to(device)
    last.load_state_dict(conv.state_dict())
    last.to(memory_format=torch.channels_last_3d)
    x = torch.randn(b, c_in, FRAMES, size, size, device=device, requires_grad=True)
    x_last = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    return {
        "Conv3d": lambda: torch_conv(conv, x),
        "Conv3d, channels last": lambda: torch_conv(last, x_last),
        "by kernel frame": lambda: by_kernel_frame(last, x_last),
        "neighbours as channels": lambda: neighbours_as_channels(last, x_last),
    }


# --- attention --------------------------------------------------------------------------------------------------------


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, in blocks of rows that its CUDA kernels take."""
    parts = (part.split(32_768) for part in (q, k, v))
    return torch.cat([functional.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)])


def broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products and sums of whole tensors, without any matrix product."""
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def attention_forms(b: int, channels: int, size: int, device: torch.device) -> Forms:
    """Every form, on one random input of rows as the network has them."""
    heads = 4
    qkv = torch.randn(b * size * size, FRAMES, 3, heads, channels // heads, device=device, requires_grad=True)

    def run(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: form(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    return {
        "matrix products": run(TemporalAttention.attend),
        "scaled_dot_product_attention": run(fused),
        "broadcasting": run(broadcast),
    }


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(forms: Forms, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each form, [forward alone, forward and backward], once all are seen to agree."""
    first = next(iter(forms.values()))()
    for name, form in forms.items():
        torch.testing.assert_close(form(), first, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n} differs: {m}")

    gradient = torch.randn_like(first)  # dense, as in the network; that of a sum would be one number, expanded

    def backward(form: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: form().backward(gradient)

    def forward(form: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(form)

    found: dict[str, list[float]] = {name: [] for name in forms}
    for way in (forward, backward):
        timings = interleave([Variant(name, way(form), 1) for name, form in forms.items()], rounds, device)
        for row in compare(timings, next(iter(forms))):
            found[row["variant"]].append(1000 * row["seconds_per_clip"])
    return found


def cell(value: float, least: float) -> str:
    """A number of a table, bold where it is the least."""
    return f"**{value:.3g}**" if value == least else f"{value:.3g}"


def print_forms(title: str, shapes: Sequence[tuple], tables: list[dict[str, list[float]]]) -> None:
    """A column per form, a row per shape: milliseconds forward / forward and backward, the fastest of each marked."""
    names = list(tables[0])
    print(f"\n{title}: ms forward / forward and backward, the least in bold\n")
    print(f"| {' | '.join(['shape', *names])} |\n|{'---|' * (len(names) + 1)}")
    for shape, table in zip(shapes, tables, strict=True):
        least = [min(values[way] for values in table.values()) for way in (0, 1)]
        cells = [" / ".join(cell(*pair) for pair in zip(table[name], least, strict=True)) for name in names]
        print(f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        convolutions = [measure(convolution_forms(*shape, device), args.rounds, device) for shape in CONVOLUTIONS]
        print_forms("convolution, batch x in x out x size", CONVOLUTIONS, convolutions)
        attentions = [measure(attention_forms(*shape, device), args.rounds, device) for shape in ATTENTIONS]
        print_forms("attention over 4 frames, batch x channels x size", ATTENTIONS, attentions)
        print(f"\n{torch.get_num_threads()} threads, {device}; slow rows on a CPU: {frame_conv.SLOW_ROWS}")
        tables = {"convolution": [*zip(CONVOLUTIONS, convolutions, strict=True)]}
        tables["attention"] = [*zip(ATTENTIONS, attentions, strict=True)]
        save_findings(args.out_dir, "forms", device, tables)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
