"""Turn text into token ids and back, over the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tokenizers

from mpcache.errors import BadInput, ModelError, MpcacheError
from mpcache.model.chat_template import ChatTemplate
from mpcache.model.checks import read_small_file
from mpcache.silence import silent_stderr

_TRIED = 16  # characters for each token that fits: where a text has more, its beginning is counted first
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that stands for one raw byte (byte fallback)


class LibraryError(Exception):
    """Every error of the `tokenizers` library about bad input, in one kind."""


@contextmanager
def in_library() -> Iterator[None]:
    """Raise LibraryError for what the library raises.

    Its own errors are bare Exceptions; a panic of its Rust code is not even that.
    """
    try:
        yield
    except MpcacheError:
        raise  # a stop signal's, which may come at any time
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise LibraryError(" ".join(str(error).split())[:300]) from error
        raise


def parse_tokenizer(content: bytes) -> tokenizers.Tokenizer:
    """Parse the bytes of a tokenizer.json. Raises LibraryError."""
    with in_library(), silent_stderr():  # a panic writes there about itself before it is caught
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))


class Tokenizer:
    """A model's tokenizer.

    vocab: rows of the model's embedding; bos_id: its beginning-of-sequence token, or None;
    content: the bytes of its tokenizer.json, which is public;
    chat_template: what frames a conversation, if the model came with one.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        vocab: int,
        bos_id: int | None,
        content: bytes = b"",
        chat_template: ChatTemplate | None = None,
    ) -> None:
        inner.no_truncation()  # a file may ask for both; a context is never cut or padded unseen
        inner.no_padding()
        self._inner = inner
        self.vocab, self.bos_id, self.content, self.chat_template = vocab, bos_id, content, chat_template

    @staticmethod
    def load(
        folder: Path | str, vocab: int, bos_id: int | None, chat_template: ChatTemplate | None = None
    ) -> Tokenizer:
        """Read `folder`/tokenizer.json. Raises ModelError."""
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder}: no tokenizer.json in it; save the fast tokenizer of the model there")
        try:
            content = read_small_file(file)
            inner = parse_tokenizer(content)
        except (OSError, ValueError, LibraryError) as error:
            raise ModelError(f"{file}: cannot be read as a tokenizer: {error}") from error
        return Tokenizer(inner, vocab, bos_id, content, chat_template)

    @cached_property
    def digest(self) -> str:
        """The sha256, in hex, of its content; parties compare it, since ids mean nothing without it."""
        return hashlib.sha256(self.content).hexdigest()

    def token(self, token_id: int | None) -> str | None:
        """Return how a token is spelled, as a chat template names it; None for none."""
        return None if token_id is None else self._inner.id_to_token(token_id)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own post-processor starts a text with the BOS token."""
        return self.bos_id is not None and self.bos_id in self._begins()[:1]

    def _begins(self) -> list[int]:
        """Return the tokens that the tokenizer's own post-processor puts before a text."""
        try:
            with in_library():
                encoded = self._inner.encode("a")
        except LibraryError as error:
            raise ModelError(f"the tokenizer cannot begin a text: {error}") from error
        added = encoded.special_tokens_mask
        return list(encoded.ids[: added.index(0) if 0 in added else len(added)])

    @property
    def added(self) -> dict[str, tuple[int, bool]]:
        """The tokens that are found in a text as they are spelled: their ids, and whether each is special."""
        found = self._inner.get_added_tokens_decoder()
        return {token.content: (number, token.special) for number, token in found.items()}

    def respelled(self, names: Mapping[str, str]) -> Tokenizer:
        """Return this tokenizer with other spellings for some of its added tokens, under the same ids.

        What spelled them before is then text like any other, which nothing joins to one of these tokens.
        Raises ModelError.
        """
        try:
            with in_library(), silent_stderr():
                tree = json.loads(self._inner.to_str())
                for token in tree["added_tokens"]:
                    token["content"] = names.get(token["content"], token["content"])
                model = tree["model"]
                if isinstance(words := model["vocab"], dict):
                    model["vocab"] = {names.get(word, word): number for word, number in words.items()}
                else:
                    model["vocab"] = [[names.get(word, word), score] for word, score in words]
                if "merges" in model:
                    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
                    model["merges"] = [p for p in pairs if not {*p, "".join(p)} & names.keys()]
                if model.get("unk_token") in names:
                    model["unk_token"] = names[model["unk_token"]]
                inner = tokenizers.Tokenizer.from_str(json.dumps(tree | {"post_processor": None}))
        except (LibraryError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the tokenizer's special tokens cannot be told from text: {error}") from error
        return Tokenizer(inner, self.vocab, self.bos_id, self.content)

    def encode_within(self, text: str, bos: bool, most: int, what: str) -> list[int]:
        """Encode a text of at most `most` tokens. Raises BadInput, which names it `what`; see `encode`.

        A text that is far longer is refused by its beginning, so that its length costs nothing.
        """
        size = _TRIED * (most + 1)
        while size < len(text):
            # A token's length in the beginning may differ where it was cut, and nowhere else by much.
            if len(self.encode(text[:size], bos)) > most + most // 8 + 8:
                raise BadInput(f"{what} has more than {most} tokens, the model allows {most}; shorten it")
            size *= 2
        ids = self.encode(text, bos)
        if len(ids) > most:
            raise BadInput(f"{what} has {len(ids)} tokens, the model allows {most}; shorten it")
        return ids

    def encode(self, text: str, bos: bool) -> list[int]:
        """Encode `text` as token ids; iff `bos`, a text begins as the tokenizer's post-processor says.

        There is exactly one BOS: a text that begins with its spelling gets no second. Raises ModelError
        for a token that the model has no embedding for, or a text that is not Unicode.
        """
        ids = self._encoded(text).ids
        first = self._begins() if bos else []
        return ids if ids[: len(first)] == first else first + ids

    def count_within(self, text: str, end: int) -> int:
        """Return how many of a text's tokens hold nothing but some of its first `end` characters."""
        return sum(until <= end for _, until in self._encoded(text).offsets)

    def _encoded(self, text: str) -> tokenizers.Encoding:
        try:
            with in_library():  # lone surrogates, and whatever else it cannot take
                found = self._inner.encode(text, add_special_tokens=False)
        except LibraryError as error:
            raise ModelError(f"the text cannot be tokenized: {error}") from error
        ids = found.ids
        if ids and max(ids) >= self.vocab:
            limit = f"beyond the model's {self.vocab} tokens"
            raise ModelError(f"the text holds token {max(ids)}, {limit}; use the model's own tokenizer.json")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids` to text, special tokens left out; bytes that are no UTF-8 become U+FFFD.

        Raises ModelError.
        """
        try:
            with in_library():
                return self._inner.decode(list(ids), skip_special_tokens=True)
        except LibraryError as error:
            raise ModelError(f"the answer's tokens cannot be decoded: {error}") from error

    def stream(self) -> TextStream:
        """Make a decoder for tokens that come one at a time."""
        return TextStream(self)

    def _may_change(self, ids: Sequence[int], text: str) -> bool:
        """Tell whether the end of `text` depends on what follows: a character whose bytes are not all there.

        A run of byte tokens is decoded as a whole, and one bad byte spoils all of it, so it waits for
        the token that ends it.
        """
        return text.endswith("\ufffd") or _BYTE.fullmatch(self._inner.id_to_token(ids[-1]) or "") is not None


class TextStream:
    """Token ids in, text out.

    All pieces that come out, joined, are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters given out

    def push(self, token: int) -> str:
        """Take a token and return the text that it settles: often its own, sometimes none yet."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        return "" if self._tokenizer._may_change(self._ids, text) else self._rest(text)

    def end(self) -> str:
        """Return the text that was held back."""
        return self._rest(self._tokenizer.decode(self._ids))

    def _rest(self, text: str) -> str:
        # Decoding is done over all ids each time: what a token looks like depends on those before it.
        rest, self._shown = text[self._shown :], max(self._shown, len(text))
        return rest
