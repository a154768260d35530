"""How many kernels a decoder layer starts for one token, and the values of what shares a launch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from golden_weights import golden_blocks, packed
from support import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trichord import LLM, triton_kernels
from trichord.triton_kernels.activations import Activations
from trichord.triton_kernels.arrival import counters
from trichord.triton_kernels.formats import FORMATS
from trichord.triton_kernels.gemv import gemv_kernel
from trichord.weight_format import WeightFormat

HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH, VOCABULARY = 256, 4, 2, 64, 512, 40
# The formats of a layer in Q4_K_M's larger half.
FILE_FORMATS = {
    "attn_q": (WeightFormat.Q4_K, HEADS * HEAD, HIDDEN),
    "attn_k": (WeightFormat.Q4_K, KV_HEADS * HEAD, HIDDEN),
    "attn_v": (WeightFormat.Q6_K, KV_HEADS * HEAD, HIDDEN),
    "attn_output": (WeightFormat.Q4_K, HIDDEN, HEADS * HEAD),
    "ffn_gate": (WeightFormat.Q4_K, WIDTH, HIDDEN),
    "ffn_up": (WeightFormat.Q4_K, WIDTH, HIDDEN),
    "ffn_down": (WeightFormat.Q6_K, HIDDEN, WIDTH),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


class Launches(TorchDispatchMode):
    """Counts the kernels that start within: ours by name, torch's by operation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = self.launching = False
        kind = type(gemv_kernel)  # compiled or interpreted
        run = kind.run

        def counted(kernel, *args, **kwargs):
            if self.inside:
                self.counts[kernel.fn.__name__] += 1
            self.launching = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self.launching = False

        monkeypatch.setattr(kind, "run", counted)

    def __enter__(self):
        self.inside = True
        return super().__enter__()

    def __exit__(self, *exception):
        self.inside = False
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        memory = {storage(each) for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        view = not function._schema.is_mutable and any(storage(each) in memory for each in tree_leaves(result))
        if not self.launching and not view and "empty" not in name:
            self.counts[f"torch {name}"] += 1
        return result


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def model(path, layers: int) -> LLM:
    """A Qwen2, which is a Llama with biases of queries, keys and values."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", normal(VOCABULARY, HIDDEN))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
        for name, (weight_format, rows, columns) in FILE_FORMATS.items():
            blocks, _ = golden_blocks(weight_format, rows, columns, seed=layer)
            raw = gguf.GGMLQuantizationType(weight_format.ggml_id)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=raw)
            if name in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{layer}.{name}.bias", normal(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LLM(path, device="cuda", max_sequences=1)


def test_what_a_decoder_layer_launches_for_one_token(tmp_path, monkeypatch):
    counted = []
    for layers in 1, 2:
        llm = model(tmp_path / f"{layers}.gguf", layers)
        launches = Launches(monkeypatch)
        with launches:
            llm.logits([7])
        counted.append(launches.counts)
    assert counted[1] - counted[0] == {
        "norm_kernel": 2,
        "gemv_kernel": 3,  # queries, keys and values; the attention's output; down
        "attention_kernel": 1,  # turns queries and keys, writes the cache, and combines the splits of the context
        "gated_gemv_kernel": 1,  # gate and up, and the activation
    }


def limbs_of(activations: Activations, count: int) -> list[torch.Tensor]:
    assert count in activations._limbs, "rounded by a launch of its own"
    return [part.view(torch.int32) if part.dtype == torch.int8 else part for part in activations.limbs(count)]


@pytest.mark.parametrize(("precision", "count"), [("default", 2), ("fast", 1)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("width", [32, 96, 1056, 8224])
def test_what_is_prepared_is_what_a_product_would_make_of_it(precision, count, tokens, width):
    x = torch.from_numpy(30 * normal(tokens, width))
    gain = torch.from_numpy(normal(width, seed=1))
    for make in (
        lambda **prepare: triton_kernels.norm(x.clone(), gain, 1e-5, x, **prepare),
        lambda **prepare: triton_kernels.norm(x.clone(), gain, 1e-5, bias=gain, centered=True, **prepare),
        lambda **prepare: triton_kernels.activate(x, x.flip(1), "silu", **prepare),
    ):
        prepared, alone = make(prepare=precision), make()
        torch.testing.assert_close(prepared.x, alone, rtol=0, atol=0)
        for part, expected in zip(limbs_of(prepared, count), Activations(alone).limbs(count), strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [64, 96, 80])
def test_attention_prepares_what_a_product_would_make_of_it(size):
    """Two sequences of one token, the contexts split; a head of 80 has no whole groups."""
    q, keys, values = (torch.from_numpy(normal(*shape)) for shape in [(2, 4, 64), (16, 1, 16, 64), (16, 1, 16, size)])
    tables = torch.arange(16, dtype=torch.int32).view(2, 8)
    starts, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([100, 3], dtype=torch.int32)
    paged = q, keys, values, tables, starts, lengths, 1, 0.125, "default"
    prepared, alone = triton_kernels.attention(*paged, prepare=True), triton_kernels.attention(*paged)
    torch.testing.assert_close(prepared.x, alone.flatten(1), rtol=0, atol=0)
    assert bool(prepared._limbs) == (size % 32 == 0)
    for part, expected in zip(prepared.limbs(2), Activations(prepared.x).limbs(2), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.parametrize("formats", [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("F16", "Q8_0"), ("Q5_K",)], ids="-".join)
@pytest.mark.parametrize(("precision", "count"), [("default", 2), ("fast", 1), ("exact", 0)])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 96), (3, 160), (8, 32), (2, 37), (9, 64)])
def test_products_go_through_the_activation_and_are_rounded_in_the_same_launch(
    formats, precision, count, tokens, rows, monkeypatch
):
    weights = [
        replace(packed(triton_kernels, *parts), scale=0.25)
        for parts in ((golden_blocks(f, rows, 256)[0], f, (rows, 256)) for f in map(WeightFormat.__getitem__, formats))
    ]
    x, biases = torch.from_numpy(normal(tokens, 256)), [torch.from_numpy(normal(rows)), None][: len(formats)]
    launches = Launches(monkeypatch)
    for activation in "silu", "swiglu_oai":
        with launches:
            prepared = triton_kernels.activated_matmul(x, weights, precision, activation, biases)
        gate, *up = triton_kernels.matmul(x, weights, precision, biases)
        apart = triton_kernels.activate(gate, up[0] if up else None, activation)
        torch.testing.assert_close(prepared.x, apart, rtol=1e-5, atol=1e-5)
        if rows % 32 == 0 and tokens <= 8 and count:
            for part, expected in zip(limbs_of(prepared, count), Activations(prepared.x).limbs(count), strict=True):
                torch.testing.assert_close(part, expected, rtol=0, atol=0)
    streamed = tokens <= 8 and (precision != "exact" or formats == ("F16",))
    assert ("gated_gemv_kernel" in launches.counts) == streamed
    assert ("activation_kernel" in launches.counts) != streamed


def test_counters_are_zero_again():
    assert not counters(torch.device("cpu")).any()


@pytest.mark.parametrize(("tokens", "width", "precision"), [(9, 64, "default"), (1, 48, "default"), (1, 64, "exact")])
def test_nothing_is_rounded_for_products_that_read_floats(tokens, width, precision):
    x = torch.from_numpy(normal(tokens, width))
    for prepared in (
        triton_kernels.norm(x.clone(), None, 1e-5, prepare=precision),
        triton_kernels.activate(x, None, "relu", prepare=precision),
    ):
        assert not prepared._limbs and len(prepared) == tokens


MIXES = [("Q4_K", "Q4_K", "Q6_K"), ("Q5_K", "Q8_0"), ("IQ4_XS", "F16", "Q3_K"), ("IQ2_S", "IQ3_S", "TQ1_0", "BF16")]


@pytest.mark.parametrize("formats", MIXES, ids="-".join)
@pytest.mark.parametrize(
    ("tokens", "precision", "bound"),
    [(1, "default", 1e-4), (8, "default", 1e-4), (3, "fast", 1.2e-2), (3, "exact", 2e-6), (9, "default", 1e-3)],
)
def test_a_launch_of_several_formats(formats, tokens, precision, bound):
    x, weights, values = normal(tokens, 512), [], []
    for index, name in enumerate(formats):  # rows that end within a tile
        blocks, numbers = golden_blocks(WeightFormat[name], [131, 3, 260, 1][index], 512)
        weights.append(packed(triton_kernels, blocks, WeightFormat[name], numbers.shape))
        values.append(numbers.astype(np.float64))
    products = triton_kernels.matmul(torch.from_numpy(x), weights, precision)
    for y, numbers in zip(products, values, strict=True):
        assert relative_error(y.numpy(), x.astype(np.float64) @ numbers.T) < bound


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("precision", ["exact", "default"])
def test_scales_and_biases_belong_to_the_product(tokens, precision):
    x, weights, biases, expected = normal(tokens, 256), [], [], []
    for name, rows, scale, biased in [("Q4_K", 5, 1.0, True), ("Q6_K", 131, 0.25, True), ("F16", 3, -2.0, False)]:
        blocks, numbers = golden_blocks(WeightFormat[name], rows, 256)
        weights.append(replace(packed(triton_kernels, blocks, WeightFormat[name], numbers.shape), scale=scale))
        bias = normal(rows)
        biases.append(torch.from_numpy(bias) if biased else None)
        expected.append(scale * (x.astype(np.float64) @ numbers.T) + (bias if biased else 0.0))
    for y, numbers in zip(
        triton_kernels.matmul(torch.from_numpy(x), weights, precision, biases), expected, strict=True
    ):
        assert relative_error(y.numpy(), numbers) < (1e-3 if precision == "default" else 2e-6)


@pytest.mark.parametrize("weight_format", sorted(FORMATS, key=lambda each: each.ggml_id), ids=lambda each: each.name)
def test_every_format_beside_another(weight_format):
    """Each gives what it gives alone, to the bit."""
    columns = max(weight_format.block_size, 256)
    try:
        blocks, numbers = golden_blocks(weight_format, 5, columns)
    except KeyError:
        pytest.skip("no golden data")
    weight = packed(triton_kernels, blocks, weight_format, numbers.shape)
    other = packed(triton_kernels, golden_blocks(WeightFormat.Q4_K, 7, columns)[0], WeightFormat.Q4_K, (7, columns))
    x = torch.from_numpy(normal(2, columns))
    together = triton_kernels.matmul(x, [other, weight], "default")
    for y, each in zip(together, [other, weight], strict=True):
        assert torch.equal(y, triton_kernels.matmul(x, [each], "default")[0])
