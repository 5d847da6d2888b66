"""Single tokens as text and as bytes."""

from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from malora_server.api.tokenizer import Tokenizer


def test_byte_level_tokens(tokenizer: Tokenizer) -> None:
    text = " the fox, 🦊é\n"
    ids = tokenizer.backend.encode(text).ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_text(ids[0]) == " the"
    # Every byte has a token, those included that no valid text holds.
    pieces = [tokenizer.backend.token_to_id(symbol) for symbol in tokenizer._alphabet]
    assert sorted(map(tokenizer.token_bytes, pieces)) == [bytes([byte]) for byte in range(256)]
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.token_text(end) == "<|im_end|>"
    assert tokenizer.token_bytes(end) == b"<|im_end|>"


def test_sentencepiece_tokens_keep_their_space() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = backend.encode("a a€").ids
    assert tokenizer.token_text(ids[1]) == " a"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " a a€".encode()


def test_a_folder_is_loaded_as_transformers_does(pretrained: Any, tmp_path: Any) -> None:
    pretrained.save_pretrained(tmp_path)
    generic = Tokenizer.load(str(tmp_path))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "LlamaTokenizerFast"))
    by_class = Tokenizer.load(str(tmp_path))
    text = "the lazy dog"
    assert generic.backend.encode(text).ids == pretrained.encode(text)
    assert by_class.backend.id_to_token(3) == generic.backend.id_to_token(3)
