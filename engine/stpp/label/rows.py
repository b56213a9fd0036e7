"""Tables of labels and reliability: Parquet files, written whole."""

from pathlib import Path

from stpp import files
from stpp.errors import UserError


def write(path: Path, rows: list[dict]) -> None:
    """Writes `rows` (equal keys) as a Parquet file, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with files.atomic(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)


def read(path: Path) -> list[dict]:
    """The rows of a Parquet file.

    Raises:
        UserError: missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
