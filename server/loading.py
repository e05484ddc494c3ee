"""The model and its tokenizer, made side by side."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from server.engine import ModelFacts, ModelRunner
from server.engine.selfcheck import check_against_reference
from server.text import TextCodec

__all__ = ["load_model_and_text"]


def load_model_and_text(
    path: Path, load: Callable[[Callable[[ModelFacts], None]], ModelRunner], report: Callable[[str], None]
) -> tuple[ModelRunner, TextCodec]:
    """Load a local model folder; while the model is made fast, another thread makes the tokenizer.

    Args:
        load: `load_runner` for this folder, given who is told of its facts.

    Raises:
        InvalidRequestError: as `load_runner`, `check_against_reference` and `TextCodec`.
    """
    with ThreadPoolExecutor(1, "tokenizer") as beside:
        codecs: list[Future[TextCodec]] = []

        def make_codec(facts: ModelFacts) -> None:
            vocab_size, eos = facts.vocab_size, facts.eos_token_ids
            codecs.append(beside.submit(lambda: TextCodec(path, vocab_size=vocab_size, eos_token_ids=eos)))

        runner = load(make_codec)
        error = check_against_reference(runner)
        report(f"the engine agrees with transformers on this model (relative error {error:.1e})")
        return runner, codecs[0].result()
