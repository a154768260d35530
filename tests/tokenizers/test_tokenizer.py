"""Tokenizers against llama.cpp's ids, against slow references of the algorithms, and against damaged vocabularies."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from support import parity
from tokenizers import models, normalizers, pre_tokenizers
from vocabulary_files import (
    BYTE,
    CONTROL,
    NORMAL,
    SPM_TOKENS,
    UNUSED,
    USER_DEFINED,
    bpe_tokens,
    merged_by_pairs,
    random_text,
    tokenizer,
)

from trichord.errors import RequestError, TokenizerError
from trichord.gguf_file import GGUFFile
from trichord.tokenizers import Tokenizer
from trichord.tokenizers import cache as word_cache
from trichord.tokenizers.cache import WordCache
from trichord.tokenizers.pre_tokenizers import PRE_TOKENIZERS

VOCABULARIES = ["llama-spm", "phi-3", "gpt-2", "llama-bpe", "falcon", "mpt", "starcoder", "qwen2", "deepseek-coder"]
WORDPIECE = "bert-bge"  # loses case and white space


def golden(name: str) -> list[tuple[str, list[int]]]:
    texts = parity(f"tokenizers/ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = parity(f"tokenizers/ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


# Llama.cpp's ids


@pytest.mark.parametrize("name", [*VOCABULARIES, WORDPIECE])
def test_every_golden_line(name: str) -> None:
    lines = golden(name)
    assert len(lines) > 40
    for text, ids in lines:
        assert tokenizer(name).encode(text, add_special=False) == ids, text
        assert name == WORDPIECE or tokenizer(name).decode(ids) == text


# SentencePiece


def merged_slowly(text: str, scores: dict[str, float]) -> list[str]:
    """The definition: over and over, the best pair of all, the leftmost of the best."""
    symbols = list(text)
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        best = max((scores[pair] for pair in pairs if pair in scores), default=None)
        if best is None:
            return symbols
        place = next(index for index, pair in enumerate(pairs) if scores.get(pair) == best)
        symbols[place : place + 2] = [pairs[place]]


def encoded_slowly(text: str, tokens: list[tuple[str, float, int]], prefix: str) -> list[int]:
    mergeable = {piece: score for piece, score, kind in tokens if kind in (NORMAL, USER_DEFINED, UNUSED)}
    ids = {piece: index for index, (piece, _, _) in enumerate(tokens)}
    out = []
    for symbol in merged_slowly((prefix + text).replace(" ", "▁"), mergeable):
        if symbol in mergeable:
            out.append(ids[symbol])
        else:
            out += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


@cache
def llama_tokens() -> list[tuple[str, float, int]]:
    metadata = GGUFFile(parity("tokenizers/ggml-vocab-llama-spm.gguf")).metadata
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_sentencepiece_merges_by_score(seed: int) -> None:
    text = random_text(random.Random(seed), 25)
    ids = encoded_slowly(text, llama_tokens(), " ")
    assert tokenizer("llama-spm").encode(text, add_special=False) == ids
    assert tokenizer("llama-spm").decode(ids) == text.replace("▁", " ")  # the one character the vocabulary lacks


@pytest.mark.parametrize("seed", range(30))
def test_sentencepiece_with_ties_and_inner_spaces(load, seed: int) -> None:
    # Tokens of a few letters and few scores, so that most merges are ties and many cross a space.
    draw = random.Random(seed)
    pieces = {"".join(draw.choices("▁abcd", k=draw.randint(2, 5))) for _ in range(60)}
    tokens = SPM_TOKENS + [(piece, -float(draw.randint(1, 4)), NORMAL) for piece in sorted(pieces)]
    own = load(tokens, add_space_prefix=bool(seed % 2))
    for _ in range(20):
        text = "".join(draw.choices(" abcdé", k=draw.randint(1, 40)))
        assert own.encode(text, add_special=False) == encoded_slowly(text, tokens, " " * (seed % 2)), text


def test_equal_scores_merge_leftmost_first(load) -> None:
    # "aaa" can be a|aa or aa|a; by any fixed order of pairs one of these texts would go wrong.
    own = load([*SPM_TOKENS, ("aa", -1.0, NORMAL), ("ab", -1.0, NORMAL), ("ba", -1.0, NORMAL)], add_space_prefix=False)
    for text, pieces in {"aab": ["aa", "b"], "bab": ["ba", "b"], "abab": ["ab", "ab"], "baab": ["ba", "ab"]}.items():
        assert [own.piece(token) for token in own.encode(text, add_special=False)] == pieces


def test_text_does_not_forge_control_or_byte_tokens(load) -> None:
    own = load([*SPM_TOKENS, ("</", -1.0, NORMAL), ("s>", -1.0, NORMAL), ("<0", -1.0, NORMAL), ("x4", -1.0, NORMAL)])
    assert [own.piece(token) for token in own.encode("</s>", add_special=False)] == ["▁", "</", "s>"]
    assert own.encode("</s>", add_special=False, parse_special=True) == [2]
    assert own.decode(own.encode("<0x41>")) == "<0x41>"


def test_bytes_stand_in_for_missing_characters(load) -> None:
    own = load(SPM_TOKENS, add_space_prefix=False)
    assert [own.piece(token) for token in own.encode("añ\0", add_special=False)] == ["a", "<0xC3>", "<0xB1>", "<0x00>"]
    without_bytes = load([token for token in SPM_TOKENS if token[2] != BYTE], add_space_prefix=False)
    assert [without_bytes.piece(token) for token in without_bytes.encode("añ", add_special=False)] == ["a", "<unk>"]


def test_a_long_word_is_not_quadratic() -> None:
    text = "".join(random.Random(0).choices("abcdefgh", k=150_000))
    ids = tokenizer("llama-spm").encode(text)
    assert tokenizer("llama-spm").decode(ids) == text


# Byte-level BPE


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
def test_bpe_merges_by_rank(name: str, seed: int) -> None:
    file = GGUFFile(parity(f"tokenizers/ggml-vocab-{name}.gguf"))
    ids = {text: token for token, text in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    merges = merge_scores(name)
    letters = byte_letters()
    text = random_text(random.Random(seed), 40)
    expected = []
    for word in PRE_TOKENIZERS[name].split(text):
        spelled = "".join(letters[byte] for byte in word.encode())
        if name == "llama-bpe" and spelled in ids:
            expected.append(ids[spelled])
        else:
            expected += [ids[symbol] for symbol in merged_by_pairs(spelled, merges)]
    assert tokenizer(name).encode(text, add_special=False) == expected
    assert tokenizer(name).decode(expected) == text


@cache
def merge_scores(name: str) -> dict[tuple[str, str], int]:
    merges = GGUFFile(parity(f"tokenizers/ggml-vocab-{name}.gguf")).metadata["tokenizer.ggml.merges"]
    return {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}


def byte_letters() -> list[str]:
    """The alphabet as the GPT-2 paper's code has it, worked out anew."""
    kept = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
    rest = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + rest.index(byte)) for byte in range(256)]


