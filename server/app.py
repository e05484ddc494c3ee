"""The application factory: the only place where concrete parts meet."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from fastapi import FastAPI

from server.adapters.archive import ArchiveLimits
from server.adapters.import_root import ImportRoot
from server.adapters.intake import AdapterIntake
from server.adapters.loader import AdapterLoader, BankSlots, FoldedAdapter
from server.adapters.registry import AdapterRegistry
from server.adapters.service import AdapterService
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.allocator import settle_memory, trim
from server.api.access_log import AccessLog
from server.api.authentication import Authentication
from server.api.draining import DrainGate
from server.api.envelopes import install_error_handlers
from server.api.middleware import BodyLimit, RequestId
from server.api.model_names import BASE_NAME, ModelNames
from server.api.openapi import install_openapi
from server.api.routers import ROUTERS
from server.auth.audit import AuditLog
from server.auth.key_file import KeyFile
from server.auth.limits import Limiter
from server.cache import default_cache_dir
from server.delivery import Delivery
from server.demo import demo_adapters, ensure_demo_model
from server.drain import Drain
from server.engine import EngineConfig, EngineLoop, Fairness, ModelFacts, ModelRunner, Quantization, load_runner
from server.engine.device_step import what_kernels_lack
from server.errors import InvalidRequestError, NotFoundError
from server.generation import GenerationService
from server.gguf import ensure_unpacked, find_gguf
from server.jobs.conversion import ConversionProcess
from server.jobs.handlers import AdapterJobs, ServedWeights
from server.jobs.queue import JobQueue
from server.jobs.store import JobStore
from server.loading import load_model_and_text
from server.memory import free_host_bytes
from server.metrics import Metrics
from server.schemas.body import MAX_SEQUENCES, MAX_STOP_STRINGS
from server.schemas.system import Info
from server.settings import Settings
from server.structured import StructuredOutput

__all__ = ["Server", "build_server", "create_app"]

logger = logging.getLogger(__name__)

DEMO = "demo"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
UNKNOWN_FREE_BYTES = 4 << 30
UPLOAD_OVERHEAD_BYTES = 1 << 20  # multipart framing and the config beside the weights
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Server:
    """All parts of a server, put together but not started."""

    runner: ModelRunner
    engine: EngineLoop
    delivery: Delivery
    store: AdapterStore
    registry: AdapterRegistry
    adapters: AdapterService
    imports: ImportRoot
    jobs: JobQueue
    structured: StructuredOutput
    generations: GenerationService
    names: ModelNames
    metrics: Metrics
    info: Info
    keys: KeyFile | None
    audit: AuditLog | None
    drain: Drain = field(default_factory=Drain)

    def close(self) -> None:
        """Stop everything; open requests fail. Calling it again does nothing."""
        self.engine.close()
        self.structured.close()
        self.registry.close()
        self.store.close()
        if self.audit is not None:
            self.audit.close()


def build_server(settings: Settings, report: Report = logger.info) -> Server:
    """Load the model and put the parts together. `report` gets one line for each thing that takes time.

    Raises:
        ServerError: the model, the store or a named adapter cannot be used; says which and why.
    """
    settle_memory()
    keys, audit = _access(settings)
    num_threads = settings.threads or torch.get_num_threads()
    device, dtype = _device_and_dtype(settings)
    path, model_id = _model_path(settings, dtype, report)
    torch.set_num_threads(1)  # see EngineLoop: no team of threads but the engine's
    quantization = Quantization(settings.quantization, settings.double_quant)
    form = "" if quantization.kind == "none" else f"{quantization.kind}, "
    report(f"loading {model_id} ({form}{str(dtype).removeprefix('torch.')}, {device})")
    config = EngineConfig(
        max_running=settings.max_running,
        max_step_tokens=max(settings.max_step_tokens, settings.max_running),
        target_step_s=settings.target_step_ms / 1_000 or None,
        use_prefix_cache=settings.prefix_cache,
        max_slots=settings.max_slots,
        kv_bytes=settings.kv_memory,
        use_kernels=_use_kernels(settings, device, report),
        use_cuda_graphs=settings.cuda_graphs,
        tuning_folder=default_cache_dir() / "kernels" if settings.tune_kernels and device.type == "cuda" else None,
        max_model_len=settings.max_model_len,
    )

    def load(on_facts: Callable[[ModelFacts], None]) -> ModelRunner:
        return load_runner(path, config, dtype=dtype, device=device, quantization=quantization, on_facts=on_facts)

    runner, codec = load_model_and_text(path, load, report)
    structured = StructuredOutput(codec)
    delivery = Delivery()
    engine = EngineLoop(
        runner,
        max_waiting=settings.max_waiting,
        num_threads=num_threads,
        fairness=Fairness() if keys is None else Fairness(keys.weight_of),
        on_step=delivery.flush,
    )
    store = AdapterStore(
        settings.store, min_free_bytes=settings.min_free_bytes, max_generations=settings.max_generations
    )
    store.open()
    loader = AdapterLoader(
        runner.model,
        dtype=runner.dtype,
        max_rank=settings.max_rank,
        flatten_for=device if runner.uses_kernels else None,
    )

    def read(digest: str) -> FoldedAdapter:
        return store.read(digest, loader.fold)

    max_slot_bytes, max_host_bytes = _adapter_memory(settings, device)
    report(f"adapters: {max_slot_bytes >> 20} MiB in slots, {max_host_bytes >> 20} MiB in host memory")
    registry = AdapterRegistry(
        store,
        read,
        BankSlots(runner.bank),
        max_slot_bytes=max_slot_bytes,
        max_host_bytes=max_host_bytes,
        on_change=engine.wake,
    )
    limits = ArchiveLimits(max_weights_bytes=settings.max_upload_bytes)
    base_names = frozenset({model_id, BASE_NAME})
    intake = AdapterIntake(loader, ConversionProcess(path), limits)
    adapters = AdapterService(store, registry, intake, base_names=base_names, max_rank=settings.max_rank)
    _import_adapters(settings, store, adapters, report)
    trim()
    imports = ImportRoot(settings.import_root)
    jobs = _jobs(settings, path, store, adapters, imports, _served_weights(runner))
    return Server(
        runner=runner,
        engine=engine,
        delivery=delivery,
        store=store,
        registry=registry,
        adapters=adapters,
        imports=imports,
        jobs=jobs,
        structured=structured,
        generations=GenerationService(
            engine, codec, adapters, delivery, structured, default_max_new_tokens=settings.max_new_tokens
        ),
        names=_names(settings, adapters, model_id),
        metrics=Metrics(
            lambda: engine.stats,
            registry.stats,
            adapters.names_by_digest,
            model_id=model_id,
            max_slots=settings.max_slots,
        ),
        info=_info(settings, runner, model_id),
        keys=keys,
        audit=audit,
    )


def create_app(server: Server, settings: Settings) -> FastAPI:
    """The HTTP application of a server; starting the application starts the server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.delivery.attach(asyncio.get_running_loop())
        server.engine.start()
        server.adapters.apply_pins()
        server.jobs.start()
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(
        title="loramux",
        version=version("loramux"),
        summary="One base language model, many LoRA and DoRA adapters, one batch.",
        lifespan=lifespan,
    )
    app.state.adapters = server.adapters
    app.state.imports = server.imports
    app.state.jobs = server.jobs
    app.state.generations = server.generations
    app.state.names = server.names
    app.state.metrics = server.metrics
    app.state.info = server.info
    app.state.keys = server.keys
    app.state.drain = server.drain
    app.state.limiter = Limiter()
    app.state.fingerprint = _fingerprint(server.info)
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    install_openapi(app)
    app.add_middleware(
        BodyLimit,
        max_json_bytes=settings.max_json_bytes,
        max_upload_bytes=settings.max_upload_bytes + UPLOAD_OVERHEAD_BYTES,
        upload_prefix="/admin/adapters",
    )
    app.add_middleware(
        Authentication,
        keys=server.keys,
        limiter=app.state.limiter,
        audit=server.audit,
        open_metrics=settings.open_metrics,
    )
    app.add_middleware(DrainGate, drain=server.drain)
    app.add_middleware(AccessLog, count=server.metrics.count_http)
    app.add_middleware(RequestId)  # the last one added is the first to be asked
    return app


