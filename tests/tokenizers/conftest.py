from __future__ import annotations

from pathlib import Path

import pytest
from vocabulary_files import write

from trichord.gguf_file import GGUFFile
from trichord.tokenizers import Tokenizer


@pytest.fixture
def load(tmp_path: Path):
    return lambda *arguments, **keys: Tokenizer.from_gguf(GGUFFile(write(tmp_path / "model.gguf", *arguments, **keys)))
