"""Texts as tables in files, and the texts of a corpus."""

import csv
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from utils.activations.corpus import Corpus


def texts_of(dataset: Path) -> list[str]:
    """The whole text of each document."""
    texts: dict[int, str] = {}
    for part in Corpus(str(dataset)).documents():
        texts[part.index] = texts.get(part.index, "") + part.text
    return list(texts.values())


def write_table(path: Path, texts: list[str], rows_a_piece: int = 7, **columns: list) -> Path:
    """Write the texts, and other columns, as a table of the file's type."""
    table = pyarrow.table({"text": texts, **columns})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows_a_piece)
    elif path.suffix == ".arrow":
        new = pyarrow.ipc.new_file if path.stem == "file" else pyarrow.ipc.new_stream
        with path.open("wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_a_piece)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            rows.writerow(table.column_names)
            rows.writerows(zip(*table.to_pydict().values(), strict=True))
    return path
