"""How often, how well and how fast one image comes back out of one gradient.

Every test image is the only image of its own client. Example:

    python benchmarks/one_image.py --dataset photos --images 100

The result is printed and written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import gradinv_helpers as gi
from gradinv_helpers.experiment import versions
from gradinv_helpers.files import write_json

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Attack the images in groups and report the share above 40 dB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="photos")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--attack", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result; data set and attack by default")
    options = parser.parse_args()

    pool = gi.load_images(options.dataset, data_root=options.data_root, split="test")
    chosen = torch.arange(options.images)
    if options.images < len(pool) and options.dataset == "folder":
        # A folder is sorted by class: take images from all of them.
        chosen = torch.linspace(0, len(pool) - 1, options.images).long()
    victims = pool[chosen]
    channels, size, _ = pool.shape
    model = gi.build_model(
        options.model,
        in_channels=channels,
        image_size=size,
        num_classes=pool.num_classes,
        seed=options.seed,
    )
    updates = [gi.local_update(model, victims[[i]]) for i in range(len(victims))]
    begun = time.perf_counter()
    found = gi.invert_clients(
        updates,
        attack=options.attack,
        restarts=options.restarts,
        iterations=options.iterations,
        seed=options.seed,
    )
    seconds = time.perf_counter() - begun
    scores = [gi.score(r, victims[[i]]) for i, r in enumerate(found)]
    psnr = [s.psnr[0] for s in scores]
    floor = [s.floors["constant"].psnr[0] for s in scores]
    right = [bool(s.label_correct and s.label_correct[0]) for s in scores]
    above = sum(p > 40 for p in psnr)
    print(
        f"{above} of {len(psnr)} above 40 dB, median {statistics.median(psnr):.1f} dB"
    )
    print(f"worst {min(psnr):.1f} dB; best constant image {statistics.mean(floor):.1f}")
    print(f"labels right: {sum(right)} of {len(right)}")
    print(f"{seconds:.0f} s, {seconds / len(psnr):.2f} s per image")
    searched = "" if options.attack == "auto" else f"_{options.attack}"
    name = options.name or f"{options.dataset}{searched}"
    path = write_json(
        RESULTS / f"one_image_{name}.json",
        {
            "command": "python benchmarks/one_image.py",
            "options": {k: v for k, v in vars(options).items() if k != "data_root"},
            "above_40_db": above,
            "median_psnr": round(statistics.median(psnr), 2),
            "psnr": [round(p, 2) for p in psnr],
            "floor_constant": [round(p, 2) for p in floor],
            "labels_right": sum(right),
            "seconds": round(seconds, 1),
            "machine": {"cpus": os.cpu_count(), "processor": platform.machine()},
            "versions": versions(),
        },
    )
    print(f"wrote {path.relative_to(Path.cwd())}" if path.is_absolute() else path)


if __name__ == "__main__":
    main()
