"""Offloading: how many layers a GPU has memory for, decided from sizes before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trichord.cache import PAGE_SIZE, pages_for
from trichord.device import CPU, Place
from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.models.config import ModelConfig
from trichord.models.decoder import Decoder

# A context that nobody asked for is shortened to what memory holds, rather than layers left on the CPU, down to this.
AMPLE_CONTEXT = 8192

_PACKING = 3  # copies of the largest tensor while it is packed: its blocks, its planes, and what lies between
_LIBRARIES = 256 << 20  # kernels, the libraries' workspaces, the pools of graphs
_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"_(?:ch)?exps\.")


@dataclass(frozen=True)
class LayerSize:
    """Bytes of one layer on the GPU: its weights, a page of its caches, the states of one sequence."""

    weights: int
    page: int = 0
    states: int = 0


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model on the GPU, layer by layer.

    outer: the embedding, the output matrix if it is another one, and what else belongs to no layer; on the GPU only
    with all layers. largest: the largest tensor. activations: what a step takes besides the cache.
    """

    layers: tuple[LayerSize, ...]
    outer: int
    largest: int
    activations: int

    def needed(self, gpu_layers: int, pages: int) -> int:
        """Bytes that the last `gpu_layers` layers take on the GPU, with so many pages of cache and one sequence.

        >>> ModelSize((LayerSize(100, page=2),) * 4, outer=50, largest=0, activations=10).needed(4, pages=5)
        500
        """
        if gpu_layers == 0:
            return 0
        layers = self.layers[-gpu_layers:]
        weights = sum(layer.weights for layer in layers) + (self.outer if gpu_layers == len(self.layers) else 0)
        working = self.activations + sum(pages * layer.page + layer.states for layer in layers)
        return weights + max(working, _PACKING * self.largest)


def fitting_layers(size: ModelSize, free: int, pages: int) -> int:
    """How many layers, counted from the last, fit into `free` bytes of GPU memory with so many pages of cache.

    >>> fitting_layers(ModelSize((LayerSize(100, page=2),) * 4, outer=50, largest=0, activations=10), 350, pages=5)
    3
    """
    counts = range(len(size.layers), 0, -1)
    return next((count for count in counts if size.needed(count, pages) <= free), 0)


def fitting_pages(size: ModelSize, free: int, gpu_layers: int) -> int:
    """How many pages of cache fit beside so many layers into `free` bytes of GPU memory.

    >>> fitting_pages(ModelSize((LayerSize(100, page=2),) * 4, outer=50, largest=0, activations=10), 500, 4)
    5
    """
    a_page = sum(layer.page for layer in size.layers[-gpu_layers:]) if gpu_layers else 0
    rest = free - size.needed(gpu_layers, 0)
    return rest // a_page if a_page and rest >= 0 else 0


def advice(
    size: ModelSize, free: int, gpu_layers: int, context_length: int, others: Mapping[str, ModelSize] | None = None
) -> str:
    """A sentence on what so many layers and positions need, what is free, and what would fit.

    others: the same model by the option that makes it smaller.
    """
    pages = pages_for(context_length)
    needed = size.needed(gpu_layers, pages)
    free_for_sure = min(free, int(0.9 * needed))  # where the estimate would have fitted, a tenth less may
    options = []
    if fewer := fitting_layers(size, free_for_sure, pages):
        options.append(f"gpu_layers={fewer}")
    if shorter := fitting_pages(size, free_for_sure, gpu_layers):
        options.append(f"context_length={shorter * PAGE_SIZE}")
    options += [name for name, other in (others or {}).items() if other.needed(gpu_layers, pages) <= free_for_sure]
    fitting = f"{' or '.join(options)} would fit" if options else "only a smaller model would fit"
    return (
        f"{gpu_layers} of {len(size.layers)} layers with {context_length} positions need about {needed / 2**30:.1f} "
        f"GiB on the GPU, where {free / 2**30:.1f} were free: {fitting}."
    )


def model_size(
    file: GGUFFile,
    config: ModelConfig,
    place: Place,
    kv_dtype: torch.dtype,
    cpu_experts: bool = False,
    *,
    max_batch_tokens: int,
    max_sequences: int,
) -> ModelSize:
    """What the model would take at `place`, as it is packed there. Raises what loading it raises."""
    weights = [0] * len(config.layers)
    outer = largest = 0
    for tensor in file.tensors.values():
        if cpu_experts and _EXPERTS.search(tensor.name):
            continue
        nbytes = _resident_bytes(tensor, place)
        layer = _LAYER.match(tensor.name)
        if layer is None:
            outer += nbytes
        elif int(layer[1]) < len(weights):  # later blocks predict further tokens
            weights[int(layer[1])] += nbytes
        largest = max(largest, nbytes)
    # On the CPU weights are views of the file, so that the layers, and thus their caches, can be had for nothing.
    layers = Decoder(file, config, [CPU] * len(weights), CPU).layers
    return ModelSize(
        tuple(
            LayerSize(
                nbytes,
                sum(cache.page_bytes(kv_dtype) for cache in layer.caches),
                sum(cache.slot_bytes for cache in layer.caches),
            )
            for nbytes, layer in zip(weights, layers, strict=True)
        ),
        outer,
        largest,
        activation_bytes(config, file.tensors["token_embd.weight"].shape[0], max_batch_tokens, max_sequences),
    )


def activation_bytes(config: ModelConfig, vocabulary: int, max_batch_tokens: int, max_sequences: int) -> int:
    """A generous estimate of what a step takes: two dozen rows a token, eight rows of logits a sequence, libraries."""
    rows = min(max_sequences, max_batch_tokens)
    return _LIBRARIES + 4 * (24 * max_batch_tokens * config.hidden_size + 8 * rows * vocabulary)


def _resident_bytes(tensor: TensorInfo, place: Place) -> int:
    if len(tensor.shape) < 2 or tensor.format not in place.operations.FUSED_FORMATS:
        return 4 * tensor.rows * tensor.shape[-1]
    row_bytes = tensor.format.row_bytes(tensor.shape[-1])
    blocks = torch.empty((tensor.rows, row_bytes), dtype=torch.uint8, device="meta")
    return place.operations.pack(blocks, tensor.format, tensor.shape[-1]).numel()
