"""Library calls of lora_core beside PEFT's, on SmolLM2 in the same run.

Run `python -m tests.bench.lora_core_speed`. Short calls are timed several times, taking turns; the best of each counts.
"""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from lora_core import LoraConfig, LoraModel, Router, attach_slots, fold_adapter, load_adapter, wrap_linears
from server.demo import ensure_demo_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
ROUNDS = 3


def main() -> None:
    """Print seconds, PEFT's seconds, and how many times faster, for every call."""
    warnings.simplefilter("ignore")
    base: Any = AutoModelForCausalLM.from_pretrained(ensure_demo_model(report=print), dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG)).save_pretrained(folder)
        compare("inject", lambda: ours(base), lambda: theirs(base), prepare=lambda: None)
        compare("merge_and_unload", lambda m: m.merge_and_unload(), None, prepare=lambda: (ours(base), theirs(base)))
        pissa = {"init_lora_weights": "pissa"}
        compare("inject with PiSSA", lambda: ours(base, pissa), lambda: theirs(base, pissa), rounds=1)
        compare(
            "load_adapter",
            lambda m: m.load_adapter(str(folder), "new"),
            None,
            prepare=lambda: (ours(base), theirs(base)),
        )
        slots(base, folder)
        compare(
            "add_weighted_adapter svd",
            lambda m: m.add_weighted_adapter(["default", "b"], [0.7, 0.4], "mix", "svd"),
            None,
            prepare=lambda: (with_two(ours(base)), with_two(theirs(base))),
            rounds=1,
        )


def ours(base: Any, extra: dict[str, Any] | None = None) -> LoraModel:
    return LoraModel(copy.deepcopy(base), LoraConfig(**CONFIG | (extra or {})))


def theirs(base: Any, extra: dict[str, Any] | None = None) -> Any:
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG | (extra or {})))


def with_two(model: Any) -> Any:
    model.add_adapter("b", (LoraConfig if isinstance(model, LoraModel) else peft.LoraConfig)(**CONFIG))
    return model


def compare(
    name: str,
    mine: Callable[..., Any],
    other: Callable[..., Any] | None,
    *,
    prepare: Callable[[], Any] = lambda: None,
    rounds: int = ROUNDS,
) -> None:
    """Time `mine` against `other`, or the same call on the two models that `prepare` makes."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        models = prepare()
        for place, call in enumerate((mine, other or mine)):
            times[place].append(seconds(call, *([models[place]] if models else [])))
    report(name, min(times[0]), min(times[1]))


def slots(base: Any, folder: Path) -> None:
    """From the files to a slot of a served model in bfloat16, as a server loads an adapter."""
    served, router = copy.deepcopy(base).to(torch.bfloat16), Router()
    layers = wrap_linears(served, router)
    bank = attach_slots(layers, 4, dtype=torch.bfloat16, model=served)

    def load() -> None:
        bank.load(0, fold_adapter(load_adapter(folder), served, dtype=torch.bfloat16))

    times = []
    for _ in range(ROUNDS + 1):
        times.append(seconds(load))
        bank.free(0)
    model = theirs(base)
    peft_times = [seconds(model.load_adapter, str(folder), f"new{i}") for i in range(ROUNDS)]
    report("load into a slot / PEFT load_adapter", min(times), min(peft_times))


def seconds(call: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


def report(name: str, mine: float, other: float) -> None:
    print(f"{name:38} {mine:7.3f} s   PEFT {other:7.3f} s   {other / mine:5.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
