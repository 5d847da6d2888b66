"""Text in pieces equals text at once, whatever the tokens and wherever they are cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from malora_server.engine.detokenizer import IncrementalDetokenizer, StopMatcher, TokenDecoder

CHARACTERS = "ab é€𝄞 "


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Llama 2's shape: bytes for what the vocabulary lacks, a space that the decoder strips."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    scores = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(scores, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTE_LEVEL = _byte_level()
SENTENCEPIECE = _sentencepiece()
token_ids = st.lists(st.integers(0, 255), max_size=160)


def _in_pieces(decoder: TokenDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@given(prompt=st.text(CHARACTERS, max_size=20), ids=token_ids)
def test_any_bytes_decode_as_they_do_at_once(prompt: str, ids: list[int]) -> None:
    context = BYTE_LEVEL.encode(prompt).ids
    pieces = _in_pieces(TokenDecoder(BYTE_LEVEL, context), ids)
    assert prompt + "".join(pieces) == BYTE_LEVEL.decode([*context, *ids])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
@given(text=st.text(CHARACTERS, max_size=60), cut=st.integers(0, 60))
def test_text_is_emitted_character_by_character(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text).ids
    cut = min(cut, len(ids))
    at_once, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
    if "\ufffd" in prompt:
        # Cut inside a character: the rest of it must not be lost.
        assert "".join(_in_pieces(TokenDecoder(tokenizer), ids)) == at_once
        return
    decoder = TokenDecoder(tokenizer, ids[:cut])
    pieces = _in_pieces(decoder, ids[cut:])
    assert prompt + "".join(pieces) == at_once
    assert decoder.length == len("".join(pieces))
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_tokens_comes_whole() -> None:
    ids = BYTE_LEVEL.encode("a𝄞b").ids
    assert _in_pieces(TokenDecoder(BYTE_LEVEL), ids) == ["a", "", "", "", "𝄞", "b", ""]


def test_an_unfinished_character_is_told_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("a€").ids[:-1]
    assert _in_pieces(TokenDecoder(BYTE_LEVEL), ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL.to_str())
    tokenizer.add_special_tokens(["<end>"])
    ids = [*tokenizer.encode("a").ids, tokenizer.token_to_id("<end>")]
    assert "".join(_in_pieces(TokenDecoder(tokenizer), ids)) == "a"
    shown = TokenDecoder(tokenizer, skip_special_tokens=False)
    assert "".join(_in_pieces(shown, ids)) == "a<end>"


def _stopped_at_once(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4, unique=True),
    include=st.booleans(),
)
def test_stop_strings_match_however_the_text_is_cut(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    expected, stop = _stopped_at_once("".join(pieces), stops, include)
    matcher = StopMatcher(stops, include_stop=include)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        # Nothing is shown that a stop string takes back later.
        assert expected.startswith(shown)
        if matcher.matched:
            break
    if not matcher.matched:
        shown += matcher.finish()
    assert (shown, matcher.matched) == (expected, stop)


def test_text_is_not_held_back_longer_than_it_must() -> None:
    matcher = StopMatcher(["STOP"])
    assert [matcher.feed(piece) for piece in ("aS", "T", "Ob", "S")] == ["a", "", "STOb", ""]
    assert matcher.finish() == "S"


@given(text=st.text(CHARACTERS, max_size=40), stop=st.text(CHARACTERS, min_size=1, max_size=3))
def test_a_sequence_ends_at_its_stop_string(text: str, stop: str) -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=[stop])
    shown = ""
    for token in BYTE_LEVEL.encode(text).ids:
        shown += detokenizer.push(token)
        if detokenizer.matched:
            break
    else:
        shown += detokenizer.finish()
    assert shown == text.split(stop)[0]
    assert (detokenizer.matched is not None) == (stop in text)


def test_stop_strings_wait_for_the_least_number_of_tokens() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["b"], min_tokens=2)
    ids = BYTE_LEVEL.encode("abab").ids
    assert [detokenizer.push(token) for token in ids] == ["a", "b", "a", ""]
    assert detokenizer.matched == "b"


def test_the_sentencepiece_tokenizer_is_of_the_kind_it_claims() -> None:
    assert json.loads(SENTENCEPIECE.to_str())["model"]["byte_fallback"] is True
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode("a€ ab").ids) == "a€ ab"
