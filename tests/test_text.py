"""Text as it comes: whole characters only, stop strings cut exactly, wherever tokens end."""

import random
from pathlib import Path

import pytest

from server.text import StopRule, TextCodec
from tests.tiny_folder import CORPUS, tiny_tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return TextCodec(folder)


def streamed(codec: TextCodec, ids: list[int], rule: StopRule) -> tuple[str, bool]:
    stream = codec.stream(codec.encode("A prompt:"), rule)
    out = ""
    for token_id in ids:
        text, is_stopped = stream.push(token_id)
        assert "\ufffd" not in text
        out += text
        if is_stopped:
            return out, True
    return out + stream.finish(), False


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_text_ends_at_the_first_stop_string(codec: TextCodec, is_kept: bool) -> None:
    rng = random.Random(random.randrange(1 << 30))
    for _ in range(300):
        text = rng.choice(CORPUS)
        ids = codec.encode(text)
        stops = []
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(text))
            stops.append(text[start : start + rng.randrange(1, 6)] if rng.random() < 0.8 else "never there")
        got, is_stopped = streamed(codec, ids, StopRule(tuple(stops), is_kept=is_kept))
        found = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
        end, begin = min(found, default=(len(text), len(text)))
        assert got == text[: end if is_kept else begin], (text, stops)
        assert is_stopped == bool(found)


def test_what_looks_like_a_stop_string_is_held_back_and_shown_when_it_is_none(codec: TextCodec) -> None:
    stream = codec.stream([], StopRule(("END",), is_kept=False))
    shown = [stream.push(token_id)[0] for token_id in codec.encode("x EN EN")]
    assert "EN" not in shown[-1]
    assert "".join(shown) + stream.finish() == "x EN EN"


def test_stop_strings_count_from_min_tokens_on(codec: TextCodec) -> None:
    ids = codec.encode("ababab") * 3
    got, is_stopped = streamed(codec, ids, StopRule(("b",), is_kept=False, min_tokens=5))
    assert is_stopped
    assert got.count("b") >= 2
    assert streamed(codec, ids, StopRule(("b",), is_kept=False))[0] == "a"


def test_the_bytes_of_tokens_add_up(codec: TextCodec) -> None:
    for text in CORPUS:
        assert b"".join(map(codec.token_bytes, codec.encode(text))).decode() == text


def test_every_tokens_bytes_are_those_of_its_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path, vocab_size=len(tokenizer), eos_token_ids=frozenset({2}))
    assert codec.trie is not None
    for token_id in range(len(tokenizer)):
        if not codec.is_special(token_id):
            assert codec.token_bytes(token_id).decode(errors="replace") == tokenizer.decode([token_id])