def _access(settings: Settings) -> tuple[KeyFile | None, AuditLog | None]:
    """The keys and the audit log, ready for use."""
    keys = None if settings.keys is None else KeyFile(settings.keys)
    if keys is not None:
        keys.load()
    elif settings.host not in LOOPBACK and not settings.allow_open:
        raise InvalidRequestError(
            f"on {settings.host} others can reach the server: give it `--keys FILE`, or say `--allow-open` if "
            "something else keeps strangers out",
            code="open_on_public_address",
        )
    path = settings.audit_log
    if path is None and settings.keys is not None:
        path = settings.keys.with_name("audit.jsonl")
    audit = None if path is None else AuditLog(path)
    if audit is not None:
        audit.open()
    return keys, audit


def _model_path(settings: Settings, dtype: torch.dtype, report: Report) -> tuple[Path, str]:
    """The model's folder and the name under which it is served."""
    if settings.model == DEMO:
        return ensure_demo_model(report=report), settings.served_model_name or "smollm2-135m-instruct"
    path = Path(settings.model).expanduser()
    if (gguf := find_gguf(path)) is not None:
        name = settings.served_model_name or (gguf.stem if path.is_file() else path.resolve().name)
        return ensure_unpacked(gguf, str(dtype).removeprefix("torch."), report=report), name
    if not (path / "config.json").is_file():
        raise InvalidRequestError(
            f"{path} is no Hugging Face model folder, nor a GGUF file: there is no config.json", code="model_not_found"
        )
    return path, settings.served_model_name or path.resolve().name


