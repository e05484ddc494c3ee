"""Settings of a server: read by the command line and the application factory, nowhere else."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Settings"]

Bytes = Annotated[int, Field(ge=1 << 16)]


class Settings(BaseModel):
    """One value per flag of `loramux serve`; every flag can also be given as LORAMUX_<NAME>.

    Attributes:
        model: "demo", a local Hugging Face folder, or a GGUF file or a folder with one.
        keys: file of API keys; None lets everybody do everything.
        audit_log: by default beside the keys, if there are any.
        allow_open: on an address that others can reach, too.
        drain_timeout_s: how long running requests may take once the server is told to stop.
        kv_memory: None for 1 GiB, on CUDA for most of what is free once the model is loaded.
        kernels: `auto` is `triton` on CUDA, and `torch` on a CPU.
        tune_kernels: measure Triton kernels' launch parameters at the first start, and keep them in the cache folder.
        quantization: "none" leaves the model as its files hold it, which may be quantized.
        double_quant: with 4 bits, the scales are quantized as well.
        slot_memory, host_memory: None for a quarter of what is free once the model is loaded.
        model_aliases: more names for the base model, which some clients send when nobody named one.
        import_root: folder under which paths in requests must lie; without it no path is taken.
        allow_hub: adapters may be fetched from the Hugging Face hub.
        s3_root: `s3://bucket/prefix` under which object stores' addresses in jobs must lie; without it none is read.
        adapters: adapters to import at the start, folder by name; a name that the store knows already is left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "demo"
    store: Path = Path("store")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    keys: Path | None = None
    audit_log: Path | None = None
    allow_open: bool = False
    open_metrics: bool = False
    drain_timeout_s: float = Field(30.0, ge=0, le=3600)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "fp4", "int8", "int4"] = "none"
    double_quant: bool = False
    adapters: dict[str, Path] = Field(default_factory=dict)
    served_model_name: str | None = None
    model_aliases: tuple[str, ...] = ("tgi", "dummy")

    threads: int | None = Field(None, ge=1)
    max_running: int = Field(32, ge=1, le=1024)
    max_waiting: int = Field(512, ge=1)
    max_step_tokens: int = Field(512, ge=1)
    target_step_ms: int = Field(300, ge=0)
    prefix_cache: bool = True
    kernels: Literal["auto", "triton", "torch"] = "auto"
    cuda_graphs: bool = True
    tune_kernels: bool = False
    max_slots: int = Field(32, ge=1, le=1024)
    max_rank: int = Field(256, ge=1)
    max_model_len: int | None = Field(None, ge=2)
    kv_memory: Bytes | None = None
    slot_memory: Bytes | None = None
    host_memory: Bytes | None = None
    max_new_tokens: int = Field(256, ge=1)

    import_root: Path | None = None
    allow_hub: bool = False
    s3_root: str | None = Field(None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$")
    max_json_bytes: Bytes = 2 << 20
    max_upload_bytes: Bytes = 512 << 20
    min_free_bytes: int = Field(2 << 30, ge=0)
    max_generations: int = Field(10, ge=2)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
