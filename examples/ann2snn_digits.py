"""The main job, end to end: train on real digits, convert to a spiking network, compile it within a memory budget.

    python examples/ann2snn_digits.py              # about two minutes on two cores
    python examples/ann2snn_digits.py --quick      # a toy run of the same, in seconds
    python examples/ann2snn_digits.py --budgets 1MiB 4MiB --output my-report

A small residual network learns scikit-learn's handwritten digits, becomes a rate-coded network of integrate-and-fire
neurons, and classifies test images in T time steps by the step loop, layer by layer, and as `snncompile.optimize`
schedules it. One table compares time, memory, accuracy and spikes; the exit status is 1 if a claim about it fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import SPIKE_BATCHES, Way, compiled_ways, count_neurons, judge, measure, plain_ways, render_table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import snncompile
from snncompile.options import parse_bytes

PERCENTILE = 99.9  # one spike stands for more than all but a thousandth of the activations, so neurons fire more often
MIN_BATCH = 4  # a linear layer rounds alike from here on (README: Exactness), so spikes can be compared one by one
BUSY_SPREAD = 4  # between the slowest and the median batch; on a machine of one's own it stays below 2
MARKERS = ("<!-- demo-table -->", "<!-- /demo-table -->")


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + shortcut(x)); the first convolution and the shortcut have the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Sequential):
    """[N, 1, 8, 8] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            ResidualBlock(32, 32, stride=1),
            ResidualBlock(32, 64, stride=2),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, 8, 8] in [0, 1] and labels, three quarters to train on, one to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def train(ann: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    optimizer = torch.optim.AdamW(ann.parameters(), weight_decay=1e-2)
    steps = epochs * math.ceil(len(labels) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    ann.train()
    with tqdm(range(epochs), desc="train", unit="epoch") as bar:
        for _ in bar:
            for chosen in torch.randperm(len(labels)).split(batch):
                loss = F.cross_entropy(ann(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    ann.eval()


def environment() -> dict[str, str]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": model or platform.processor() or "unknown processor",
        "threads": f"{torch.get_num_threads()} threads",
        "python": f"Python {platform.python_version()}",
        "torch": f"PyTorch {torch.__version__}",
        "snncompile": f"snncompile {snncompile.__version__}",
    }


def caption(args: argparse.Namespace, images: int, neurons: int) -> str:
    """What the columns mean, and what is compared with what."""
    recorded = min(SPIKE_BATCHES * args.batch, images)
    return (
        f"T = {args.steps} steps; {images} test images in batches of {args.batch}, shown at every step; outputs are "
        "summed over the steps. *Time*: median over the batches, the rows taking turns on each. *Peaks*: of one "
        "batch, beyond parameters and images; measured in a run apart from the timing. *Spike mismatches*: of all "
        f"{neurons:,} hidden neurons at every step for {recorded} images, {args.steps * neurons * recorded:,} spikes "
        "or silences, how many differ from the step loop's. *Layer by layer, plain PyTorch* is what one writes by "
        "hand: T folded into the batch of every stateless layer. `optimize` knows that the input is static, computes "
        "the first convolution once and never stacks the outputs, so its *breadth-first* is leaner."
    )


def update_readme(path: Path, text: str) -> None:
    """Put a text between the markers of a README."""
    readme = path.read_text(encoding="utf-8")
    begin, end = MARKERS
    if begin not in readme or end not in readme:
        raise SystemExit(f"{path} has no {begin} and {end} to write between")
    before, after = readme.split(begin)[0], readme.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def write_report(folder: Path, summary: str, ways: Sequence[Way], data: dict[str, Any]) -> None:
    """report.md: the table, and what the compiler did at the tightest budget; report.json: every figure."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = {way.name: way.compiled for way in ways if way.compiled is not None}
    budgets = {name: opt.options.memory_budget for name, opt in plans.items() if opt.options.memory_budget is not None}
    tight = plans[min(budgets, key=budgets.__getitem__)]
    markdown = [
        f"# Handwritten digits on a spiking network\n\n{summary}",
        f"## The plan at the tightest budget\n\n```\n{tight.report}\n```",
        f"## Its loop nest\n\n```python\n{tight.code}```",
    ]
    (folder / "report.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    data = {**data, "plans": {name: opt.report.to_dict() for name, opt in plans.items()}}
    (folder / "report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="time steps T (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per batch, at least 4 (default: %(default)s)")
    parser.add_argument(
        "--test-images", type=int, default=128, help="at most 450, whole batches (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=6, help="of training (default: %(default)s)")
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=[],
        metavar="BYTES",
        help='such as "1MiB" (default: the smallest that any schedule fits into, and twice that)',
    )
    parser.add_argument("--seed", type=int, default=0, help="of data split and training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-report"), help="folder for the report")
    parser.add_argument("--update-readme", type=Path, metavar="README", help="put the table between its markers")
    parser.add_argument("--quick", action="store_true", help="a toy run: 16 steps, 32 images, 2 epochs")
    if parser.parse_args(argv).quick:
        parser.set_defaults(steps=16, test_images=32, epochs=2)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.epochs < 1:
        parser.error("--steps and --epochs must be at least 1")
    if args.batch < MIN_BATCH:
        parser.error(f"--batch must be at least {MIN_BATCH}; a smaller linear layer rounds differently")
    for budget in args.budgets:
        try:
            parse_bytes(budget)
        except ValueError as error:
            parser.error(str(error))
    if args.test_images < args.batch:
        parser.error("--test-images must be at least one batch")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every claim about the table holds, else 1."""
    args = parse_arguments(argv)
    env = environment()
    about = f"{', '.join(env.values())}."
    print(about, flush=True)
    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = load_data(args.seed)

    ann = DigitsNet()
    train(ann, train_images, train_labels, args.epochs)
    with torch.no_grad():
        ann_accuracy = (ann(test_images).argmax(1) == test_labels).float().mean().item()
    snn = snncompile.ann2snn.convert(ann, train_images.split(128), percentile=PERCENTILE)

    batches = [x for x in test_images[: args.test_images].split(args.batch) if len(x) == args.batch]
    labels = test_labels[: len(batches) * args.batch]
    try:
        ways = [*plain_ways(snn, args.steps), *compiled_ways(snn, args.steps, batches[0], args.budgets)]
    except snncompile.InfeasibleBudgetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = measure(ways, snn, batches, labels)
    claims = judge(rows, args.steps)

    table = render_table(rows)
    notes = (
        f"Before conversion the network is right on {ann_accuracy:.2%} of {len(test_labels)} test images. "
        + caption(args, len(labels), count_neurons(snn, batches[0]))
    )
    notes = textwrap.fill(notes, 118)
    summary = f"{textwrap.fill(about, 118)}\n\n{table}\n\n{notes}"
    print(f"\n{table}\n\n{notes}\n")
    print("\n".join(str(claim) for claim in claims))
    spread = max(row.slowest_milliseconds / row.milliseconds for row in rows)
    if spread > BUSY_SPREAD:
        print(f"\nnote: some runs took {spread:.0f} times their median; the machine is busy, so times are rough")
    write_report(
        args.output,
        summary,
        ways,
        {
            "environment": env,
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "ann_accuracy": ann_accuracy,
            "rows": [asdict(row) for row in rows],
            "claims": [asdict(claim) for claim in claims],
        },
    )
    print(f"\nreport: {args.output / 'report.md'}, {args.output / 'report.json'}")
    if args.update_readme is not None:
        update_readme(args.update_readme, summary)
    failed = [claim for claim in claims if claim.holds is False]
    if failed:
        print(f"{len(failed)} of {len(claims)} claims about the table failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