def test_a_whole_word_beats_the_merges(load) -> None:
    tokens = bpe_tokens("ab", "bc", "abc")
    merges = {"model": "gpt2", "merges": ["b c", "a b"]}
    with_merges, whole = load(tokens, pre="gpt-2", **merges), load(tokens, pre="llama3", bos_token_id=0, **merges)
    assert [with_merges.piece(token) for token in with_merges.encode("abc", add_special=False)] == ["a", "bc"]
    assert [whole.piece(token) for token in whole.encode("abc", add_special=False)] == ["abc"]


def test_a_whole_word_is_no_control_token(load) -> None:
    own = load([*bpe_tokens("ab"), ("stop", 0.0, CONTROL)], model="gpt2", merges=["a b"], pre="llama3")
    assert [own.piece(token) for token in own.encode("stop")] == list("stop")
    assert [own.piece(token) for token in own.encode("stop", parse_special=True)] == ["stop"]


def test_bytes_without_a_token_are_left_out(load) -> None:
    own = load([("a", 0.0, NORMAL), ("b", 0.0, NORMAL), ("ab", 0.0, NORMAL)], model="gpt2", merges=["a b"], pre="gpt-2")
    assert own.encode("ab!b") == [2, 1]


@pytest.mark.parametrize("pre", ["a-new-one", None])
def test_an_unknown_pre_tokenizer_warns_once_and_is_the_default(load, pre: str | None) -> None:
    with pytest.warns(UserWarning, match="a-new-one" if pre else "names no pre-tokenizer") as caught:
        own = load(bpe_tokens("ab"), model="gpt2", merges=["a b"], pre=pre)
    assert len(caught) == 1
    assert [own.piece(token) for token in own.encode("ab.1234")] == ["ab", ".", "1", "2", "3", "4"]


