"""Bodies of `/generate` and `/generate_stream`, in the shape that TGI's and LoRAX's clients send and read."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine import SamplingParams
from server.errors import InvalidRequestError

__all__ = ["GenerateParameters", "GenerateRequest", "MixEntry"]

MAX_STOP_STRINGS = 16
MAX_MIX_ENTRIES = 64
MAX_SEED = (1 << 64) - 1

Weight = Annotated[float, Field(ge=-1e4, le=1e4)]


class Body(BaseModel):
    """Fields that nobody knows are ignored, as these routes' clients expect; null means "not set"."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


class MixEntry(Body):
    """One adapter of a mix: the output is the base's plus the weighted sum of the adapters' deltas."""

    name: str = Field(max_length=256)
    weight: Weight = 1.0


class MergedAdapters(Body):
    """LoRAX's form of a mix; `linear` here is the exact weighted sum of the adapters' deltas."""

    ids: list[Annotated[str, Field(max_length=256)]] = Field(min_length=1, max_length=MAX_MIX_ENTRIES)
    weights: list[Weight] | None = None
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


class GenerateParameters(Body):
    """Parameters of a generation. What is known but not supported is refused by `refuse_unsupported`."""

    adapter_id: str | None = Field(None, max_length=256, description="adapter name; null for the base model")
    adapter_source: Literal["hub", "local"] | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(None, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=64)
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    details: bool | None = None

    typical_p: Any = None
    repetition_penalty: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    truncate: Any = None
    best_of: Any = None
    watermark: Any = None
    decoder_input_details: Any = None
    return_k_alternatives: Any = None
    top_n_tokens: Any = None
    response_format: Any = None
    grammar: Any = None

    def refuse_unsupported(self) -> None:
        """Refuse a parameter that would change the output and cannot be honoured.

        Raises:
            InvalidRequestError: code `not_supported`, naming the parameter.
        """
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and not any(value == other and type(value) is not str for other in neutral):
                raise InvalidRequestError(f"`{name}` is not supported", code="not_supported", param=name)

    def sampling(self, seed: int) -> SamplingParams:
        """How to sample; `max_new_tokens` 0 leaves the length to the server. `seed` is used if none is given."""
        draws = (self.do_sample, self.top_k, self.top_p if self.top_p != 1 else None)
        temperature = self.temperature
        if temperature is None or (temperature == 1 and not any(draws)):
            temperature = 1.0 if any(draws) else 0.0
        return SamplingParams(
            max_new_tokens=self.max_new_tokens or 0,
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed if self.seed is None else self.seed,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos_token),
            logprobs=True,
        )


# Values with which a parameter that is not supported changes nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "typical_p": (),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "truncate": (),
    "best_of": (1,),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "return_k_alternatives": (0,),
    "top_n_tokens": (0,),
    "response_format": (),
    "grammar": (),
}


class GenerateRequest(Body):
    """A prompt, and which adapters answer it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "What is the capital of France?", "parameters": {"adapter_id": "pirate"}},
                {
                    "inputs": "What is the capital of France?",
                    "adapters": [{"name": "pirate", "weight": 1.0}, {"name": "json", "weight": 1.0}],
                },
            ]
        }
    )

    inputs: str = Field(min_length=1)
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)
    adapters: list[MixEntry] | None = Field(None, max_length=MAX_MIX_ENTRIES)

    def weights(self) -> dict[str, float]:
        """Weight by adapter name; empty for the base model. An adapter that is named twice gets the sum.

        Raises:
            InvalidRequestError: adapters are chosen in two ways, or the mix is malformed or not supported.
        """
        parameters = self.parameters
        merged = parameters.merged_adapters
        chosen = [parameters.adapter_id or None, merged, self.adapters or None]
        if sum(choice is not None for choice in chosen) > 1:
            raise InvalidRequestError(
                "give only one of `adapters`, `parameters.adapter_id` and `parameters.merged_adapters`",
                code="adapter_choice_conflict",
                param="adapters",
            )
        if merged is not None:
            entries = _merged_entries(merged)
        elif self.adapters:
            entries = [(entry.name, entry.weight) for entry in self.adapters]
        else:
            entries = [(parameters.adapter_id, 1.0)] if parameters.adapter_id else []
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
