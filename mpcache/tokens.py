"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from mpcache.errors import ModelError, MpcacheError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that stands for one raw byte (byte fallback)


class Tokenizer:
    """A model's tokenizer.json.

    vocab: rows of the model's embedding; bos_id: its beginning-of-sequence token, or None;
    digest: sha256, in hex, of the file; parties compare it, since ids mean nothing without it.
    """

    def __init__(self, inner: tokenizers.Tokenizer, vocab: int, bos_id: int | None, digest: str = "") -> None:
        inner.no_truncation()  # a file may ask for both; a context is never cut or padded unseen
        inner.no_padding()
        self._inner = inner
        self.vocab, self.bos_id, self.digest = vocab, bos_id, digest

    @staticmethod
    def load(folder: Path | str, vocab: int, bos_id: int | None) -> Tokenizer:
        """Reads `folder`/tokenizer.json. Raises ModelError."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder}: no tokenizer.json in it; save the fast tokenizer of the model there")
        try:
            content = file.read_bytes()
            inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except MpcacheError:
            raise  # a stop signal's, which may come at any time
        except Exception as error:  # the library raises bare Exceptions
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{file}: cannot be read as a tokenizer: {reason}") from error
        return Tokenizer(inner, vocab, bos_id, hashlib.sha256(content).hexdigest())

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own post-processor starts a text with the BOS token."""
        return self.bos_id is not None and self.bos_id in self._inner.encode("").ids[:1]

    def encode(self, text: str, bos: bool) -> list[int]:
        """Token ids of `text`, with the BOS token before them iff `bos` (if the model has one).

        Exactly one BOS: a text that begins with its spelling gets no second. Raises ModelError for
        a token that the model has no embedding for, or a text that is not Unicode.
        """
        try:
            ids = self._inner.encode(text, add_special_tokens=False).ids
        except MpcacheError:
            raise  # a stop signal's, as above
        except Exception as error:  # lone surrogates, and whatever else the library cannot take
            raise ModelError(f"the text cannot be tokenized: {' '.join(str(error).split())[:300]}") from error
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if ids and max(ids) >= self.vocab:
            limit = f"beyond the model's {self.vocab} tokens"
            raise ModelError(f"the text holds token {max(ids)}, {limit}; use the model's own tokenizer.json")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder for tokens that come one at a time."""
        return TextStream(self)

    def _may_change(self, ids: Sequence[int], text: str) -> bool:
        """Whether the end of `text` depends on what follows: a character whose bytes are not all there.

        A run of byte tokens is decoded as a whole, and one bad byte spoils all of it, so it waits for
        the token that ends it.
        """
        return text.endswith("\ufffd") or _BYTE.fullmatch(self._inner.id_to_token(ids[-1]) or "") is not None


class TextStream:
    """Token ids in, text out; all that comes out joins up to `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters given out

    def push(self, token: int) -> str:
        """The text that `token` settles: often its own, sometimes none yet."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        return "" if self._tokenizer._may_change(self._ids, text) else self._rest(text)

    def end(self) -> str:
        """What was held back."""
        return self._rest(self._tokenizer.decode(self._ids))

    def _rest(self, text: str) -> str:
        # Decoding is done over all ids each time: what a token looks like depends on those before it.
        rest, self._shown = text[self._shown :], max(self._shown, len(text))
        return rest
