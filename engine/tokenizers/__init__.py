"""Every kind of tokenizer that a GGUF file may hold, built from the file's own vocabulary."""

from trichord.tokenizers.tokenizer import Tokenizer as Tokenizer
