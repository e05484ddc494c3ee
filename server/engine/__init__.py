"""Continuous batching over one model and many adapters. The import surface of the engine."""

from server.engine.fairness import Fairness
from server.engine.loop import EngineLoop, EngineStats
from server.engine.model import ModelFacts
from server.engine.ports import AdapterLease, TokenConstraint, TokenText
from server.engine.quantization import Quantization
from server.engine.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Token,
    TokenLogprob,
)
from server.engine.runner import EngineConfig, ModelRunner, load_runner
from server.engine.saving import save_quantized

__all__ = [
    "AdapterLease",
    "EngineConfig",
    "EngineLoop",
    "EngineStats",
    "Event",
    "Failed",
    "Fairness",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "ModelFacts",
    "ModelRunner",
    "Quantization",
    "SamplingParams",
    "Token",
    "TokenConstraint",
    "TokenLogprob",
    "TokenText",
    "load_runner",
    "save_quantized",
]
