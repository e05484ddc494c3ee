"""Combining adapters into a new one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_core import LoraModel
from server.jobs.tasks.base_model import open_base

__all__ = ["run"]

READING = 0.2  # share of the work


def run(task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    """Mix the adapters of `task["adapters"]` with their `weights` into `task["out"]`, by the given `options`.

    Raises:
        LoraError: the adapters cannot be combined in this way.
    """
    report("reading the base", 0.0)
    model = LoraModel(open_base(Path(task["base"])))
    names = [f"source{i}" for i in range(len(task["adapters"]))]
    for i, (name, folder) in enumerate(zip(names, task["adapters"], strict=True)):
        report("reading adapters", READING * i / len(names))
        model.load_adapter(folder, name)
    torch.manual_seed(task["seed"])  # DARE draws at random

    def mixed(done: int, total: int) -> None:
        report("mixing", READING + (1 - READING) * done / total)

    model.add_weighted_adapter(names, task["weights"], "mixed", report=mixed, **task["options"])
    model.save_pretrained(task["out"], "mixed")
    return {"combination_type": task["options"]["combination_type"], "seed": task["seed"]}
