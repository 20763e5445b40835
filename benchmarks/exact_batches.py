"""How often whole batches come back exactly from behind a ReLU network.

Batches of 2 to 16 images behind a network of two hidden ReLU layers of 1,000 units,
with raw and with standardised inputs, in 32-bit precision. Example:

    python benchmarks/exact_batches.py --dataset photos

The table is printed and written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import gradinv_helpers as gi
from gradinv_helpers.experiment import versions
from gradinv_helpers.files import write_json

RESULTS = Path(__file__).parent / "results"
SIZES = (2, 4, 8, 12, 16)


def network(images: gi.Images, standardised: bool, seed: int) -> nn.Module:
    """Two hidden layers of 1,000 ReLU units, PyTorch's default weights."""
    layers: list[nn.Module] = []
    if standardised:
        mean = images.pixels.mean((0, 2, 3)).tolist()
        std = images.pixels.std((0, 2, 3)).tolist()
        layers.append(gi.Normalize(mean, std))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers += [nn.Flatten(), nn.Linear(images[0:1].pixels.numel(), 1000)]
        layers += [nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU()]
        layers.append(nn.Linear(1000, images.num_classes))
    return nn.Sequential(*layers).eval()


def main() -> None:
    """Attack batches of every size and report the share that is exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="photos")
    parser.add_argument("--data-root")
    parser.add_argument("--batches", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = gi.load_images(options.dataset, data_root=options.data_root, split="test")
    rows = []
    print("inputs        B  exact  certified  labels  worst dB  median s")
    for standardised in (False, True):
        for size in SIZES:
            found = [
                attack(images, standardised, size, seed)
                for seed in range(options.batches)
            ]
            name = "standardised" if standardised else "raw"
            row = {
                "inputs": name,
                "batch_size": size,
                "batches": options.batches,
                "exact": sum(f["psnr"] > 100 for f in found),
                "certified": sum(f["certified"] for f in found),
                "labels_right": sum(f["labels_right"] for f in found),
                "worst_psnr": round(min(f["psnr"] for f in found), 1),
                "median_seconds": round(statistics.median(f["s"] for f in found), 2),
            }
            rows.append(row)
            print(
                f"{name:12} {size:2}  {row['exact']:5}  {row['certified']:9}"
                f"  {row['labels_right']:6}  {row['worst_psnr']:8}"
                f"  {row['median_seconds']:8}",
                flush=True,
            )
    path = write_json(
        RESULTS / f"exact_batches_{options.dataset}.json",
        {
            "command": "python benchmarks/exact_batches.py",
            "dataset": options.dataset,
            "rows": rows,
            "versions": versions(),
        },
    )
    print(f"wrote {path}")


def attack(images: gi.Images, standardised: bool, size: int, seed: int) -> dict:
    """One random batch behind one random network."""
    generator = torch.Generator().manual_seed(seed)
    batch = images[torch.randperm(len(images), generator=generator)[:size]]
    update = gi.local_update(network(images, standardised, seed), batch)
    begun = time.perf_counter()
    solution = gi.invert_exactly(update, seed=seed)
    seconds = time.perf_counter() - begun
    found = gi.Images(
        solution.images.clamp(0, 1).float(), solution.labels, images.class_names
    )
    complete = len(found) == size
    score = gi.score(found, batch) if complete else None
    return {
        "psnr": min(score.psnr) if score else 0.0,
        "labels_right": bool(score and all(score.label_correct or ())),
        "certified": solution.certificate.exact,
        "s": seconds,
    }


if __name__ == "__main__":
    main()
