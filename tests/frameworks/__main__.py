"""`python -m tests.frameworks` judges every row anew and writes `docs/frameworks.md`."""

from __future__ import annotations

import torch

from . import FRAMEWORKS, framework, judge
from .table import PATH, render


def main() -> None:
    torch.set_num_threads(2)
    judged = {}
    for name in FRAMEWORKS:
        found = framework(name)
        if found is None:
            raise SystemExit(f"{name} is not installed; install the extra 'test' on Python 3.11 or newer")
        judged[name] = [(row, judge(row)) for row in found[0]]
        print(f"{name}: {len(judged[name])} classes")
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(judged), encoding="utf-8")


if __name__ == "__main__":
    main()