def _device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError(f"device {name!r} cannot be used: {error}", code="device_invalid") from error
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return device, dtype


def _use_kernels(settings: Settings, device: torch.device, report: Report) -> bool:
    on_cuda = device.type == "cuda"
    if settings.kernels == "triton" and not on_cuda:
        raise InvalidRequestError("Triton's kernels need a CUDA device", code="device_invalid")
    if settings.kernels == "auto" and on_cuda and (missing := what_kernels_lack()) is not None:
        report(f"without Triton's kernels, which are faster: there is no {missing}")
        return False
    return on_cuda and settings.kernels != "torch"


def _adapter_memory(settings: Settings, device: torch.device) -> tuple[int, int]:
    """Budgets of slots and host memory in bytes: a quarter each of what is free now, unless they are set."""
    free_host = free_host_bytes() or UNKNOWN_FREE_BYTES
    free_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host
    return settings.slot_memory or free_device // 4, settings.host_memory or free_host // 4


def _import_adapters(settings: Settings, store: AdapterStore, adapters: AdapterService, report: Report) -> None:
    """Import the settings' adapters, and the demo's with the demo model, unless the store knows the name."""
    folders = dict(demo_adapters()) if settings.model == DEMO else {}
    for name, folder in (folders | settings.adapters).items():
        if not store.has_history(name):
            record = adapters.import_folder(name, folder)
            report(f"imported adapter {name} ({record.details['type']}, rank {record.details['rank']})")


def _jobs(
    settings: Settings,
    base: Path,
    store: AdapterStore,
    adapters: AdapterService,
    imports: ImportRoot,
    served: ServedWeights,
) -> JobQueue:
    handler = AdapterJobs(
        adapters,
        store,
        base=base,
        exports=settings.store / "exports",
        imports=imports,
        allow_hub=settings.allow_hub,
        s3_root=settings.s3_root,
        max_bytes={CONFIG_NAME: ArchiveLimits().max_config_bytes, WEIGHTS_NAME: settings.max_upload_bytes},
        served=served,
    )
    jobs = JobQueue(JobStore(settings.store / "jobs"), handler)
    jobs.open()
    return jobs


def _served_weights(runner: ModelRunner) -> ServedWeights:
    """What the model's configuration says once it is loaded, whether its files are quantized or loading did it."""
    found = getattr(runner.model.config, "quantization_config", None)
    return ServedWeights(
        kind=runner.quantization or "none",
        double_quant=bool(getattr(found, "bnb_4bit_use_double_quant", False)),
        dtype=str(runner.dtype).removeprefix("torch."),
    )


def _names(settings: Settings, adapters: AdapterService, model_id: str) -> ModelNames:
    def exists(name: str) -> bool:
        try:
            adapters.get(name)
        except NotFoundError:
            return False
        return True

    return ModelNames(model_id, frozenset(settings.model_aliases), exists)


def _fingerprint(info: Info) -> str:
    """OpenAI's `system_fingerprint`: changes with what could change the output."""
    text = f"{info.model_id} {info.model_dtype} {info.quantization} {info.model_device_type} {info.version}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _info(settings: Settings, runner: ModelRunner, model_id: str) -> Info:
    longest = runner.max_model_len
    return Info(
        model_id=model_id,
        model_dtype=str(runner.dtype).removeprefix("torch."),
        quantization=runner.quantization,
        model_device_type=runner.device.type,
        max_concurrent_requests=settings.max_running + settings.max_waiting,
        max_best_of=MAX_SEQUENCES,
        max_stop_sequences=MAX_STOP_STRINGS,
        max_input_length=longest - 1,
        max_input_tokens=longest - 1,
        max_total_tokens=longest,
        max_batch_total_tokens=(runner.cache.num_blocks - 1) * runner.config.block_size,
        max_adapters_in_use=settings.max_slots,
        version=version("loramux"),
    )
