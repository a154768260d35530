"""Tokens that stand for one byte each, `<0x00>` to `<0xFF>`: how a text is written for which there are no others."""

from __future__ import annotations

from trichord.tokenizers.vocabulary import Vocabulary


class ByteTokens:
    """The byte tokens of a vocabulary, of which some or all may be missing."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = [vocabulary.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._unknown = [] if vocabulary.unk_id is None else [vocabulary.unk_id]

    def encode(self, piece: str) -> list[int]:
        """The ids of the piece's UTF-8 bytes; the unknown token, if there is one, where one of the bytes has none."""
        ids = [self._ids[byte] for byte in piece.encode()]
        known = [token for token in ids if token is not None]
        return known if len(known) == len(ids) else self._unknown
