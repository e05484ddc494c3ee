"""Which names mean the base model, and which adapters a request has chosen: one rule for all routes."""

from collections.abc import Callable, Mapping

from server.errors import InvalidRequestError

__all__ = ["ADAPTER_HEADER", "BASE_NAME", "ModelNames"]

BASE_NAME = "__base_model__"
ADAPTER_HEADER = "X-Adapter-Id"


class ModelNames:
    """The names of one served model.

    Args:
        model_id: the base model's own name.
        aliases: more names for it, that some clients send when nobody named a model; an adapter of that name wins.
        adapter_exists: whether there is an adapter of a name.
    """

    def __init__(self, model_id: str, aliases: frozenset[str], adapter_exists: Callable[[str], bool]) -> None:
        self.model_id = model_id
        self._aliases = aliases
        self._adapter_exists = adapter_exists

    def for_caller(self, adapter_exists: Callable[[str], bool]) -> "ModelNames":
        """The same where other adapters exist."""
        return ModelNames(self.model_id, self._aliases, adapter_exists)

    def is_base(self, name: str | None) -> bool:
        """Whether a name, or none, means the base model."""
        if not name or name in {BASE_NAME, self.model_id}:
            return True
        return name in self._aliases and not self._adapter_exists(name)

    def choose(self, weights: Mapping[str, float], *, model: str | None = None, header: str | None) -> dict[str, float]:
        """Weight by adapter name; empty for the base model.

        Args:
            weights: what the body's adapter fields say.
            model: OpenAI's `model`: the base, an adapter, or `base:adapter`.
            header: the value of X-Adapter-Id; counts if the body names no adapter.

        Raises:
            InvalidRequestError: `model` and the adapter fields name different adapters.
        """
        named = None if model is None else model.removeprefix(self.model_id + ":")
        chosen = {name: weight for name, weight in weights.items() if not self.is_base(name)}
        if not self.is_base(named):
            assert named is not None
            if weights and chosen != {named: 1.0}:
                raise InvalidRequestError(
                    "`model` and the adapter fields name different adapters",
                    code="adapter_choice_conflict",
                    param="model",
                )
            return {named: 1.0}
        if weights or self.is_base(header):
            return chosen
        assert header is not None
        return {header: 1.0}
