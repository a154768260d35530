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

import gguf
import numpy as np

from trichord import TrichordError, WeightFormat
from trichord.quantize import quantize_blocks

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


def weight_format(mix: str, name: str) -> WeightFormat:
    """The format that `mix` gives the tensor `name`."""
    return WeightFormat[mix]


def write_synthetic_model(path: Path, shape_name: str, mix: str, seed: int = 0) -> Path:
    """Writes the model; `mix` names the formats of its tensors. Raises TrichordError for a name that is unknown."""
    shape = SHAPES[shape_name]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"synthetic {shape_name} {mix}")
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
    matrices = shape.matrices()
    formats = {name: weight_format(mix, name) for name in matrices}
    for name, (rows, columns) in matrices.items():
        size = (rows, formats[name].row_bytes(columns))
        raw_type = gguf.GGMLQuantizationType(formats[name].ggml_id)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), rows * size[1], raw_type)
    for name in shape.norms():
        writer.add_tensor_info(name, (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools: dict[tuple[WeightFormat, int], np.ndarray] = {}
    for name, (rows, columns) in matrices.items():
        key = (formats[name], columns)
        if key not in pools:
            values = rng.standard_normal((POOL_ROWS, columns)) * columns**-0.5
            pools[key] = quantize_blocks(values.astype(np.float32), formats[name])
        writer.write_tensor_data(pools[key][rng.integers(POOL_ROWS, size=rows)])
    for _ in shape.norms():
        writer.write_tensor_data(np.ones(shape.hidden, np.float32))
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary: three control tokens, the bytes, and words that no text contains."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    words = size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"▁word{number}" for number in range(words)])
    writer.add_token_scores([0.0] * len(tokens) + [-float(number) for number in range(words)])
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * words)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a GGUF with the shape of a known model and random weights, for benchmarks.",
    )
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("mix", metavar="MIX", help="formats of the tensors: Q4_K_M, Q8_0, Q6_K, Q4_0, F16, ...")
    parser.add_argument("output", type=Path, metavar="FILE.gguf", help="the file to write")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: %(default)s)")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        write_synthetic_model(options.output, options.shape, options.mix, options.seed)
    except TrichordError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    size = options.output.stat().st_size
    print(f"{options.output}: {size / 2**20:.1f} MiB in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