# WordPiece


@pytest.mark.parametrize("seed", range(20))
def test_wordpiece_like_the_tokenizers_library(seed: int) -> None:
    pieces = GGUFFile(parity(f"tokenizers/ggml-vocab-{WORDPIECE}.gguf")).metadata["tokenizer.ggml.tokens"]
    words = {berts_own(piece): token for token, piece in enumerate(pieces)}
    oracle = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]", max_input_chars_per_word=1000))
    oracle.normalizer = normalizers.BertNormalizer()
    oracle.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text = random_text(random.Random(seed), 80).replace("▁", "")
    assert tokenizer(WORDPIECE).encode(text, add_special=False) == oracle.encode(text, add_special_tokens=False).ids


def berts_own(piece: str) -> str:
    """What BERT's own files write for what GGUF files write."""
    if piece.startswith("▁"):
        return piece[1:]
    return piece if piece.startswith("[") and piece.endswith("]") else f"##{piece}"


def test_wordpiece_stands_between_its_marks() -> None:
    own = tokenizer(WORDPIECE)
    ids = own.encode("Hello, wörld!")
    assert [own.piece(token) for token in ids] == ["[CLS]", "▁hello", "▁,", "▁world", "▁!", "[SEP]"]
    assert own.decode(ids) == "hello , world !"


# What users and files get wrong


@pytest.mark.parametrize("token", [-1, 32000, 10**20])
@pytest.mark.parametrize("call", ["decode", "detokenizer", "token_bytes", "piece"])
def test_ids_outside_the_vocabulary(call: str, token: int) -> None:
    own = tokenizer("llama-spm")
    calls = {"decode": lambda: own.decode([1, token]), "detokenizer": lambda: own.detokenizer().add(token)}
    with pytest.raises(TokenizerError, match=rf"token id {token} is outside the vocabulary of 32000 tokens"):
        calls.get(call, lambda: getattr(own, call)(token))()


def test_ids_may_be_any_integers_and_nothing_else() -> None:
    own = tokenizer("llama-spm")
    assert own.decode(np.array([1, 15043], np.int32)) == "Hello"
    for token in (1.0, "1", None):
        with pytest.raises(TokenizerError, match="an integer"):
            own.decode([token])


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe"])
def test_odd_texts(name: str) -> None:
    own = tokenizer(name)
    assert own.decode(own.encode("a\0b\0")) == "a\0b\0"
    with pytest.raises(TokenizerError, match=r"lone surrogate, U\+D800, at index 3"):
        own.encode("abc\ud800")
    with pytest.raises(RequestError, match="bytes"):
        own.encode(b"abc")


GOOD_BPE = {"model": "gpt2", "merges": ["a b"], "pre": "gpt-2"}


