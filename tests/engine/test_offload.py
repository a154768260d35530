"""What goes to the GPU: sizes in, layers out; models split between the interpreter's GPU and the CPU."""

from __future__ import annotations

import argparse
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import parity, relative_error
from tiny_model import FEED_FORWARD, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, write_tiny_model

from trichord import LLM
from trichord.cache import PAGE_SIZE
from trichord.commands.options import add_machine, in_options, load_model
from trichord.device import CPU, Place, resolve
from trichord.errors import DeviceError, RequestError
from trichord.gguf_file import GGUFFile
from trichord.models.config import ModelConfig
from trichord.offload import (
    LayerSize,
    ModelSize,
    activation_bytes,
    advice,
    fitting_layers,
    fitting_pages,
    model_size,
)

GPU = Place("planes", torch.device("cpu"))
LIMITS = {"max_batch_tokens": 16, "max_sequences": 2}
# Four layers of 100 bytes, each with 2 a page and 7 of states; 50 bytes around them; 10 to work in.
SIZE = ModelSize((LayerSize(100, page=2, states=7),) * 4, outer=50, largest=20, activations=60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def size_of(path, kv_dtype=torch.float16, cpu_experts=False) -> ModelSize:
    file = GGUFFile(path)
    return model_size(file, ModelConfig.from_gguf(file), GPU, kv_dtype, cpu_experts, **LIMITS)


@pytest.mark.parametrize(
    ("free", "layers"),
    [
        (4 * 117 + 50 + 60, 4),
        (4 * 117 + 50 + 59, 3),  # all layers would fit, but not with the embedding and the output matrix
        (3 * 117 + 60, 3),
        (3 * 117 + 59, 2),
        (117 + 60, 1),
        (117 + 59, 0),
        (0, 0),
        (10**9, 4),
    ],
)
def test_as_many_layers_as_fit_with_five_pages_of_cache(free, layers):
    assert fitting_layers(SIZE, free, pages=5) == layers


def test_longer_contexts_leave_less_room_for_layers():
    assert [fitting_layers(SIZE, 600, pages) for pages in (0, 5, 6, 12, 100, 1000)] == [4, 4, 4, 3, 1, 0]


def test_packing_the_largest_tensor_needs_room_too():
    size = ModelSize((LayerSize(100),) * 2, outer=0, largest=90, activations=10)
    assert size.needed(1, 0) == 100 + 3 * 90
    assert fitting_layers(size, 469, 0) == 1


@pytest.mark.parametrize(("free", "pages"), [(597, 1), (596, 1), (588 + 8, 1), (588 + 80, 10), (588, 0), (10, 0)])
def test_pages_that_fit_beside_all_layers(free, pages):
    assert SIZE.needed(4, 0) == 4 * 107 + 50 + 60
    assert fitting_pages(SIZE, free - 50, 4) == pages


def test_sizes_of_a_file(tiny):
    size = size_of(tiny)
    matrices = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * 16 + 3 * HIDDEN * FEED_FORWARD
    page = PAGE_SIZE * KV_HEADS * 2 * 16 * 2
    assert size.layers == (LayerSize(4 * (matrices + 2 * HIDDEN), page, 0),) * LAYERS
    assert size.outer == 4 * (2 * VOCABULARY * HIDDEN + HIDDEN)
    assert size.largest == 4 * VOCABULARY * HIDDEN
    assert {layer.page for layer in size_of(tiny, torch.float32).layers} == {2 * page}


def test_a_tied_output_matrix_is_counted_once():
    path = parity("archs/gemma2-dense.gguf")
    file = GGUFFile(path)
    assert "output.weight" not in file.tensors
    embedding = file.tensors["token_embd.weight"]
    assert embedding.nbytes <= size_of(path).outer < 1.5 * embedding.nbytes


def test_packed_bytes_count_not_those_of_the_file():
    path = parity("quants/llama-Q4_K_S.gguf")
    llm = LLM(path, device="cuda", context_length=64, max_sequences=1)
    size = size_of(path)
    vectors = sum(4 * t.shape[0] for t in llm.file.tensors.values() if len(t.shape) == 1)
    assert size.outer + sum(layer.weights for layer in size.layers) == llm.weight_bytes + vectors


def test_experts_on_the_cpu_are_not_counted():
    path = parity("archs/qwen3moe-moe.gguf")
    whole, without = size_of(path), size_of(path, cpu_experts=True)
    file = GGUFFile(path)
    for index, (layer, rest) in enumerate(zip(whole.layers, without.layers, strict=True)):
        names = [f"blk.{index}.ffn_{side}_exps.weight" for side in ("gate", "up", "down")]
        assert layer.weights - rest.weights == sum(file.tensors[name].nbytes for name in names)
        assert layer.page == rest.page
    assert without.outer == whole.outer


def test_states_count_for_a_sequence():
    size = size_of(parity("archs/mamba-dense.gguf"))
    assert all(layer.states and not layer.page for layer in size.layers)


def test_activations_grow_with_the_step_and_the_vocabulary():
    config = SimpleNamespace(hidden_size=100)
    base = activation_bytes(config, 1000, 10, 4)
    assert activation_bytes(config, 1000, 20, 4) - base == 4 * 24 * 10 * 100
    assert activation_bytes(config, 3000, 10, 4) - base == 4 * 8 * 4 * 2000
    assert activation_bytes(config, 1000, 10, 50) == activation_bytes(config, 1000, 10, 10)  # a row for each token


GIB = 2**30
BIG = ModelSize((LayerSize(GIB, page=GIB // 64),) * 10, outer=GIB, largest=0, activations=0)


def test_advice_says_what_is_needed_what_is_free_and_what_would_fit():
    half = ModelSize((LayerSize(GIB, page=GIB // 128),) * 10, outer=GIB, largest=0, activations=0)
    sentence = advice(BIG, 17 * GIB, 10, 64 * PAGE_SIZE, {"kv_dtype=q8": half})
    assert sentence == (
        "10 of 10 layers with 4096 positions need about 21.0 GiB on the GPU, where 17.0 were free: "
        "gpu_layers=8 or context_length=2432 or kv_dtype=q8 would fit."
    )
    for gpu_layers, pages in ((8, 64), (10, 2432 // PAGE_SIZE)):
        assert BIG.needed(gpu_layers, pages) <= 17 * GIB
    assert BIG.needed(9, 64) > 17 * GIB
    assert BIG.needed(10, 2432 // PAGE_SIZE + 1) > 17 * GIB


def test_advice_where_nothing_fits():
    assert advice(BIG, GIB // 2, 10, 64).endswith("only a smaller model would fit.")


@pytest.fixture
def memory(monkeypatch):
    """Sets the bytes that the interpreter's GPU seems to have free."""

    def set_free(nbytes: int) -> None:
        real = Place.free_bytes
        monkeypatch.setattr(Place, "free_bytes", lambda self: nbytes if self.layout == "planes" else real(self))

    return set_free


def load(path, **options) -> LLM:
    return LLM(
        path, device="cuda", precision="exact", context_length=64, max_sequences=2, max_batch_tokens=16, **options
    )


def test_automatic_layers_follow_the_free_memory(tiny, memory):
    size = size_of(tiny, torch.float32)
    memory(size.needed(LAYERS, 1))
    assert {layer.place for layer in load(tiny).model.layers} == {GPU}
    memory(size.needed(1, 1))
    with pytest.warns(UserWarning, match=f"hold 1 of the {LAYERS} layers with 64 positions"):
        llm = load(tiny, gpu_layers="auto", cache_bytes=1 << 20)
    assert [layer.place for layer in llm.model.layers] == [CPU, GPU]
    assert llm.model.outer == CPU
    memory(0)
    with pytest.warns(UserWarning, match="hold 0 of"):
        llm = load(tiny, cache_bytes=1 << 20)
    assert {layer.place for layer in llm.model.layers} == {CPU}


def test_a_context_that_nobody_asked_for_costs_no_layers(tmp_path, memory):
    path = write_tiny_model(tmp_path / "long.gguf", context=1 << 20)
    size = size_of(path)
    memory(size.needed(LAYERS, 8192 // PAGE_SIZE))
    with pytest.warns(UserWarning, match="context is shortened"):
        llm = LLM(path, device="cuda", max_sequences=2, max_batch_tokens=16, cache_bytes=1 << 22)
    assert {layer.place for layer in llm.model.layers} == {GPU}


@pytest.mark.parametrize("name", ["qwen3moe-moe", "llama4-moe", "grovemoe-moe"])
def test_experts_on_the_cpu_compute_the_same(name):
    path = parity(f"archs/{name}.gguf")
    with np.load(path.with_suffix(".npz")) as archive:
        tokens, expected = archive["tokens"][:5], archive["logits"][:5]
    llm = load(path, cpu_experts=True)
    assert {layer.place for layer in llm.model.layers} == {GPU}
    experts = [layer.experts for layer in llm.model.layers if layer.experts]
    assert experts
    for block in experts:
        assert {linear.weight.layout for linear in (*block.inputs, block.output)} == {"blocks"}
        assert block.router.weight.layout == "planes"
    assert llm.model.place is None
    assert relative_error(llm.logits(tokens), expected) < 1e-4


def test_experts_on_the_cpu_are_nothing_to_a_dense_model(tiny):
    assert load(tiny, cpu_experts=True).model.place == GPU


def test_too_little_memory_says_what_would_fit(tiny, memory, monkeypatch):
    memory(1 << 20)

    pack = GPU.operations.pack

    def full(blocks, *arguments):
        if blocks.device.type != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pack(blocks, *arguments)

    monkeypatch.setattr(GPU.operations, "pack", full)
    message = "loading token_embd.weight: .* 2 of 2 layers with 64 positions need about 0.3 GiB .* were free: only"
    with pytest.raises(DeviceError, match=message):
        load(tiny, gpu_layers=LAYERS)


@pytest.mark.parametrize("layers", [-1, "all", 1.5])
def test_what_is_no_number_of_layers(tiny, layers):
    with pytest.raises(RequestError, match="gpu_layers must be 0 or more, or 'auto'"):
        load(tiny, gpu_layers=layers)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, new enough, as far as torch can tell."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    return monkeypatch


def without_triton(monkeypatch) -> str:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return "not installed"


def broken_triton(monkeypatch) -> str:
    def broken(name):
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    return "cannot be imported: libtriton.so: undefined symbol"


def no_compiler(monkeypatch) -> str:
    def fail():
        raise RuntimeError("Failed to find C compiler")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=fail))
    triton = SimpleNamespace(__version__="3.9.0", runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(importlib, "import_module", lambda name: triton)
    return "cannot drive it: Failed to find C compiler"


def too_old(monkeypatch) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    return "older than the kernels support"


@pytest.mark.parametrize("trouble", [without_triton, broken_triton, no_compiler, too_old])
def test_a_gpu_that_cannot_serve(gpu, trouble):
    message = trouble(gpu)
    with pytest.raises(DeviceError, match=message):
        resolve("cuda")
    with pytest.warns(UserWarning, match=f"{message}.*Running on the CPU instead") as caught:
        assert resolve("auto") == CPU
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"gpu_layers": "auto", "cpu_experts": False, "graphs": True}),
        (["--gpu-layers", "auto", "--cpu-experts"], {"gpu_layers": "auto", "cpu_experts": True, "graphs": True}),
        (["--gpu-layers", "7", "--no-graphs"], {"gpu_layers": 7, "cpu_experts": False, "graphs": False}),
    ],
)
def test_options_of_the_command_line(arguments, expected, monkeypatch):
    given = {}
    monkeypatch.setattr("trichord.llm.LLM", lambda path, **options: given.update(options))
    parser = argparse.ArgumentParser()
    add_machine(parser)
    load_model(parser.parse_args(arguments), "model.gguf", None)
    assert {name: given[name] for name in expected} == expected


def test_advice_names_the_command_line_s_options():
    sentence = in_options(advice(BIG, 17 * GIB, 10, 64 * PAGE_SIZE, {"kv_dtype=q8": SIZE, "cpu_experts": SIZE}))
    assert sentence.endswith("--gpu-layers=8 or --context=2432 or --kv-dtype=q8 or --cpu-experts would fit.")
