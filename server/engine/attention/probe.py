"""A first forward pass that attends to nothing and notes what each layer asks for."""

from torch import Tensor

from server.engine.attention.interface import AttentionCall
from server.engine.kv_cache import LayerShape
from server.errors import InvalidRequestError

__all__ = ["AttentionProbe"]


class AttentionProbe:
    """An `AttentionStep` that records calls; its output is zero."""

    def __init__(self) -> None:
        self._shapes: dict[int, LayerShape] = {}
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if call.layer in self._shapes:
            raise InvalidRequestError(f"two attention layers share index {call.layer}", code="model_unsupported")
        self._shapes[call.layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.calls.append(call)
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])

    def attend_joined(
        self,
        call: AttentionCall,
        heads: Tensor,
        num_kv_heads: int,
        embeddings: tuple[Tensor, Tensor],  # noqa: ARG002
    ) -> Tensor:
        num_query_heads = heads.shape[1] - 2 * num_kv_heads
        return self.attend(call, *heads.split([num_query_heads, num_kv_heads, num_kv_heads], dim=1))

    def layer_shapes(self) -> list[LayerShape]:
        """What each layer stores, by layer index.

        Raises:
            InvalidRequestError: the model has no attention layers, or others beside them.
        """
        if sorted(self._shapes) != list(range(len(self._shapes))) or not self._shapes:
            raise InvalidRequestError(
                "this architecture does not run all of its layers through transformers' attention interface",
                code="model_unsupported",
            )
        return [self._shapes[layer] for layer in range(len(self._shapes))]
