"""Bodies of `/info` and `/v1/models`."""

from typing import Literal

from pydantic import BaseModel

__all__ = ["Info", "ModelCard", "ModelList"]


class Info(BaseModel):
    """What is served, in the field names of TGI and LoRAX."""

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    quantization: str | None = None
    model_device_type: str
    model_pipeline_tag: str = "text-generation"
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_waiting_tokens: int = 0
    waiting_served_ratio: float = 0.0
    validation_workers: int = 1
    max_client_batch_size: int = 1
    eager_prefill: bool = False
    max_adapters_in_use: int
    router: str = "loramux"
    version: str
    sha: str | None = None
    docker_label: str | None = None


class ModelCard(BaseModel):
    """The base model, or an adapter of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loramux"
    root: str
    parent: str | None
    max_model_len: int
    permission: list[str] = []


class ModelList(BaseModel):
    """The base model and its adapters, in OpenAI's shape."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
