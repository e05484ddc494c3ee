"""What is done to a loaded model to make it fast: layers that share an input become one, blocks get shorter.

The model's code stays as it is. Modules are replaced after loading, each only where it is seen to do the same; a model
of another kind runs with whatever fits it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lora_core import LoraLinear
from lora_core.quant_product import is_batch_dependent
from lora_core.shared import find_shared_inputs, share_inputs
from server.engine.attention import replace_attention
from server.engine.decoder import NativeLayers
from server.engine.layers import StackKind, replace_layers
from server.engine.model import run_probe
from server.engine.replace import replace_mlps, replace_norms
from server.engine.straight import StraightModel, find_straight_model

__all__ = ["Optimised", "optimise"]


@dataclass(frozen=True, slots=True)
class Optimised:
    """What was found to optimise: numbers of layer groups, of layers in them, and of blocks of each kind.

    Attributes:
        shapes: of the groups: in_features, and the layers' out_features.
        straight: what runs the model without its own code, or None.
    """

    num_groups: int
    num_grouped_layers: int
    num_attention_blocks: int
    num_mlps: int
    num_norms: int
    num_decoders: int
    shapes: frozenset[tuple[int, tuple[int, ...]]]
    straight: StraightModel | None


def optimise(
    model: nn.Module, layers: Mapping[str, LoraLinear], stack: StackKind | None = None, *, as_int4: bool = False
) -> Optimised:
    """Change the model in place; its layers have their slots already.

    Args:
        stack: what computes several layers at once.
        as_int4: the weights are rounded to 4 bits, and few rows read them so.
    """
    names = find_shared_inputs(layers, lambda: run_probe(model))
    # Also those that a run does not call just once: bitsandbytes' own product would mix what requests get.
    alone = layers.keys() - {name for group in names for name in group}
    names += [[name] for name in sorted(alone) if is_batch_dependent(layers[name].base_layer)]
    groups = share_inputs(layers, names, as_int4=as_int4)
    num_blocks = replace_attention(model, lambda: run_probe(model), groups)
    num_mlps, num_norms = replace_mlps(model, groups), replace_norms(model)
    _leave_the_file(model)  # before C is told where weights lie
    stacks = replace_layers(model, lambda: run_probe(model), stack) if stack else []
    straight = None
    if isinstance(stack, NativeLayers):
        straight = find_straight_model(model, lambda: run_probe(model), stacks, stack)
    shapes = frozenset((group.members[0].in_features, tuple(group.sizes)) for group in groups)
    num_layers = sum(len(group.members) for group in groups)
    num_decoders = sum(len(parts) for _, parts in stacks)
    return Optimised(len(groups), num_layers, num_blocks, num_mlps, num_norms, num_decoders, shapes, straight)


def _leave_the_file(model: nn.Module) -> None:
    """Copy the weights that are left out of the mapped file, so that it goes with those that were packed."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:  # quantized ones are not in the file
            parameter.data = parameter.data.clone()
