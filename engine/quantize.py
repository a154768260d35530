"""Quantizing: rows of weights to blocks, and whole GGUF files to the mixes of `llama-quantize`: `trichord quantize`."""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from trichord.dispatch import operations
from trichord.errors import DeviceError, RequestError
from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.gguf_header import ValueType
from trichord.gguf_writer import (
    SPLIT_KEYS,
    GGUFStream,
    NewTensor,
    alignment_of,
    file_bytes,
    integer_pair,
    metadata_pairs,
    new_files,
    unwinding_on_sigterm,
)
from trichord.progress import progress_bar
from trichord.quantize_importance import ImportanceMatrix
from trichord.quantize_mix import choose_formats, mix_by_name, needs_importance
from trichord.quantize_report import QuantizeReport, TensorReport
from trichord.weight_format import Weight, WeightFormat

_Result = TypeVar("_Result")
_PIECE = 1 << 18  # weights converted at a time: few enough for the caches, enough to forget the calls around them
_FLOATS = (WeightFormat.F32, WeightFormat.F16, WeightFormat.BF16)
_FLOAT16_MAX = 65504


def quantize_blocks(values: np.ndarray, format: WeightFormat, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of weights as GGUF blocks.

    values: (rows, columns) float32, finite. importance: (columns,) float32, the mean square of the activations that
    meet each column (an importance matrix), or None to count every column alike. Returns (rows, row_bytes) uint8.
    Raises ValueError when the columns do not fill whole blocks, the format has no quantizer or a weight is not finite,
    DeviceError without Numba.
    """
    try:
        from trichord.quantize_formats import quantize_rows
    except ImportError as error:
        raise DeviceError(f"quantizing needs Numba (pip install numba): {error}") from error
    return quantize_rows(values, format, importance)


def quantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    mix: str,
    *,
    pure: bool = False,
    imatrix: str | os.PathLike[str] | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> QuantizeReport:
    """Writes `source`, a GGUF file or any part of a split one, quantized to `target`.

    mix: one of `quantize_mix.MIXES`. pure: all matrices in the mix's main format. imatrix: an importance matrix to
    weigh errors by. allow_requantize: take quantized tensors too, to their further loss. force: replace `target`.
    progress: show a bar on standard error; None shows it in a terminal.

    The target appears when it is complete. Raises RequestError when what is asked for cannot be done, GGUFError when
    a file is damaged, DeviceError without Numba.
    """
    chosen_mix = mix_by_name(mix)
    matrix = None if imatrix is None else ImportanceMatrix(imatrix)
    with GGUFFile(source) as file:
        formats = choose_formats(file, chosen_mix, pure, matrix is not None)
        for name, format in formats.items():
            _check_conversion(file.tensors[name], format, matrix, allow_requantize)
        pairs = {key: pair for key, pair in metadata_pairs(file).items() if key not in SPLIT_KEYS}
        for key, number in (("general.quantization_version", 2), ("general.file_type", chosen_mix.file_type)):
            pairs[key] = integer_pair(key, ValueType.UINT32, number)
        tensors = [NewTensor(name, file.tensors[name].shape, format) for name, format in formats.items()]
        layout = (list(pairs.values()), tensors, alignment_of(file))
        report = QuantizeReport(file.nbytes, file_bytes(*layout))
        with (
            new_files(file, [Path(target)], report.nbytes, force) as (temporary,),
            GGUFStream(temporary, *layout) as stream,
            progress_bar(f"Quantizing to {mix.upper()}", file.nbytes, "bytes", progress) as advance,
        ):
            pieces = _pieces(file, formats, matrix, report.tensors)
            for piece, (data, squared_error, squares) in _in_order(_convert, pieces, threads or _cpu_count()):
                stream.write(data)
                piece.report.squared_error += squared_error
                piece.report.squares += squares
                advance(piece.rows.nbytes)
    return report


@dataclass(frozen=True)
class _Piece:
    """Some rows of one tensor on their way into another format."""

    rows: np.ndarray  # uint8 (rows, row_bytes), a view of the file
    report: TensorReport
    importance: np.ndarray | None


def _convert(piece: _Piece) -> tuple[np.ndarray, float, float]:
    """The piece in its new format (rows, row_bytes) uint8, and the sums of its squared errors and squared weights."""
    report = piece.report
    if not report.converted:
        return piece.rows, 0.0, 0.0
    values = _decode(piece.rows, report.source)
    if not np.isfinite(values).all():
        odd = values[~np.isfinite(values)][0]
        raise RequestError(f"tensor {report.name!r} holds {odd}, which cannot be quantized: the model is damaged")
    largest = np.abs(values).max()
    if largest > _FLOAT16_MAX and report.format not in (WeightFormat.F32, WeightFormat.BF16):
        raise RequestError(
            f"tensor {report.name!r} holds {largest:.3g}, more than the {_FLOAT16_MAX} that float16 scales and"
            f" {report.format.name} can: convert to BF16 or F32"
        )
    data = quantize_blocks(values, report.format, piece.importance)
    error = _decode(data, report.format) - values
    return data, float(np.vdot(error, error)), float(np.vdot(values, values))


def _decode(rows: np.ndarray, format: WeightFormat) -> np.ndarray:
    """Packed rows (rows, row_bytes) uint8 -> float32 (rows, columns)."""
    import torch

    columns = rows.shape[1] // format.block_bytes * format.block_size
    weight = Weight(torch.from_numpy(rows), format, (len(rows), columns), "blocks")
    return operations("blocks").dequantize(weight).numpy()


def _check_conversion(
    tensor: TensorInfo, format: WeightFormat, matrix: ImportanceMatrix | None, allow_requantize: bool
) -> None:
    """Raises unless this tensor can become `format`: all checks come before the work."""
    if tensor.format is format:
        return
    what = f"tensor {tensor.name!r}"
    if tensor.format not in _FLOATS and tensor.format.block_size == 1:
        raise RequestError(f"{what} is of type {tensor.format.name}, which is not for weights")
    if tensor.format not in _FLOATS and not allow_requantize:
        raise RequestError(
            f"{what} is quantized already ({tensor.format.name}); to quantize it again would lose quality:"
            " start from an F32, F16 or BF16 file, or allow it (--allow-requantize)"
        )
    entry = matrix.of(tensor) if matrix is not None else None
    if entry is None and needs_importance(tensor.name, format):
        has_none = "there is none" if matrix is None else "the one given has no entry for it"
        raise RequestError(
            f"{what} is to become {format.name}, which without an importance matrix gives garbage, and"
            f" {has_none} (llama-imatrix makes them; --imatrix FILE)"
        )


def _pieces(
    file: GGUFFile,
    formats: dict[str, WeightFormat],
    matrix: ImportanceMatrix | None,
    reports: list[TensorReport],
) -> Iterator[_Piece]:
    """The whole file piece by piece; appends a report a tensor to `reports`, which the pieces' results go into."""
    for name, format in formats.items():
        tensor, blocks = file.tensors[name], file.blocks(name)
        new_bytes = tensor.rows * format.row_bytes(tensor.shape[-1])
        reports.append(TensorReport(name, tensor.shape, tensor.format, format, tensor.nbytes, new_bytes))
        entry = matrix.of(tensor) if matrix is not None and tensor.format is not format else None
        # An expert's matrix has importances of its own, so no piece reaches from one into the next.
        matrix_rows = tensor.rows if entry is None else tensor.shape[-2]
        step = max(1, _PIECE // tensor.shape[-1])
        for start in range(0, tensor.rows, matrix_rows):
            importance = None if entry is None else entry[start // matrix_rows]
            for row in range(start, start + matrix_rows, step):
                stop = min(row + step, start + matrix_rows)
                yield _Piece(blocks[row:stop], reports[-1], importance)


def _in_order(
    function: Callable[[_Piece], _Result], pieces: Iterable[_Piece], threads: int
) -> Iterator[tuple[_Piece, _Result]]:
    """Each piece with its result, in order; a few are worked on ahead, so that memory stays bounded."""
    pool = ThreadPoolExecutor(threads)
    try:
        pending: deque[tuple[_Piece, Future[_Result]]] = deque()
        for piece in pieces:
            pending.append((piece, pool.submit(function, piece)))
            if len(pending) > 2 * threads:
                piece, future = pending.popleft()
                yield piece, future.result()
        for piece, future in pending:
            yield piece, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cpu_count() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord quantize`."""
    parser.add_argument("source", metavar="IN.gguf", help="an F32, F16 or BF16 model, any part of a split one")
    parser.add_argument("target", metavar="OUT.gguf", help="the file to write")
    parser.add_argument("mix", metavar="TYPE", help="Q4_K_M, Q6_K, Q8_0, IQ4_XS, ... by llama-quantize's names")
    parser.add_argument("--pure", action="store_true", help="every matrix in the same format, instead of a mix")
    parser.add_argument("--imatrix", metavar="FILE", help="an importance matrix (GGUF or .dat) to weigh errors by")
    parser.add_argument("--allow-requantize", action="store_true", help="take tensors that are quantized already")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")


def run(options: argparse.Namespace) -> int:
    """`trichord quantize`: returns the exit status."""
    if options.threads is not None and options.threads < 1:
        raise RequestError(f"--threads is {options.threads}; it must be at least 1")
    with unwinding_on_sigterm():
        report = quantize_file(
            options.source,
            options.target,
            options.mix,
            pure=options.pure,
            imatrix=options.imatrix,
            allow_requantize=options.allow_requantize,
            threads=options.threads,
            force=options.force,
        )
    report.render(sys.stdout)
    return 0