@pytest.mark.parametrize(
    ("tokens", "keys", "says"),
    [
        (SPM_TOKENS, {"model": None}, "no tokenizer that can be used; give token ids"),
        (SPM_TOKENS, {"model": "no_vocab"}, "no tokenizer that can be used; give token ids"),
        (SPM_TOKENS, {"model": "none"}, "no tokenizer that can be used; give token ids"),
        (SPM_TOKENS, {"model": "test"}, "no tokenizer that can be used; give token ids"),
        (SPM_TOKENS, {"model": "magic"}, r"'magic' is not supported \(llama, gpt2, .* are\)"),
        (SPM_TOKENS, {"model": 5}, "tokenizer.ggml.model"),
        ([], {}, "'tokenizer.ggml.tokens'.* is missing or empty"),
        ([], GOOD_BPE, "'tokenizer.ggml.tokens'.* is missing or empty"),
        (SPM_TOKENS, {"tokens": [1, 2, 3]}, "'tokenizer.ggml.tokens' is not an array of strings"),
        (SPM_TOKENS, {"tokens": "abc"}, "tokenizer.ggml.tokens"),
        (SPM_TOKENS, {"scores": None}, "'tokenizer.ggml.scores' is missing"),
        (SPM_TOKENS, {"scores": [1.0, 2.0]}, "'tokenizer.ggml.scores' has 2 entries for a vocabulary of"),
        (SPM_TOKENS, {"scores": ["1"]}, "'tokenizer.ggml.scores' is not an array of numbers"),
        (SPM_TOKENS, {"scores": [0.0] * (len(SPM_TOKENS) - 1) + [float("nan")]}, "score of token .* is not a number"),
        (SPM_TOKENS, {"token_type": [1]}, "'tokenizer.ggml.token_type' has 1 entries"),
        ([*SPM_TOKENS, SPM_TOKENS[-1]], {}, "are both '4'"),
        (SPM_TOKENS, {"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
        (SPM_TOKENS, {"add_bos_token": True, "bos_token_id": 0xFFFFFFFF}, "add_bos_token is true, but"),
        (SPM_TOKENS, {"add_eos_token": True, "eos_token_id": 0xFFFFFFFF}, "add_eos_token is true, but"),
        (SPM_TOKENS, {"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": None}, "'tokenizer.ggml.merges' is missing"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": ["ab"]}, "merge 'ab' is not two tokens"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": ["a b c", "ab"]}, "merge 'a b c' is not two tokens"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": ["a b", "a c"]}, "merge 'a c' needs the token 'ac'"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": ["a b", "ab zz"]}, "merge 'ab zz' needs the token 'zz'"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": ["a b", "ab ab"]}, "merge 'ab ab' needs the token 'abab'"),
        (bpe_tokens("ab"), {**GOOD_BPE, "merges": [1, 2]}, "'tokenizer.ggml.merges' is not an array of strings"),
        (bpe_tokens("ab"), {**GOOD_BPE, "pre": 3}, "tokenizer.ggml.pre"),
    ],
)
def test_unusable_vocabularies(load, tokens: list, keys: dict, says: str) -> None:
    with pytest.raises(TokenizerError, match=says) as caught:
        load(tokens, **keys)
    message = str(caught.value)
    assert message.startswith("model.gguf: ") and "\n" not in message and len(message) < 400


def test_a_special_id_outside_the_vocabulary_is_ignored_with_a_warning(load) -> None:
    with pytest.warns(UserWarning, match="eos_token_id is 99999, outside the vocabulary"):
        assert load(SPM_TOKENS, eos_token_id=99999).eos_id is None


def test_tokens_without_text_or_type(load) -> None:
    own = load([*SPM_TOKENS, ("", 0.0, USER_DEFINED), ("", 0.0, NORMAL)], token_type=None, add_space_prefix=False)
    assert own.encode("ab", add_special=False) == [own.token_id("a"), own.token_id("b")]
    assert own.decode([own.n_vocab - 1]) == ""
    own = load([*SPM_TOKENS, ("", 0.0, USER_DEFINED), ("odd", 0.0, 77)])
    assert own.decode(own.encode("ab")) == "ab"
    assert own.decode([own.n_vocab - 1]) == ""  # of no kind that stands for text


# The whole


def test_several_threads_at_once() -> None:
    own = Tokenizer.from_gguf(GGUFFile(parity("tokenizers/ggml-vocab-llama-spm.gguf")))
    texts = [random_text(random.Random(seed), 60) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(own.encode, texts * 2))
        assert list(pool.map(own.decode, ids)) == [text.replace("▁", " ") for text in texts * 2]
    assert ids == [tokenizer("llama-spm").encode(text) for text in texts] * 2


def test_the_word_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_WORDS", 10)
    words = WordCache(lambda word: [len(word)])
    assert words.encode(f"{'x' * (index % 100)}{index}" for index in range(1000)) == [
        len(f"{'x' * (index % 100)}{index}") for index in range(1000)
    ]
    assert len(words) <= 10
    assert max(map(len, words)) <= word_cache.MAX_LENGTH


def test_importing_needs_no_torch() -> None:
    code = "import sys, trichord.tokenizers, trichord.chat_template; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
