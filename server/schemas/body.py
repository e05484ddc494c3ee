"""What the bodies of all generating routes have in common: how they are read, and how they choose adapters."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.errors import InvalidRequestError

__all__ = ["AdapterBody", "AdapterName", "Body", "MergedAdapters", "MixEntry", "StopString", "chosen_weights"]

MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 64
MAX_MIX_ENTRIES = 64
MAX_LOGIT_BIASES = 1_024
MAX_TOP_LOGPROBS = 20
MAX_SEQUENCES = 16
MAX_SEED = (1 << 64) - 1

# How others name such fields, or one might. Where there is no such field the base model would answer, unnoticed.
ADAPTER_FIELDS = frozenset(
    {"merged_adapters", "lora_request", "lora_path", "lora_weights", "mix"}
    | {kind + end for kind in ("adapter", "lora") for end in ("", "s", "_id", "_ids", "_name", "_names")}
    | {"lora_adapter", "lora_adapters"}
)

Weight = Annotated[float, Field(ge=-1e4, le=1e4)]
AdapterName = Annotated[str, Field(max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class Body(BaseModel):
    """Fields that nobody knows are ignored, as these routes' clients expect; null means "not set".

    Known fields that cannot be honoured are in `NEUTRAL`, with the values with which they change nothing.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True, strict=True, populate_by_name=True)

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    def refuse_unsupported(self) -> None:
        """Refuse a field that would change the output and cannot be honoured.

        Raises:
            InvalidRequestError: code `not_supported`, naming the field.
        """
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and not any(type(value) is type(other) and value == other for other in neutral):
                raise InvalidRequestError(f"`{name}` is not supported", code="not_supported", param=name)


class AdapterBody(Body):
    """One that says which adapters answer; a field that looks so and is not known here is refused, not ignored."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_strange_choices(cls, values: Any) -> Any:
        strange = ADAPTER_FIELDS - cls.model_fields.keys() if isinstance(values, dict) else frozenset()
        for name in sorted(strange):
            if values.get(name) not in (None, "", [], {}):
                known = ", ".join(f"`{field}`" for field in sorted(ADAPTER_FIELDS & cls.model_fields.keys()))
                message = (
                    f"there is no field `{name}` here: the base model would answer; adapters are chosen by {known}"
                )
                raise InvalidRequestError(message, code="unknown_field", param=name)
        return values


class MixEntry(Body):
    """One adapter of a mix: the output is the base's plus the weighted sum of the adapters' deltas."""

    name: AdapterName
    weight: Weight = 1.0


class MergedAdapters(Body):
    """LoRAX's form of a mix; `linear` here is the exact weighted sum of the adapters' deltas."""

    ids: list[AdapterName] = Field(min_length=1, max_length=MAX_MIX_ENTRIES)
    weights: list[Weight] | None = None
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: Any = None
    majority_sign_method: Literal["total", "frequency"] | None = None


def chosen_weights(
    adapter_id: str | None, merged: MergedAdapters | None, adapters: list[MixEntry] | None
) -> dict[str, float]:
    """Weight by adapter name; empty if none is chosen. An adapter that is named twice gets the sum.

    Raises:
        InvalidRequestError: adapters are chosen in two ways, or the mix is malformed or not supported.
    """
    if sum(choice is not None for choice in (adapter_id or None, merged, adapters or None)) > 1:
        raise InvalidRequestError(
            "give only one of `adapters`, `adapter_id` and `merged_adapters`",
            code="adapter_choice_conflict",
            param="adapters",
        )
    if merged is not None:
        entries = _merged_entries(merged)
    elif adapters:
        entries = [(entry.name, entry.weight) for entry in adapters]
    else:
        entries = [(adapter_id, 1.0)] if adapter_id else []
    weights: dict[str, float] = {}
    for name, weight in entries:
        weights[name] = weights.get(name, 0.0) + weight
    return weights


def _merged_entries(merged: MergedAdapters) -> list[tuple[str, float]]:
    if merged.merge_strategy not in (None, "linear"):
        raise InvalidRequestError(
            f"`merge_strategy` {merged.merge_strategy!r} is not supported; `linear` is",
            code="not_supported",
            param="merge_strategy",
        )
    weights = [1.0] * len(merged.ids) if merged.weights is None else merged.weights
    if len(weights) != len(merged.ids):
        raise InvalidRequestError(
            "`merged_adapters` needs as many weights as ids", code="invalid_value", param="merged_adapters"
        )
    return list(zip(merged.ids, weights, strict=True))
