"""Bodies of vLLM's and mistral.rs' routes for loading and unloading adapters. Unknown fields are ignored, as there."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LoadRequest", "LoadedAdapter", "LoadedGeneration", "LoadedList", "UnloadRequest"]

# mistral.rs' generations are digests; ours, numbers, are taken too.
Expected = Annotated[int, Field(ge=0, le=10**18)] | Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


class LifecycleBody(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    lora_name: str = Field(min_length=1, max_length=160)
    expected_generation: Expected = None


class LoadRequest(LifecycleBody):
    """Which folder to load under which name."""

    lora_path: str = Field(min_length=1, max_length=1024, description="below the import root")
    load_inplace: bool = Field(False, description="replace an adapter of this name that has other contents")


class UnloadRequest(LifecycleBody):
    """Which adapter to delete."""

    lora_int_id: int | None = Field(None, description="ignored: names are unique")


class LoadedAdapter(BaseModel):
    """One name and what it means; `generation` is the digest."""

    id: str
    generation: str
    rank: int
    bytes: int
    source: str | None
    revision: str | None


class LoadedGeneration(BaseModel):
    """One digest that is in a slot, or that requests use; `retired` ones have no name any more."""

    generation: str
    aliases: list[str]
    bytes: int
    rank: int | None
    active_leases: int
    retired: bool


class LoadedList(BaseModel):
    """mistral.rs' list of adapters."""

    max_adapters: int
    max_bytes: int
    max_rank: int
    resident_bytes: int
    resident_generations: int
    retired_generations: int
    generations: list[LoadedGeneration]
    data: list[LoadedAdapter]
