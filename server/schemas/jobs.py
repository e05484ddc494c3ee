"""Bodies of `/admin/jobs`: one model for each kind; unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from server.jobs.queue import JobView
from server.schemas.admin import AdminBody

__all__ = ["JobInfo", "JobList", "JobRequest"]

Reference = Annotated[str, Field(min_length=1, max_length=160)]
FolderPath = Annotated[str, Field(min_length=1, max_length=1024)]
Rank = Annotated[int, Field(ge=1, le=4096)]
Weight = Annotated[float, Field(ge=-1e4, le=1e4)]
OriginalPath = Annotated[
    FolderPath | None,
    Field(description="the unquantized model's folder below the import root, if the base's own files are quantized"),
]
CombinationType = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


class _Publishing(AdminBody):
    """Where the new adapter goes; see uploads."""

    name: str = Field(max_length=128, description="of the new adapter")
    expected_generation: int | None = Field(None, ge=0, le=10**18)
    promote: bool = True
    labels: dict[str, str] | None = None
    note: str | None = None


class MixSource(AdminBody):
    """One adapter of a mix."""

    name: Reference
    weight: Weight = 1.0


class MixJob(_Publishing):
    """Combine adapters into a new one; names and options are those of PEFT's `add_weighted_adapter`."""

    kind: Literal["mix"]
    adapters: list[MixSource] = Field(min_length=1, max_length=64)
    combination_type: CombinationType = "svd"
    svd_rank: Rank | None = None
    svd_clamp: float | None = Field(None, ge=0, le=1)
    svd_full_matrices: bool = True
    svd_driver: Literal["gesvd", "gesvdj", "gesvda"] | None = None
    density: float | None = Field(None, ge=0)
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: int = Field(0, ge=0, lt=1 << 63, description="of DARE's random draws")


class ConvertJob(_Publishing):
    """Turn an adapter into plain LoRA: rsLoRA exactly, DoRA by SVD at `rank`, PiSSA and OLoRA from their base."""

    kind: Literal["convert"]
    adapter: Reference | None = Field(None, description="an adapter of the store")
    path: FolderPath | None = Field(None, description="or an adapter's folder below the import root")
    initial_path: FolderPath | None = Field(None, description="the same adapter before its training")
    original_path: OriginalPath = None
    rank: Rank | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "ConvertJob":
        if (self.adapter is None) == (self.path is None):
            raise ValueError("give either `adapter` or `path`")
        return self


class ExtractJob(_Publishing):
    """Make an adapter of what full fine-tuning changed."""

    kind: Literal["extract"]
    path: FolderPath = Field(description="the fine-tuned model's folder below the import root")
    original_path: OriginalPath = None
    rank: Rank
    target_modules: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(min_length=1, max_length=256)


class ImportJob(_Publishing):
    """Bring an adapter in: from a folder below the import root, the Hugging Face hub, or an object store."""

    kind: Literal["import"]
    path: FolderPath | None = None
    initial_path: FolderPath | None = Field(None, description="the same adapter before its training, for conversion")
    original_path: OriginalPath = None
    repo: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="a commit, in full")

    url: str | None = Field(
        None,
        max_length=1024,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\x00-\x1f\x7f]*)?$",
        description="`s3://bucket/prefix` of an adapter's folder",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ImportJob":
        if sum(source is not None for source in (self.path, self.repo, self.url)) != 1:
            raise ValueError("give one of `path`, `repo` and `url`")
        if (self.repo is None) != (self.revision is None):
            raise ValueError("`repo` needs a `revision`, a full commit id")
        return self


class MergeJob(AdminBody):
    """Merge adapters with their weights into the base: a model folder of its own, below `exports/` in the store.

    It is not quantized, also where the base's own files are; these are dequantized, unless `original_path` is given.
    """

    kind: Literal["merge"]
    adapters: list[MixSource] = Field(min_length=1, max_length=64, description="a bare name has the weight 1")
    original_path: OriginalPath = None
    safe_merge: bool = True

    @field_validator("adapters", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        return [{"name": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class VerifyJob(AdminBody):
    """Check stored adapters again: digests, files, values, fit. Without names, every generation of all."""

    kind: Literal["verify"]
    adapters: list[Reference] = Field(default_factory=list, max_length=1000)


class _Quantized(_Publishing):
    """For a served base that is quantized, or one that is not and will be."""

    quantization: Literal["nf4", "fp4", "int8"] | None = Field(None, description="that of the served base by default")
    original_path: OriginalPath = None
    prompts: list[Annotated[str, Field(min_length=1, max_length=1 << 16)]] | None = Field(
        None, min_length=1, max_length=64, description="texts of the kind that is asked; a few of our own by default"
    )


class LoftQJob(_Quantized):
    """Set an adapter's A and B to what quantizing the base took from its layers, as a start for training beside it."""

    kind: Literal["loftq"]
    adapter: Reference | None = Field(None, description="whose factors are replaced; else a new one is made")
    rank: Rank | None = Field(None, description="of a new adapter")
    target_modules: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, min_length=1, max_length=256, description="of a new adapter; all linear layers by default"
    )
    judge: bool = Field(
        True, description="keep only the modules that bring the prompts' next-token distributions nearer"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "LoftQJob":
        if (self.adapter is None) == (self.rank is None):
            raise ValueError("give either `adapter` or the `rank` of a new one")
        if self.adapter is not None and self.target_modules is not None:
            raise ValueError("`target_modules` are those of the adapter")
        return self


class CompensationJob(_Quantized):
    """Make an adapter that gives back what quantizing the base took, mixed at weight 1 into any request."""

    kind: Literal["loftq-compensation"]
    rank: Rank


JobRequest = Annotated[
    MixJob | ConvertJob | ExtractJob | ImportJob | MergeJob | VerifyJob | LoftQJob | CompensationJob,
    Field(discriminator="kind"),
]


class JobInfo(BaseModel):
    """A job.

    Attributes:
        inputs: the adapters that it reads: name, generation, digest.
        state: `interrupted` means that the server went down meanwhile.
        attempt: counts from 1.
        stage, fraction, eta_s: how far it is; seconds that are left if it goes on as it went so far.
    """

    job_id: str
    kind: str
    options: dict[str, Any]
    inputs: list[dict[str, Any]]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
    attempt: int
    created_at: str
    started_at: str
    finished_at: str
    stage: str
    fraction: float
    eta_s: float | None
    result: dict[str, Any]
    error: dict[str, Any]

    @classmethod
    def of(cls, view: JobView) -> "JobInfo":
        record = view.record
        return cls(
            job_id=record.job_id,
            kind=record.kind,
            options=dict(record.options),
            inputs=[dict(one) for one in record.inputs],
            state=record.state.value,
            attempt=record.attempt,
            created_at=record.created_at,
            started_at=record.started_at,
            finished_at=record.finished_at,
            stage=record.stage,
            fraction=round(record.fraction, 4),
            eta_s=None if view.eta_s is None else round(view.eta_s, 1),
            result=dict(record.result),
            error=dict(record.error),
        )


class JobList(BaseModel):
    """All jobs, newest first."""

    jobs: list[JobInfo]
