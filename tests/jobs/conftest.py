"""A job queue over a store on a tiny model's folder, without an engine: what comes of jobs is checked and published."""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from lora_core import LoraError
from server.adapters.archive import ArchiveLimits
from server.adapters.import_root import ImportRoot
from server.adapters.intake import AdapterIntake
from server.adapters.loader import AdapterLoader, BankSlots
from server.adapters.record import AT_ONCE
from server.adapters.registry import AdapterRegistry
from server.adapters.service import AdapterService
from server.adapters.store import AdapterStore
from server.engine import EngineConfig, load_runner
from server.jobs.conversion import ConversionProcess
from server.jobs.handlers import AdapterJobs, ServedWeights
from server.jobs.process import JobFailedError, WorkProcess
from server.jobs.queue import JobQueue, JobView
from server.jobs.record import JobState
from server.jobs.store import JobStore
from server.jobs.tasks import TASKS
from server.schemas.jobs import JobRequest
from tests import peft_adapters
from tests.tiny_folder import write_tiny_folder

TIMEOUT_S = 120.0
REQUEST: TypeAdapter[Any] = TypeAdapter(JobRequest)


class InlineProcess(WorkProcess):
    """Does the work in this process, which saves a start of Python for each job; what is said is JSON all the same."""

    def run(self, task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
        with torch.no_grad():
            try:
                return json.loads(json.dumps(TASKS[task["kind"]](json.loads(json.dumps(task)), report)))
            except LoraError as error:
                raise JobFailedError(str(error), code=error.code) from error


@dataclass
class Shop:
    """Everything that jobs touch.

    Attributes:
        references: PEFT's models by adapter name, and "base".
        folders: the adapters' folders, which are below `import_root`.
    """

    queue: JobQueue
    store: AdapterStore
    adapters: AdapterService
    model: Path
    root: Path
    import_root: Path
    references: dict[str, Any]
    folders: dict[str, Path]

    def run(self, kind: str, **options: Any) -> JobView:
        """Queue a job and wait for its end."""
        body = REQUEST.validate_python({"kind": kind} | options)
        return self.wait(self.queue.submit(kind, body.model_dump(exclude={"kind"})).record.job_id)

    def wait(self, job_id: str) -> JobView:
        deadline = time.monotonic() + TIMEOUT_S
        while not (view := self.queue.get(job_id)).record.state.is_final:
            assert time.monotonic() < deadline, "the job never ends"
            time.sleep(0.02)
        return view

    def result(self, kind: str, **options: Any) -> dict[str, Any]:
        """The result of a job that must succeed."""
        record = self.run(kind, **options).record
        assert record.state is JobState.SUCCEEDED, record.error
        return dict(record.result)

    def folder(self, name: str) -> Path:
        """The stored folder of an adapter."""
        return self.store.folder_of(self.store.get(name).digest)


@pytest.fixture
def seed() -> int:
    """A fresh seed; printed, so that a failure can be repeated."""
    value = random.randrange(1 << 30)
    print(f"seed {value}")
    return value


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    root = tmp_path_factory.mktemp("jobs")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    base = write_tiny_folder(root / "base", "llama", seed)
    references: dict[str, Any] = {"base": base}
    folders = {}
    for i, (name, config) in enumerate(peft_adapters.VARIANTS.items()):
        references[name] = peft_adapters.peft_model(base, "llama", seed + i, **config)
        folders[name] = peft_adapters.save(references[name], root / "imports" / name)
    runner = load_runner(
        root / "base", EngineConfig(max_running=2, kv_bytes=1 << 20), dtype=torch.float32, device=torch.device("cpu")
    )
    store = AdapterStore(root / "store")
    store.open()
    loader = AdapterLoader(runner.model, dtype=runner.dtype, max_rank=256)
    registry = AdapterRegistry(
        store,
        lambda digest: store.read(digest, loader.fold),
        BankSlots(runner.bank),
        max_slot_bytes=1 << 30,
        max_host_bytes=1 << 30,
        on_change=lambda: None,
    )
    intake = AdapterIntake(loader, ConversionProcess(root / "base", InlineProcess), ArchiveLimits())
    adapters = AdapterService(store, registry, intake, base_names=frozenset({"tiny"}), max_rank=loader.max_rank)
    for name, folder in folders.items():
        adapters.import_folder(name, folder, AT_ONCE)
    handler = AdapterJobs(
        adapters,
        store,
        base=root / "base",
        exports=root / "store" / "exports",
        imports=ImportRoot(root / "imports"),
        allow_hub=True,
        s3_root="s3://adapters/public",
        max_bytes={"adapter_config.json": 1 << 16, "adapter_model.safetensors": 1 << 20},
        served=ServedWeights(dtype="float32"),
    )
    queue = JobQueue(JobStore(root / "store" / "jobs"), handler, make_process=InlineProcess)
    queue.open()
    queue.start()
    yield Shop(queue, store, adapters, root / "base", root / "store", root / "imports", references, folders)
    queue.close()
    registry.close()
    store.check_integrity()
    store.close()
