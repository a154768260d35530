"""Writes a GGUF with the shape of a known model and random weights: all that a benchmark needs of a model.

    python scripts/synthetic_model.py tinyllama-1.1b Q4_K_M /tmp/tinyllama-1.1b-Q4_K_M.gguf

Speed depends on shapes and formats, not on what the weights say. So only a few hundred rows are drawn and quantized
for each format and width, at the scale of trained weights, and every tensor picks its rows among them: a file of
gigabytes takes seconds. The vocabulary is made up, but complete: ids, scores, byte tokens, so that other programs load
the file too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from trichord import TrichordError, WeightFormat
from trichord.errors import RequestError
from trichord.gguf_file import TensorInfo
from trichord.quantize import quantize_blocks
from trichord.quantize_mix import MIXES, Mix, choose_formats, mix_by_name

POOL_ROWS = 256


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int
    rope_base: float = 10000.0

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every weight matrix by name: (out_features, in_features)."""
        key_value = self.hidden // self.heads * self.kv_heads
        layer = {
            "attn_q": (self.hidden, self.hidden),
            "attn_k": (key_value, self.hidden),
            "attn_v": (key_value, self.hidden),
            "attn_output": (self.hidden, self.hidden),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": (self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }
        vocabulary = (self.vocabulary, self.hidden)
        blocks = {f"blk.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in layer.items()}
        return {"token_embd.weight": vocabulary, **blocks, "output.weight": vocabulary}

    def norms(self) -> list[str]:
        """The name of every norm's gain, a vector of `hidden`."""
        layers = [f"blk.{i}.{name}_norm.weight" for i in range(self.layers) for name in ("attn", "ffn")]
        return [*layers, "output_norm.weight"]


SHAPES = {
    "tiny": Shape(2, 256, 4, 2, 512, 512, 1024),
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 5632, 32000, 2048),
    "llama-3-8b": Shape(32, 4096, 32, 8, 14336, 128256, 8192, 500000.0),
}


@dataclass(frozen=True)
class _Outline:
    """What the rules of a mix read of a file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, kind: type, default: Any) -> Any:
        return self.metadata.get(key, default)


def tensor_formats(shape: Shape, mix: Mix) -> dict[str, WeightFormat]:
    """The format of every matrix, by the rules of `trichord quantize`."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": shape.layers,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
    }
    tensors = {
        name: TensorInfo(name, size, WeightFormat.F32, nbytes=0, offset=0, part=0)
        for name, size in shape.matrices().items()
    }
    return choose_formats(_Outline(metadata, tensors), mix)


def write_synthetic_model(path: Path, shape_name: str, mix_name: str, seed: int = 0) -> None:
    """Writes the model, architecture `llama`. Raises RequestError for a shape or mix that is unknown."""
    if shape_name not in SHAPES:
        raise RequestError(f"{shape_name!r} is not a shape; there are {', '.join(SHAPES)}")
    shape, mix = SHAPES[shape_name], mix_by_name(mix_name)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"synthetic {shape_name} {mix_name.upper()}")
    writer.add_file_type(mix.file_type)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    _add_vocabulary(writer, shape.vocabulary)
    matrices, formats = shape.matrices(), tensor_formats(shape, mix)
    for name, (rows, columns) in matrices.items():
        row_bytes = formats[name].row_bytes(columns)
        raw_type = gguf.GGMLQuantizationType(formats[name].ggml_id)
        writer.add_tensor_info(name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_type)
    for name in shape.norms():
        writer.add_tensor_info(name, (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools: dict[tuple[WeightFormat, int], np.ndarray] = {}
    for name, (rows, columns) in matrices.items():
        kind = (formats[name], columns)
        if kind not in pools:
            values = rng.standard_normal((POOL_ROWS, columns)) * columns**-0.5
            pools[kind] = quantize_blocks(values.astype(np.float32), formats[name])
        writer.write_tensor_data(pools[kind][rng.integers(POOL_ROWS, size=rows)])
    for _ in shape.norms():
        writer.write_tensor_data(np.ones(shape.hidden, np.float32))
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary: three special tokens, the bytes, the space, and words that no text contains."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    tokens += [f"▁word{number}" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(token) for token in range(size)])
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * (size - len(types)))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a GGUF with the shape of a known model and random weights, for benchmarks.",
        epilog=f"Mixes: {', '.join(MIXES)}.",
    )
    parser.add_argument("shape", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("mix", metavar="MIX", help="formats of the tensors, as `trichord quantize` names them")
    parser.add_argument("output", type=Path, metavar="FILE.gguf", help="the file to write")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: %(default)s)")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        write_synthetic_model(options.output, options.shape, options.mix, options.seed)
    except (TrichordError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    size = options.output.stat().st_size
    print(f"{options.output}: {size / 2**20:.1f} MiB in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
