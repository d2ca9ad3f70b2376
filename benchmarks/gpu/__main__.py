"""One NVIDIA machine checked and measured: right first, then fast.

python -m benchmarks.gpu --minutes 8 --folder DIR     DIR/model is a checkpoint, DIR/prompts.txt has a prompt a line
python -m benchmarks.gpu --model demo --device cpu    the same program without a GPU

Needs the project, torch, Triton and transformers; peft and vLLM are compared with where they are installed. Writes
gpu.json and gpu.txt to the folder of --out. Exits 1 where a section failed; the others run all the same.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.gpu import correct, speed
from benchmarks.gpu.report import Report, Run, page, run_sections
from benchmarks.gpu.subject import Subject


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here (--device cpu checks the program itself)")
    folder: Path | None = options.folder
    model = options.model or (str(folder / "model") if folder else "demo")
    prompts = folder / "prompts.txt" if folder and (folder / "prompts.txt").exists() else None
    device = torch.device(options.device)
    subject = Subject(model, device, prompts=prompts, most=options.most)
    chosen = {name: section for name, section in sections(subject).items() if name in options.only}
    report = Report(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        machine=describe(),
        model=model,
        minutes=options.minutes,
        sections=run_sections(chosen, 60 * options.minutes),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    text = page(report)
    (options.out / "gpu.txt").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 1 if report.failed else 0


def sections(subject: Subject) -> dict[str, tuple[float, Run]]:
    """Every section by name: its weight in the time, and its function. What says right or wrong comes first."""
    roofline = speed.Roofline()
    return {
        "ops": (1.0, partial(correct.ops, subject)),
        "tokens": (1.0, partial(correct.tokens, subject)),
        "graphs": (1.0, partial(correct.graphs, subject)),
        "adapters": (1.0, partial(correct.adapters, subject)),
        "training": (1.0, partial(correct.training, subject)),
        "roofline": (0.3, partial(speed.measure_roofline, subject, roofline)),
        "serving": (2.0, partial(speed.serving, subject, roofline)),
        "transformers": (2.0, partial(speed.against_transformers, subject)),
        "vllm": (3.0, partial(speed.against_vllm, subject)),
        "beside": (1.5, partial(speed.beside_training, subject)),
    }


NAMES = ("ops", "tokens", "graphs", "adapters", "training", "roofline", "serving", "transformers", "vllm", "beside")


def describe() -> dict[str, Any]:
    """Versions, which two reports must have in common to be compared."""
    import transformers

    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"transformers": transformers.__version__, "cuda": str(torch.version.cuda)}
    return versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, divided over the sections")
    parser.add_argument("--folder", type=Path, help="with model/ and prompts.txt")
    parser.add_argument("--model", help="as in eft serve; default: the folder's, else demo")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--most", type=int, default=256, help="rows of the largest batch")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="sections to run")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
