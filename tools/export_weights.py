"""Export what sampling needs of a checkpoint into one small file: EMA weights in half precision, and configuration.

Every script takes such a file as --ckpt, and so does the pipeline. Where the package safetensors is installed, a file
of that form is written beside it and read back: both give the same bits.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a script: the repository's root, not tools/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.checkpoint import SAFE_SUFFIX, load_checkpoint, save_weights
from utils.flags import Parser, nonempty_path
from utils.io import file_sha256

HERE = ("data_root", "cache_dir", "out_dir", "log_dir", "init")  # places on the machine of training


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", type=nonempty_path, required=True, help="checkpoint of training: best.pt or last.pt")
    parser.add_argument("--out", type=nonempty_path, required=True, help="file to write, NAME.pt")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def export(ckpt: str, out: Path, overwrite: bool) -> list[Path]:
    """Write the files, read each back, and return them; a ValueError or OSError is for the user to mend."""
    files = [out, out.with_suffix(SAFE_SUFFIX)] if find_spec("safetensors") else [out]
    if out.suffix != ".pt":
        raise ValueError(f"--out must end in .pt (got {out})")
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"--out {file} exists; pass --overwrite or choose another name")
    checkpoint = load_checkpoint(ckpt)
    checkpoint["args"] |= dict.fromkeys(HERE)
    checkpoint["history"] = {"train": [], "epochs": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        save_weights(file, checkpoint)
        ema = load_checkpoint(file)["ema"]
        assert all(torch.equal(ema[name], weight.half()) for name, weight in checkpoint["ema"].items())
    return files


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.one_line_end():
        for file in export(args.ckpt, Path(args.out), args.overwrite):
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, sha256 {file_sha256(file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
