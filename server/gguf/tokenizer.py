"""A GGUF file's tokenizer: the one beside it, or that of the file with what transformers leaves out of it.

llama.cpp names the way in which a text is split before its bytes are merged (`tokenizer.ggml.pre`). Which of them
transformers knows depends on its version, and those it does not know it passes over: numbers, for one, would become
other tokens than the model was trained on. So the split is always set here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.errors import InvalidRequestError

__all__ = ["check_saved", "load_tokenizer"]

BESIDE = "tokenizer.json"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama3": LLAMA3, "llama-v3": LLAMA3, "llama-bpe": LLAMA3, "falcon3": LLAMA3, "smaug-bpe": LLAMA3,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "tekken": TEKKEN,
}  # fmt: skip
LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "olmo"})
WITH_DIGITS = frozenset({"smollm"})
# Whose tokens are taken whole where a piece of the text is one, whatever the merges say.
WHOLE_PIECES = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})
STARTED = WHOLE_PIECES - {"tekken"}  # before whose texts llama.cpp puts the start token, unless files say otherwise
COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})  # characters are composed first (NFC)
WHOLE_TOKENS = ("bos", "eos", "eot", "eom")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
PROBE = " It's 12345, or 3.14\n\n  e\u0301 \u65e5\u672c\u8a9e \N{WAVING HAND SIGN}! don't</s> "


def load_tokenizer(file: Path, metadata: Mapping[str, Any], max_length: int) -> Any:
    """The tokenizer of `tokenizer.json` beside the file if there is one, else the file's own.

    Args:
        metadata: of the file.
        max_length: longest sequence of the model, in tokens.

    Raises:
        InvalidRequestError: code `model_unsupported`, it is of a kind that is not read right; says what to do.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415 - seconds to import

    options: dict[str, Any] = {"local_files_only": True, "model_max_length": max_length}
    if (file.parent / BESIDE).is_file():
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **options)
        tokenizer.chat_template = tokenizer.chat_template or metadata.get("tokenizer.chat_template")
        return tokenizer
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "llama":
        if (
            not metadata.get("tokenizer.ggml.add_space_prefix", True)
            and "gemma" not in metadata["general.architecture"]
        ):
            raise _refused("adds no space before a text")
    elif kind != "gpt2" or pre not in LIKE_GPT2 | WITH_DIGITS | SPLITS.keys():
        raise _refused(f"is of the kind {kind!r}" if kind != "gpt2" else f"splits texts as {pre!r} does")
    starts = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in STARTED))
    options["add_bos_token"] = starts
    own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **options)
    if kind == "gpt2":
        _set_split(own.backend_tokenizer, str(pre))
    # Without the architecture's class, which would make it anew from the vocabulary when it is loaded.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in own.special_tokens_map.items() if name in SPECIAL_TOKENS},
    )
    tokenizer.chat_template = own.chat_template
    _check_special_tokens(tokenizer, metadata, starts=starts)
    return tokenizer


def check_saved(tokenizer: Any, folder: Path) -> None:
    """Refuse what would be another tokenizer once it is loaded from the folder where it and its model are saved.

    Raises:
        InvalidRequestError: code `model_unsupported`.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = (PROBE, "".join(map(str, tokenizer.special_tokens_map.values())))
    if any(saved(text).input_ids != tokenizer(text).input_ids for text in texts) or len(saved) != len(tokenizer):
        raise _refused("is not that of its architecture")


def _check_special_tokens(tokenizer: Any, metadata: Mapping[str, Any], *, starts: bool) -> None:
    """Refuse what older versions of transformers make of some: no start of a text, pieces of tokens, no spaces."""
    found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in WHOLE_TOKENS}
    ids = [int(token_id) for token_id in found.values() if token_id is not None]
    whole = [tokenizer(tokenizer.convert_ids_to_tokens(i), add_special_tokens=False).input_ids == [i] for i in ids]
    is_started = found["bos"] is not None and tokenizer("a").input_ids[:1] == [found["bos"]]
    has_spaces = tokenizer.decode(tokenizer("a b").input_ids).endswith("a b")
    if not all(whole) or not has_spaces or is_started != starts:
        import transformers  # noqa: PLC0415

        raise _refused(f"has tokens that transformers {transformers.__version__} passes over (5.23 does not)")


def _set_split(backend: Any, pre: str) -> None:
    from tokenizers import Regex, normalizers  # noqa: PLC0415
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split  # noqa: PLC0415

    if pre in SPLITS:
        pieces = Split(Regex(SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        words = ByteLevel(add_prefix_space=False)
        digits = Digits(individual_digits=True)
        backend.pre_tokenizer = Sequence([digits, words]) if pre in WITH_DIGITS else words
    if pre in WHOLE_PIECES:
        backend.model.ignore_merges = True
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()


def _refused(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the file's tokenizer {what}, which is not read right: put the model's own {BESIDE} (and "
        "tokenizer_config.json) beside the GGUF file",
        code="model_unsupported",
    )
