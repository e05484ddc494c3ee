"""Launch parameters that were measured: on the device at hand, for the shapes at hand, once, before anything is served.

One parameter after another is tried while the others stay as they are (coordinate descent), from a default that is
right everywhere; what was found is kept in a file for the next start. The file's name says for which device and which
version of Triton it is, its keys for which kernel (as its source was), shapes and dtype. What asks for more shared
memory than the device has is not tried: a bound of it is known before anything is compiled.
"""

import hashlib
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from lora_core.device_slots import AdapterTable
from lora_core.maths import Folded
from lora_core.ops.plan import NUM_ENTRIES, RANKS, RoutePlan, Tile, bucket_of
from lora_core.transfer import DirectCopies

__all__ = ["Tuner", "expand_bytes", "num_buffers", "shrink_bytes", "source_digest", "tune_adapters", "tuner_for"]

Config = TypeVar("Config")
SHRINK_OPTIONS = {"block_k": (64, 128, 256), "split_k": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8), "num_stages": (2, 4)}
EXPAND_OPTIONS = {"block_o": (32, 64, 128, 256), "num_warps": (2, 4, 8), "num_stages": (2, 4)}
REPEATS = 20
# Of shared memory, that one program may have on the smallest GPUs that are served (compute capability 8.9).
SMALLEST_SHARED_BYTES = 99 << 10


class Tuner:
    """Finds the fastest parameters, or knows them from an earlier start.

    Args:
        path: where they are kept; a file that cannot be read counts as none.
        time_s: seconds that a call takes on the device; infinity if it cannot be run.
        max_shared_bytes: that one program may have.

    Attributes:
        num_measured: calls that were measured.
    """

    def __init__(
        self,
        path: Path,
        time_s: Callable[[Callable[[], object]], float],
        max_shared_bytes: int = SMALLEST_SHARED_BYTES,
    ) -> None:
        self._path = path
        self._time_s = time_s
        self.max_shared_bytes = max_shared_bytes
        self.num_measured = 0
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        self._known: dict[str, Any] = found if isinstance(found, dict) else {}

    def best(
        self,
        key: str,
        start: Config,
        options: Mapping[str, Sequence[int]],
        run: Callable[[Config], object],
        shared_bytes: Callable[[Config], int] = lambda _: 0,
    ) -> Config:
        """The parameters, a dataclass of whole numbers, with which `run` is fastest.

        Args:
            key: of the kernel, its shapes and dtype.
            options: values to try, by field.
            shared_bytes: what a call takes at most; one that has more than there is, but for `start`, is not tried.
        """
        fields = asdict(start)  # type: ignore[call-overload]
        known = self._known.get(key)
        if isinstance(known, dict) and known.keys() == fields.keys():
            # Not whatever a file says: what would not have been tried may not even compile.
            allowed = {name: {fields[name], *options.get(name, ())} for name in fields}
            if all(type(value) is int and value in allowed[name] for name, value in known.items()):
                found = type(start)(**known)
                if found == start or shared_bytes(found) <= self.max_shared_bytes:
                    return found
        best, best_s = start, self._measure(run, start)
        for name, values in options.items():
            for value in values:
                if value == getattr(best, name):
                    continue
                tried = replace(best, **{name: value})  # type: ignore[type-var]
                if shared_bytes(tried) > self.max_shared_bytes:
                    continue
                seconds = self._measure(run, tried)
                if seconds < best_s:
                    best, best_s = tried, seconds
        self._known[key] = asdict(best)  # type: ignore[call-overload]
        return best

    def save(self) -> None:
        """Write what is known, if anything was measured; a folder that cannot be written is not an error."""
        if not self.num_measured:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(f".{os.getpid()}.new")
            new.write_text(json.dumps(self._known, indent=1, sort_keys=True))
            new.replace(self._path)
        except OSError:
            return

    def _measure(self, run: Callable[[Config], object], config: Config) -> float:
        self.num_measured += 1
        return self._time_s(lambda: run(config))


def tuner_for(folder: Path, device: torch.device) -> Tuner:
    """A tuner for a device whose findings are kept in a file of the folder."""
    import triton  # noqa: PLC0415 - optional

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}-triton-{triton.__version__}") + ".json"
    if device.type != "cuda":
        return Tuner(folder / file, _wall_time_s)
    properties: Any = torch.cuda.get_device_properties(device)
    return Tuner(folder / file, _cuda_time_s, properties.shared_memory_per_block_optin)


def num_buffers(num_stages: int, num_rows: int) -> int:
    """Of what a product reads: one stage's is in registers, but for Hopper's products of 64 rows and more."""
    return num_stages if num_rows >= 64 else num_stages - 1


