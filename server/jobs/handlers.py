"""AdapterJobs: what each kind of job reads, what its process is told, and how its result is published."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from server.adapters.import_root import ImportRoot, check_s3_url
from server.adapters.objects import CONFIG_NAME, WEIGHTS_NAME
from server.adapters.quota import StorageQuota
from server.adapters.record import Publication
from server.adapters.service import AdapterService
from server.adapters.store import AdapterRecord, AdapterStore
from server.durable import rename, storage_errors, sync_file, sync_folder
from server.errors import InvalidRequestError
from server.failpoints import failpoint
from server.jobs.original import require_unquantized
from server.jobs.process import WorkProcess
from server.jobs.record import JobRecord

__all__ = ["AdapterJobs", "ServedWeights"]

# Options that are no business of the work, but of its publication.
PUBLICATION_OPTIONS = ("name", "expected_generation", "promote", "labels", "note")
# Of a mix, what is no option of `add_weighted_adapter`; of the other kinds, what the work needs as it is.
NOT_FOR_MIXING = (*PUBLICATION_OPTIONS, "adapters", "seed")
TASK_OPTIONS = ("judge", "prompts", "rank", "repo", "revision", "safe_merge", "target_modules", "url")
FOLDER_OPTIONS = ("path", "initial_path", "original_path")
# Kinds of jobs that are about what quantizing the base took, and the forms of a base for which they can tell.
FOR_QUANTIZED = ("loftq", "loftq-compensation")
# Those that compare with the weights as they were trained; the other kinds are content with quantized ones.
NEED_ORIGINAL = (*FOR_QUANTIZED, "extract")
KNOWN_FORMS = ("nf4", "fp4", "int8")


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """In what form the server holds the base's linear layers.

    Attributes:
        kind: "nf4", "fp4", "int8", or "none".
        double_quant: with 4 bits, their scales are quantized too.
        dtype: name of the dtype that is computed in.
    """

    kind: str = "none"
    double_quant: bool = False
    dtype: str = "bfloat16"


UNQUANTIZED = ServedWeights()
ANY_SIZE = {CONFIG_NAME: 1 << 20, WEIGHTS_NAME: 1 << 40}


class AdapterJobs:
    """The kinds of jobs; fits the queue's `JobHandler`.

    Args:
        base: folder of the base model; its files may be quantized.
        exports: where merged models go, one folder each.
        imports: resolves the paths in jobs.
        allow_hub: adapters may be fetched from the Hugging Face hub.
        s3_root: `s3://bucket/prefix` below which they may be fetched from an object store, if at all.
        max_bytes: of each fetched file, by its name.
        served: how the base is held.
    """

    def __init__(
        self,
        adapters: AdapterService,
        store: AdapterStore,
        *,
        base: Path,
        exports: Path,
        imports: ImportRoot,
        allow_hub: bool,
        s3_root: str | None = None,
        max_bytes: Mapping[str, int] = ANY_SIZE,
        served: ServedWeights = UNQUANTIZED,
    ) -> None:
        self._adapters = adapters
        self._store = store
        self._base = base
        self._exports = exports
        self._imports = imports
        self._allow_hub = allow_hub
        self._s3_root = s3_root
        self._max_bytes = max_bytes
        self._served = served

    def resolve(self, kind: str, options: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """See `JobHandler.resolve`."""
        if options.get("name"):
            self._adapters.check_name(options["name"])
        folders = {key: self._imports.folder(options[key]) for key in FOLDER_OPTIONS if options.get(key)}
        if kind in NEED_ORIGINAL or "original_path" in folders:
            require_unquantized(folders.get("original_path", self._base), "original_path")
        if kind == "extract":
            require_unquantized(folders["path"], "path")
        if options.get("repo") and not self._allow_hub:
            raise InvalidRequestError(
                "fetching from the hub is off: see --allow-hub", code="not_supported", param="repo"
            )
        if options.get("url"):
            check_s3_url(options["url"], self._s3_root)
        if kind in FOR_QUANTIZED and self._served.kind not in KNOWN_FORMS and not options.get("quantization"):
            raise InvalidRequestError(
                "the served base is not quantized by bitsandbytes: say for which `quantization` this is meant",
                code="not_supported",
                param="quantization",
            )
        if kind == "verify" and not options["adapters"]:
            return [_input(record) for history in self._store.histories() for record in history.generations]
        return [_input(self._store.get(name)) for name in _names(kind, options)]

    def run(self, record: JobRecord, process: WorkProcess, report: Callable[[str, float], None]) -> dict[str, Any]:
        """See `JobHandler.run`."""
        with self._holding(record.inputs), self._store.staging_folder() as folder:
            result = process.run(self._task(record, folder), report)
            failpoint("job.staged")
            report("publishing", 1.0)
            if record.options.get("name"):
                published = self._publish(record, folder / "out", result)
                result["adapter"] = _input(published)
            elif record.kind == "merge":
                self._export(folder / "out", record.job_id)
                result["export"] = f"exports/{record.job_id}"
            failpoint("job.published")
            return result

    def _task(self, record: JobRecord, folder: Path) -> dict[str, Any]:
        options, kind = record.options, record.kind
        folders = [str(self._store.folder_of(one["digest"])) for one in record.inputs]
        task: dict[str, Any] = {"kind": kind, "base": str(self._base), "out": str(folder / "out")}
        task |= {"adapters": folders, "inputs": list(record.inputs)}
        if kind in ("mix", "merge"):
            task["weights"] = [one["weight"] for one in options["adapters"]]
        if kind == "mix":
            task["seed"] = options["seed"]
            task["options"] = {key: value for key, value in options.items() if key not in NOT_FOR_MIXING}
            return task
        # What DoRA changes is a matter of the served base; only starting values are one of the original.
        original = "original" if kind in ("convert", "import") else "base"
        for key, name in zip(FOLDER_OPTIONS, ("path", "initial", original), strict=True):
            if options.get(key):
                task[name] = str(self._imports.folder(options[key]))
        task |= {key: options[key] for key in TASK_OPTIONS if key in options}
        if kind == "convert":
            task["adapter"] = folders[0] if folders else task["path"]
        if kind == "import":
            task["max_bytes"] = dict(self._max_bytes)
        if kind in FOR_QUANTIZED:
            served = replace(self._served, kind=options.get("quantization") or self._served.kind)
            task["quantization"] = asdict(served)
        if kind == "extract":
            task["tuned"] = task["path"]
        return task

    def _publish(self, record: JobRecord, folder: Path, result: Mapping[str, Any]) -> AdapterRecord:
        options = record.options
        asked = {key: value for key, value in options.items() if key not in PUBLICATION_OPTIONS}
        source = {"kind": record.kind, "job_id": record.job_id, "inputs": list(record.inputs), "options": asked}
        publication = Publication(
            expected_generation=options.get("expected_generation"),
            promote=options.get("promote", True),
            labels=options.get("labels"),
            note=options.get("note"),
            source=source | {"result": dict(result)},
            quota=StorageQuota(record.owner.get("max_adapters"), record.owner.get("max_bytes")),
        )
        converted = result.get("converted") or ""
        return self._adapters.import_folder(options["name"], folder, publication, converted=converted)

    def _export(self, folder: Path, job_id: str) -> None:
        """Move a finished model folder to the exports, durably."""
        with storage_errors():
            self._exports.mkdir(exist_ok=True)
            sync_folder(self._exports.parent)
            for path in folder.iterdir():
                sync_file(path)
            sync_folder(folder)
            failpoint("export.synced")
            if (self._exports / job_id).exists():  # of an attempt that a crash cut short between here and its record
                rename(self._exports / job_id, folder.parent / "former")
            rename(folder, self._exports / job_id)
            failpoint("export.renamed")
            sync_folder(self._exports)

    @contextmanager
    def _holding(self, inputs: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        held: list[str] = []
        try:
            for one in inputs:
                self._store.hold(one["digest"])
                held.append(one["digest"])
            yield
        finally:
            for digest in held:
                self._store.release(digest)


def _names(kind: str, options: Mapping[str, Any]) -> list[str]:
    if kind in ("mix", "merge"):
        return [one["name"] for one in options["adapters"]]
    if kind == "verify":
        return list(options["adapters"])
    return [options["adapter"]] if options.get("adapter") else []


def _input(record: AdapterRecord) -> dict[str, Any]:
    return {"name": record.name, "generation": record.generation, "digest": record.digest}
