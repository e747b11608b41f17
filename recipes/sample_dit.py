"""Draws images from a trained diffusion transformer, by class and guidance.

    python recipes/sample_dit.py runs/promoe_dit-1 --classes 3,7 --guidance 2 --count 8 --out threes_and_sevens.png

From a run of ``promoe_dit.py`` (its averaged weights) or an export of one (``gatewright export``): one row a class. The
same seed, classes and count draw the same images, whatever the batch size. Needs no DeepSpeed.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.recipes.data.autoencoder import load_autoencoder
from gatewright.recipes.models import DiTConfig, create_objective, draw_samples
from gatewright.recipes.models.dit import load_dit
from gatewright.recipes.picture import save_grid
from gatewright.tools.runs import Run
from gatewright.tools.weights import read_description

PROGRAM = "sample_dit"
NONE = "none"
SHOWN = 10  # classes that are drawn where none are named


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of an export")
    parser.add_argument(
        "--classes", metavar="A,B,..", help=f'class numbers, or "{NONE}" for no class; the first {SHOWN} by default'
    )
    parser.add_argument("--count", type=int, default=8, help="images of each class")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 = none")
    parser.add_argument("--steps", type=int, default=50, help="forwards an image")
    parser.add_argument("--sampler", help="ddim or ancestral, for a run with the ddpm objective")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help='"ema" or "model"; by default a run\'s "ema", and what an export holds')
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder that turns latents into pictures")
    parser.add_argument("--batch", type=int, default=64, help="images a forward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the picture")
    return parser.parse_args(argv)


def draw(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an option that does not fit the run, or a run that cannot be read.
        FileNotFoundError: no run there.
    """
    run = read_description(args.run)
    model = load_dit(args.run, weights=args.weights).to(args.device)
    options = {} if args.sampler is None else {"sampler": args.sampler}
    objective = create_objective(run.options.get("objective", "flow"), model.config, **options)
    classes = parse_classes(args.classes, model.config)
    if args.count < 1:
        raise ValueError(f"--count {args.count}: choose at least 1")
    samples = draw_samples(
        objective,
        model,
        torch.tensor(classes).repeat_interleave(args.count),
        guidance=args.guidance,
        steps=args.steps,
        seed=args.seed,
        batch_size=args.batch,
    )
    save_grid(to_pixels(samples, run, args), args.out, columns=args.count)
    names = ", ".join(NONE if label == model.config.num_classes else str(label) for label in classes)
    print(f"{args.out}: {args.count} each of {names}; guidance {args.guidance:g}, {args.steps} steps, seed {args.seed}")


def parse_classes(given: str | None, config: DiTConfig) -> list[int]:
    """Labels out of "3,7" or "none".

    Raises:
        ValueError: a word that is neither a class number nor "none".
    """
    if given is None:
        return list(range(min(SHOWN, config.num_classes)))
    labels = []
    for word in given.split(","):
        if word.strip() == NONE:
            labels.append(config.num_classes)
        elif word.strip().isdecimal() and int(word) < config.num_classes:
            labels.append(int(word))
        else:
            raise ValueError(
                f'--classes {given}: "{word}" is neither a number 0 to {config.num_classes - 1} nor "{NONE}"'
            )
    return labels


def to_pixels(samples: Tensor, run: Run, args: argparse.Namespace) -> Tensor:
    """[N, C, H, W] -> uint8 [N, H, W, C]"""
    latents = str(run.options.get("data", "")).startswith("latents:")
    if latents != (args.vae is not None):
        raise ValueError(
            "this run draws latents: name the autoencoder's folder, --vae DIR"
            if latents
            else "this run draws pixels: leave --vae out"
        )
    if latents:
        autoencoder = load_autoencoder(args.vae, device=args.device)
        samples = torch.cat([autoencoder.decode(part / autoencoder.scale) for part in samples.split(args.batch)])
    pixels = (samples.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        draw(args)
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


if __name__ == "__main__":
    main()
