"""From the file to the device: a tensor's blocks are cut, packed into the backend's layout, and become a `Weight`."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from trichord.device import CPU, Place, memory_errors, resolve
from trichord.errors import GGUFError, ModelError, RequestError
from trichord.gguf_file import GGUFFile
from trichord.upload import upload
from trichord.weight_format import Weight, WeightFormat

_WARNED: set[WeightFormat] = set()

_INTEGERS = {
    WeightFormat.I8: np.int8,
    WeightFormat.I16: np.int16,
    WeightFormat.I32: np.int32,
    WeightFormat.I64: np.int64,
}


def load_weight(
    file: GGUFFile,
    name: str,
    device: str | torch.device | Place = "cpu",
    *,
    rows: slice | None = None,
    columns: slice | None = None,
    shape: tuple[int, ...] | None = None,
) -> Weight:
    """The tensor `name` as a packed weight on `device`; `rows` or `columns` cut a shard of it before it is packed.

    `shape` is the tensor's with dimensions of one that GGUF leaves out.

    On the CPU the weight is a view of the file's memory map; on a GPU its blocks are uploaded and repacked there. A
    format without a kernel is dequantized to float32, with one warning. A tensor `X.scale` beside `X.weight`, one
    number or one for each expert, becomes the weight's scale. Raises GGUFError for a missing tensor, ModelError for
    one that is no matrix, RequestError for a column cut that is not on block borders or a row cut of a tensor with
    experts.
    """
    place = resolve(device)
    blocks = file.blocks(name)
    info = file.tensors[name]
    shape = shape or info.shape
    if len(shape) not in (2, 3):
        raise ModelError(f"{file.path.name}: tensor {name!r} of shape {shape} is not a weight matrix.")
    if rows is not None:
        if len(shape) != 2:
            raise RequestError(f"Tensor {name!r} holds {shape[0]} experts: a cut of its rows would mix them.")
        blocks = blocks[rows]
        shape = (len(blocks), shape[1])
    if columns is not None:
        blocks, width = _cut_columns(blocks, info.format, shape[-1], columns, name)
        shape = (*shape[:-1], width)
    format = info.format
    if format not in place.operations.FUSED_FORMATS:
        blocks, format = _dequantized(blocks, format, shape), WeightFormat.F32
    with memory_errors(f"loading {name}"):
        data = place.operations.pack(upload(blocks, place.device), format, shape[-1])
    return Weight(data, format, shape, place.layout, _scale(file, name, shape, place))


def load_vector(file: GGUFFile, name: str, device: str | torch.device | Place = "cpu") -> torch.Tensor:
    """A norm gain, bias or table: the tensor `name` of any format as float32 of its shape."""
    info = file.tensors.get(name)
    blocks = file.blocks(name)
    assert info is not None  # blocks() has refused a missing tensor
    values = _values(blocks, info.format, info.shape)
    return torch.from_numpy(np.array(values, np.float32)).to(resolve(device).device, non_blocking=True)


def _cut_columns(
    blocks: np.ndarray, format: WeightFormat, width: int, columns: slice, name: str
) -> tuple[np.ndarray, int]:
    start, stop, step = columns.indices(width)
    if step != 1 or start % format.block_size or stop % format.block_size:
        raise RequestError(
            f"Columns {start}:{stop} of tensor {name!r} do not fall on the borders of {format.name}'s "
            f"blocks of {format.block_size}."
        )
    per_block = format.block_bytes
    cut = blocks[:, start // format.block_size * per_block : stop // format.block_size * per_block]
    return np.ascontiguousarray(cut), stop - start


def _values(blocks: np.ndarray, format: WeightFormat, shape: tuple[int, ...]) -> np.ndarray:
    if format in _INTEGERS:
        return blocks.view(_INTEGERS[format]).astype(np.float32).reshape(shape)
    weight = Weight(torch.from_numpy(blocks), format, shape, CPU.layout)
    return CPU.operations.dequantize(weight).numpy()


def _dequantized(blocks: np.ndarray, format: WeightFormat, shape: tuple[int, ...]) -> np.ndarray:
    if format not in _WARNED:
        _WARNED.add(format)
        warnings.warn(
            f"No fused kernel for {format.name}: its tensors are held as float32, "
            f"{32 / format.bits_per_weight:.1f} times their size in the file.",
            stacklevel=3,
        )
    values = np.ascontiguousarray(_values(blocks, format, shape), np.float32)
    return values.reshape(len(blocks), -1).view(np.uint8)


def _scale(file: GGUFFile, name: str, shape: tuple[int, ...], place: Place) -> float | torch.Tensor:
    companion = name.removesuffix(".weight") + ".scale"
    if companion == name or companion not in file.tensors:
        return 1.0
    values = load_vector(file, companion)
    if values.numel() == 1:
        return float(values)
    if values.shape != shape[:-2]:
        expected = "one value is" if len(shape) == 2 else f"one value or {shape[0]}, one for each expert, are"
        raise GGUFError(
            f"{file.path.name}: tensor {companion!r} holds {values.numel()} values where {expected} expected."
        )
    return values.to(place.device)
