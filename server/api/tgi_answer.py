"""How the sequences of one call look to TGI's and LoRAX's clients."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.delivery import Generation, GenerationGroup
from server.engine import Token
from server.schemas.tgi import GenerateRequest
from server.text import TextCodec

__all__ = ["TgiAnswer", "finite_logprob"]

LOWEST_LOGPROB = -9999.0  # JSON knows no infinity


def finite_logprob(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob is not None and math.isfinite(logprob) else LOWEST_LOGPROB


@dataclass(slots=True)
class _Sequence:
    """What has come of one sequence."""

    generation: Generation
    text: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    top_tokens: list[list[dict[str, Any]]] = field(default_factory=list)


class TgiAnswer:
    """The answer to one call, as it grows.

    Args:
        weights: weight by adapter name; empty for the base model.
    """

    def __init__(
        self,
        body: GenerateRequest,
        group: GenerationGroup,
        codec: TextCodec,
        *,
        model_id: str,
        weights: Mapping[str, float],
    ) -> None:
        self._parameters = body.settings
        self._num_input_chars = len(body.inputs)
        self._prefix = body.inputs if self._parameters.return_full_text else ""
        self._group = group
        self._codec = codec
        self._model_id = model_id
        self._weights = weights
        self._sequences = [_Sequence(generation) for generation in group.generations]

    def add(self, generation: Generation, token: Token) -> dict[str, Any]:
        """Take a token; returns the stream's event for it, which is complete with the last one."""
        sequence = self._sequences[generation.index]
        special = self._codec.is_special(token.token_id)
        shown = self._token(
            token.token_id, token.logprob, self._codec.token_text(token.token_id) if special else token.text
        )
        shown["skipped"] = False
        if self._parameters.return_k_alternatives:
            best = token.top[: self._parameters.return_k_alternatives]
            shown["alternative_tokens"] = [self._alternative(*pair) for pair in best]
        sequence.text += token.text
        sequence.tokens.append(shown)
        event: dict[str, Any] = {"index": len(sequence.tokens), "token": shown}
        if self._parameters.top_n_tokens:
            best = token.top[: self._parameters.top_n_tokens]
            sequence.top_tokens.append([self._token(i, logprob, self._text(i)) for i, logprob in best])
            event["top_tokens"] = sequence.top_tokens[-1]
        event |= {"generated_text": None, "details": None}
        if generation.finished is not None:
            event["generated_text"] = self._prefix + sequence.text
            if self._parameters.wants_details:
                event["details"] = self._stream_details(sequence)
        return event

    def plain(self) -> dict[str, Any]:
        """The whole answer; the best sequence in front."""
        ranked = sorted(self._sequences, key=lambda sequence: -sequence.generation.mean_logprob)
        answer: dict[str, Any] = {"generated_text": self._prefix + ranked[0].text}
        if not self._parameters.wants_details:
            return answer
        details = self._stream_details(ranked[0]) | self._lists(ranked[0])
        if len(ranked) > 1:
            details["best_of_sequences"] = [
                {"generated_text": self._prefix + sequence.text} | self._summary(sequence) | self._lists(sequence)
                for sequence in ranked[1:]
            ]
        return answer | {"details": details}

    def headers(self) -> dict[str, str]:
        """What is known when the headers go out: all of it for a plain answer, the rest is left out for a stream."""
        headers = {"x-model-id": self._model_id, "x-compute-type": "loramux"}
        if self._weights:
            headers["x-adapter-id"] = ",".join(self._weights)
            headers["x-adapter-source"] = "local"
        group = self._group
        if group.adapter_generations:
            headers["x-adapter-generation"] = ",".join(map(str, group.adapter_generations.values()))
        timing = group.timing
        headers["x-prompt-tokens"] = str(group.num_prompt_tokens)
        if timing.first_token_s is not None and timing.finished_s is not None:
            total_s = time.monotonic() - timing.started_s
            headers |= {
                "x-generated-tokens": str(group.num_generated),
                "x-total-tokens": str(group.num_prompt_tokens + group.num_generated),
                "x-queue-time": _milliseconds(group.queue_s),
                "x-inference-time": _milliseconds(total_s - group.queue_s),
                "x-total-time": _milliseconds(total_s),
                "x-time-to-first-token": _milliseconds(timing.first_token_s - timing.started_s),
                "x-compute-characters": str(self._num_input_chars),
            }
        return headers

    def _summary(self, sequence: _Sequence) -> dict[str, Any]:
        generation = sequence.generation
        assert generation.finished is not None
        sampling = generation.request.sampling
        return {
            "finish_reason": generation.finished.reason.value,
            "generated_tokens": len(sequence.tokens),
            "seed": sampling.seed if sampling.temperature > 0 else None,
        }

    def _stream_details(self, sequence: _Sequence) -> dict[str, Any]:
        num_prompt_tokens = sequence.generation.num_prompt_tokens
        counts = {"prompt_tokens": num_prompt_tokens, "input_length": num_prompt_tokens, "skipped_tokens": 0}
        return self._summary(sequence) | counts

    def _lists(self, sequence: _Sequence) -> dict[str, Any]:
        out: dict[str, Any] = {"prefill": self._prefill(sequence.generation), "tokens": sequence.tokens}
        if self._parameters.top_n_tokens:
            out["top_tokens"] = sequence.top_tokens
        return out

    def _prefill(self, generation: Generation) -> list[dict[str, Any]]:
        if not self._parameters.decoder_input_details:
            return []
        first = {"id": generation.request.prompt_ids[0], "text": self._text(generation.request.prompt_ids[0])}
        rest = [self._alternative(entry.token_id, entry.logprob) for entry in generation.prompt_logprobs]
        return [first | {"logprob": None}, *rest]

    def _token(self, token_id: int, logprob: float | None, text: str) -> dict[str, Any]:
        special = self._codec.is_special(token_id)
        return {"id": token_id, "text": text, "logprob": finite_logprob(logprob), "special": special}

    def _alternative(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"id": token_id, "text": self._text(token_id), "logprob": finite_logprob(logprob)}

    def _text(self, token_id: int) -> str:
        return self._codec.token_bytes(token_id).decode(errors="replace")


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
