"""Texts as tokens on disk, and windows of them for training.

    tokens.npy   (tokens,) of all documents end to end, each followed by the end-of-document token
    starts.npy   (documents,) int64, where each begins

Both are memory-mapped: only the windows of a batch are ever read. A text file is one document; of a Parquet file each
row of its text column is one.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mambakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BLOCK = 1 << 20  # characters of a text file that are tokenized at a time


@dataclass(frozen=True)
class TokenStream:
    """Tokens of documents laid end to end.

    Attributes:
        tokens: (tokens,), memory-mapped.
        starts: (documents,), the position of each document's first token.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def split(self, share: float) -> "tuple[TokenStream, TokenStream]":
        """All but the last `share` of the tokens, and that last part."""
        at = len(self.tokens) - round(share * len(self.tokens))
        before, after = self.starts[self.starts < at], self.starts[self.starts >= at] - at
        if not len(after) or after[0] != 0:
            after = np.concatenate([[0], after])  # what is left of a document that the cut goes through
        return TokenStream(self.tokens[:at], before), TokenStream(self.tokens[at:], after)


def read_documents(files: Sequence[str | Path], column: str = "text") -> Iterator[Iterator[str]]:
    """The documents of text and Parquet files, each as an iterator over its pieces; whole files are never in memory.

    Raises DataError for a file that is missing, is no UTF-8, or has no such column.
    """
    for file in map(Path, files):
        if not file.is_file():
            raise DataError(f"{file} is not there: expected a text or Parquet file")
        if file.suffix == ".parquet":
            yield from (iter([text]) for text in _rows(file, column))
        else:
            yield _blocks(file)


def texts_of(files: Sequence[str | Path], column: str = "text") -> Iterator[str]:
    """All pieces of all documents, for training a tokenizer."""
    for document in read_documents(files, column):
        yield from document


def tokenize(
    documents: Iterable[Iterable[str]], tokenizer: "PreTrainedTokenizerFast", folder: str | Path | None = None
) -> TokenStream:
    """Tokenize documents one after another into memory-mapped files.

    Args:
        folder: where the two files go; None: a temporary folder, which goes with the process.

    Raises DataError where there is no text.
    """
    where = Path(folder) if folder is not None else Path(_temporary_folder())
    where.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    end = np.array([tokenizer.eos_token_id], dtype)
    starts, count = [], 0
    with (where / "tokens.raw").open("wb") as raw:
        for document in documents:
            first = count
            for piece in document:
                ids = np.asarray(tokenizer(piece, add_special_tokens=False)["input_ids"], dtype)
                ids.tofile(raw)
                count += len(ids)
            if count > first:
                end.tofile(raw)
                starts.append(first)
                count += 1
    if count == 0:
        raise DataError("the files hold no text: expected at least one document that is not empty")
    np.save(where / "starts.npy", np.array(starts, np.int64))
    tokens = np.memmap(where / "tokens.raw", dtype, mode="r", shape=(count,))
    return TokenStream(tokens, np.load(where / "starts.npy", mmap_mode="r"))


class Windows:
    """The windows of a stream side by side, for `mambakit.training.fit`; what is left at its end is left out.

    Args:
        stream: the tokens.
        context: tokens of a window.

    Raises DataError for a stream shorter than one window.
    """

    def __init__(self, stream: TokenStream, context: int) -> None:
        if len(stream.tokens) < context:
            raise DataError(
                f"the text has {len(stream.tokens)} tokens, fewer than a window of {context}: lower the context length"
            )
        self.stream, self.context = stream, context

    def __len__(self) -> int:
        return len(self.stream.tokens) // self.context

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """tokens (samples, context) int64, and starts, of the same shape, True where a document starts."""
        return self.at(indices * self.context)

    def at(self, firsts: Tensor) -> dict[str, Tensor]:
        """The windows that begin at these tokens."""
        rows = firsts.numpy()
        tokens = np.stack([self.stream.tokens[first : first + self.context] for first in rows]).astype(np.int64)
        marked = np.zeros(tokens.shape, bool)
        for row, first in enumerate(rows):
            low, high = np.searchsorted(self.stream.starts, [first, first + self.context])
            marked[row, self.stream.starts[low:high] - first] = True
        return {"tokens": torch.from_numpy(tokens), "starts": torch.from_numpy(marked)}


class Draws:
    """So many windows an epoch, each of which begins anywhere; drawn by the objective, of torch's own generator.

    `fit` seeds that generator by the epoch, so that every epoch sees other windows and a resumed run the same ones.

    Args:
        windows: what they are drawn from.
        count: windows of an epoch.
    """

    def __init__(self, windows: Windows, count: int) -> None:
        self.windows, self.count = windows, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """As many rows as there are indices, for the objective to replace: single tokens, which tell texts apart."""
        return {"probe": self.windows.at(indices * self._last() // self.count)["tokens"][:, :1]}

    def draw(self, count: int) -> dict[str, Tensor]:
        """tokens and starts of windows, as those of `Windows.batch`."""
        return self.windows.at(torch.randint(self._last() + 1, (count,)))

    def _last(self) -> int:
        return len(self.windows.stream.tokens) - self.windows.context


def _rows(file: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise DataError(f"{file} has no column {column}: expected one of {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=[column]):
            values = batch.column(0)
            if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
                raise DataError(f"column {column} of {file} is {values.type}: expected text")
            yield from (value for value in values.to_pylist() if value)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is not a Parquet file ({' '.join(str(error).split())})") from error


def _blocks(file: Path) -> Iterator[str]:
    """A text file in blocks that end with a line, where its lines are not longer than a block."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            while block := stream.read(_BLOCK):
                yield block + stream.readline(_BLOCK)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}: convert it first") from error


def _temporary_folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="mambakit-tokens-")
    _KEPT.append(folder)  # removed at the end of the process
    return folder.name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
