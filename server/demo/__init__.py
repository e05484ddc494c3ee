"""The demo: a small model out of a Python package, and two adapters trained for it.

The model is SmolLM2-135M-Instruct; `pirate` (LoRA) answers as a pirate would, `json` (DoRA) answers with a JSON
object, and a mix of the two does both. `python -m server.demo.train` makes the two adapters anew.
"""

from pathlib import Path

from server.demo.model import ensure_demo_model

__all__ = ["demo_adapters", "ensure_demo_model"]


def demo_adapters() -> dict[str, Path]:
    """The folders of the demo's adapters by name."""
    return {path.name: path for path in sorted(Path(__file__).with_name("adapters").iterdir())}
