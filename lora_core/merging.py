"""Merging adapters into a model's base weights, and taking them out again: all modules, or none."""

from collections.abc import Callable, Iterable, Sequence

from lora_core.adapter_module import AdapterModule

__all__ = ["merge_adapters", "unmerge_adapters"]


def merge_adapters(
    modules: Sequence[AdapterModule],
    names: Sequence[str],
    *,
    safe: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Merge adapters into every module; errors as in `AdapterModule.merge`, and nothing is merged then.

    Args:
        report: called after each module with the number of those that are done, and of all.
    """
    before = [module.merged_adapters for module in modules]
    try:
        for i, module in enumerate(modules, 1):
            module.merge(names, safe=safe)
            if report is not None:
                report(i, len(modules))
    except BaseException:
        for module, merged in zip(modules, before, strict=True):
            module.unmerge()
            module.merge(merged)
        raise


def unmerge_adapters(modules: Iterable[AdapterModule]) -> None:
    """Put every module's original parameters back."""
    for module in modules:
        module.unmerge()
