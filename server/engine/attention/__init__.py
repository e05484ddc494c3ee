"""Attention over packed sequences, behind transformers' attention interface. The import surface of the package."""

from server.engine.attention.device import NO_CONFIGS, AttentionPlan, DeviceAttention, Span, tune_attention
from server.engine.attention.interface import ATTENTION_NAME, AttentionCall, AttentionStep, register, use_step
from server.engine.attention.native import LayerAttention, NativeAttention
from server.engine.attention.paged import AttentionGroup, PagedAttention
from server.engine.attention.probe import AttentionProbe
from server.engine.attention.rotary import TOLERANCE, RotaryAttention, replace_attention

__all__ = [
    "ATTENTION_NAME",
    "NO_CONFIGS",
    "TOLERANCE",
    "AttentionCall",
    "AttentionGroup",
    "AttentionPlan",
    "AttentionProbe",
    "AttentionStep",
    "DeviceAttention",
    "LayerAttention",
    "NativeAttention",
    "PagedAttention",
    "RotaryAttention",
    "Span",
    "register",
    "replace_attention",
    "tune_attention",
    "use_step",
]
