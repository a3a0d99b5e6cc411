"""Export what sampling needs of a checkpoint: EMA weights in half precision, and configuration.

python tools/export_weights.py --ckpt outputs/demo/best.pt --out demo.pt
"""

import sys
from pathlib import Path

# As a script, Python searches this folder and not the repository.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.checkpoint import checkpoint_errors, load_checkpoint, save_checkpoint
from utils.flags import Parser, non_negative_float, nonempty_path, positive_float
from utils.io import file_sha256

KEPT = ("step", "args", "history", "model_config", "diffusion_config", "clip_config", "predictor")
PLACES = ("data_root", "cache_dir", "out_dir", "predictor")  # on the machine of training


def build_parser() -> Parser:
    """Define the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=nonempty_path, required=True, help="checkpoint of training")
    add("--out", type=nonempty_path, required=True, help="file to write, NAME.pt")
    add("--contrast", type=positive_float, help="of the predictor's sharp frames; None = as it is")
    add("--code_scale", type=non_negative_float, help="of the predictor's codes; None = as it is")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; exit status 0 = done, 2 = wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    out = Path(args.out)
    with parser.one_line_errors():
        if out.exists() and not args.overwrite:
            raise ValueError(f"--out {out} exists; pass --overwrite")
        checkpoint = load_checkpoint(args.ckpt)
        chosen = {"contrast": args.contrast, "code_scale": args.code_scale}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if chosen and not checkpoint["predictor"]:
            rule = "must be left out for a checkpoint that refines around no predictor"
            raise ValueError(f"--{next(iter(chosen))} {rule} (got {args.ckpt})")
        with checkpoint_errors(args.ckpt):
            exported = {name: checkpoint[name] for name in KEPT}
            exported["ema"] = {name: w.half() for name, w in checkpoint["ema"].items()}
            exported["args"].update(dict.fromkeys(PLACES))
            if exported["predictor"] is not None:
                exported["predictor"]["config"].update(chosen)
                frozen = exported["predictor"]["weights"]
                frozen.update({name: w.half() for name, w in frozen.items()})
        out.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(out, exported)
        print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, sha256 {file_sha256(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