def shrink_bytes(config: Any, tile_tokens: int, itemsize: int) -> int:
    """At most so much shared memory takes a `ShrinkConfig`: parts of x and of a."""
    parts = config.block_k * (tile_tokens + config.block_r) * itemsize
    return int(num_buffers(config.num_stages, tile_tokens) * parts)


def expand_bytes(config: Any, tile_tokens: int, itemsize: int) -> int:
    """Of an `ExpandConfig`: parts of h and b, and the sums while they are brought into the order of y."""
    parts = config.block_r * (tile_tokens + config.block_o) * itemsize
    sums = tile_tokens * config.block_o * 4
    return int(max(num_buffers(config.num_stages, tile_tokens) * parts, sums))


def _cuda_time_s(run: Callable[[], object]) -> float:
    """From a recording: these kernels take less time than Python takes to launch them, which would be measured."""
    from triton.runtime.errors import OutOfResources  # noqa: PLC0415 - optional

    try:
        run()  # compiles
    except OutOfResources:
        return float("inf")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for _ in range(REPEATS):
            run()
        graph.capture_end()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPEATS


def _wall_time_s(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def source_digest(module: ModuleType) -> str:
    """Of the module that kernels are in: what was measured with others says nothing of them."""
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]


def tune_adapters(
    tuner: Tuner, table: AdapterTable, shapes: Iterable[tuple[int, tuple[int, ...]]], dtype: torch.dtype
) -> None:
    """Measure the adapters' kernels on layers of some shapes, with adapters made for it, and note what is best.

    Args:
        table: gets what was found, in `configs`.
        shapes: in_features, and the out_features of layers that are computed together.
        dtype: of inputs and adapters.
    """
    for shape in sorted(set(shapes)):
        for rank in RANKS:
            layer = _TrialLayers(*shape, rank, dtype, table.rows.device)
            for tile_tokens, numbers in NUM_ENTRIES.items():
                for num_entries in numbers:
                    bucket = bucket_of(num_entries, tile_tokens, rank)
                    table.configs[(*shape, *bucket)] = layer.tune(tuner, num_entries, tile_tokens)


class _TrialLayers:
    """Layers with one adapter in a table of their own."""

    def __init__(
        self, in_features: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        from lora_core.ops import triton as kernels  # noqa: PLC0415 - optional

        self._kernels: Any = kernels
        self._rank, self._dtype = rank, dtype
        table = AdapterTable(len(sizes), 1, device)
        self._parts = {
            number: Folded(
                torch.randn(rank, in_features, device=device).to(dtype),
                torch.randn(rank, size, device=device).to(dtype),
                None,
            )
            for number, size in enumerate(sizes)
        }
        table.write(0, self._parts, DirectCopies())
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        columns = torch.tensor([[*range(len(sizes))], starts, [*sizes]], dtype=torch.int32).to(device)
        self._layers: Any = kernels.LayerTable(
            table.rows,
            table.counters,
            columns[0],
            columns[1],
            columns[2],
            out_features=sizes,
            in_features=in_features,
            is_aligned=all(number % 16 == 0 for number in (in_features, *sizes)),
            configs={},
        )

    def tune(self, tuner: Tuner, num_entries: int, tile_tokens: int) -> Any:
        """The `LaunchConfigs` that are fastest with so many full tiles."""
        from lora_core.ops import adapter_kernels  # noqa: PLC0415 - optional

        kernels, layers, rank = self._kernels, self._layers, self._rank
        device, num_tokens = layers.rows.device, num_entries * tile_tokens
        plan = RoutePlan(num_entries, num_entries, tile_tokens, device, num_tokens)
        tokens = list(range(num_tokens))
        plan.fill(
            [Tile((0,), tokens[i : i + tile_tokens], [[1.0] * tile_tokens]) for i in range(0, num_tokens, tile_tokens)]
        )
        x = torch.randn(num_tokens, layers.in_features, device=device).to(self._dtype)
        y = torch.zeros(num_tokens, sum(layers.out_features), dtype=self._dtype, device=device)
        start = layers.launch_configs(plan, rank, x.element_size())
        shape = f"{layers.in_features} to {layers.out_features}, {self._dtype}"
        key = f"{source_digest(adapter_kernels)} {shape}, rank {rank}, {num_entries} of {tile_tokens}"
        itemsize = x.element_size()
        shrink = tuner.best(
            f"shrink {key}",
            start.shrink,
            SHRINK_OPTIONS,
            lambda config: kernels.shrink(x, layers, plan, rank, config),
            lambda config: shrink_bytes(config, tile_tokens, itemsize),
        )
        h = kernels.shrink(x, layers, plan, rank, shrink)
        expand = tuner.best(
            f"expand {key}",
            start.expand,
            EXPAND_OPTIONS,
            lambda config: kernels.expand(y, None, h, layers, plan, None, config),
            lambda config: expand_bytes(config, tile_tokens, itemsize),
        )
        return kernels.LaunchConfigs(shrink, expand)
