"""Serve on kernels that are bound as for a GPU but not compiled: `python -m tests.engine.count_variants ARCHITECTURE`.

Triton decides at every launch which variant of a kernel it needs, by types, alignments and values, and compiles it at
the first one. This runs the same code up to that point, and tells what serving would have had to compile.
"""

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["main"]


class NoDevice:
    """Triton's driver of a GPU that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@dataclass
class Variant:
    """In the place of a compiled kernel; a launch leaves finite numbers."""

    names: list[str]
    num_launches: int = 0
    function: Any = None
    packed_metadata: Any = None

    def launch_metadata(self, *args: Any) -> None: ...

    def run(self, *args: Any) -> None:
        self.num_launches += 1
        for name, value in zip(self.names, args[-len(self.names) :], strict=True):
            if name in ("out", "h", "sums") and isinstance(value, torch.Tensor):
                value.zero_()


def _install() -> list[str]:
    """Returns the list of what would have been compiled, which grows."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[str] = []

    def note(kernel: Any, key: Any, signature: Any, device: int, constants: Any, *_: Any, **__: Any) -> Variant:
        compiled.append(f"{kernel.__name__} {key}")
        kernel.device_caches[device][0][key] = Variant(kernel.arg_names)
        return kernel.device_caches[device][0][key]  # type: ignore[no-any-return]

    driver.set_active(NoDevice())  # type: ignore[arg-type]
    JITFunction._do_compile = note  # type: ignore[method-assign, assignment]
    return compiled


def _capture(run: Any) -> Any:
    out = run().clone()

    def replay() -> None:
        with torch.inference_mode():
            out.copy_(run())

    return replay, out


def main(architecture: str) -> None:
    from lora_core.maths import Folded
    from server.engine import EngineConfig, EngineLoop, ModelRunner
    from server.engine.warm_up import warm_up
    from tests.engine.wishes import random_wish, run_wishes
    from tests.tiny_models import tiny_model

    compiled = _install()
    random.seed(seed := random.SystemRandom().randrange(1 << 30))
    torch.manual_seed(seed)
    print(f"seed {seed}")
    config = EngineConfig(
        max_running=24, max_step_tokens=700, max_slots=5, block_size=16, kv_bytes=1 << 25, max_model_len=400,
        use_kernels=True, run_ahead=True,
    )  # fmt: skip
    runner = ModelRunner(tiny_model(architecture, seed), config, _capture)
    warm_up(runner.layers, runner._device_step(), config.max_running)
    num_warm = len(compiled)
    for slot, rank in enumerate((1, 17, 40, 100, 130)):
        parts = {}
        for name, layer in runner.layers.items():
            if name != "lm_head" or slot % 2:
                a, b = torch.randn(rank, layer.in_features), torch.randn(rank, layer.out_features)
                parts[name] = Folded(a, b, torch.randn(layer.out_features) if slot % 2 else None)
        runner.bank.load(slot, parts)
    weights: list[dict[int, float]] = [{}, *({slot: 1.0} for slot in range(5)), {0: 0.5, 2: 0.5}, {1: 1.0, 4: 0.2}]
    for count in (1, 2, 40):
        wishes = [
            random_wish(is_simple=bool(number % 4), max_prompt=380, max_new=18, weights=weights)
            for number in range(count)
        ]
        engine = EngineLoop(runner)
        run_wishes(engine, wishes)
    assert runner.graphs is not None
    assert runner.graphs.num_replays
    print(f"{num_warm} variants before serving")
    late = compiled[num_warm:]
    print(f"{len(late)} while serving: {Counter(variant.split()[0] for variant in late)}")
    for variant in late:
        print(variant)


if __name__ == "__main__":
    assert os.environ.pop("TRITON_INTERPRET", None) in {None, "1"}  # set for the tests
    main(sys.argv[1])
