"""The tables of a pool and a run in DuckDB, and the files of ``sql/`` run over them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.schema import LOGS, TABLES, Table, source_of_shard
from training.config import ConfigError

SQL = Path(__file__).parents[1] / "sql"
KINDS = ("reports", "checks", "views")
VIEWS = ("verdicts", "end_state", "pictures", "samples", "composition", "funnel_steps")  # each may use those before it
_PART = re.compile(r"part-(\d+)\.parquet$")
_TYPES = {
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint64(): "UBIGINT",
    pa.float16(): "FLOAT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
}


def connect(
    pool: Path,
    run: Path,
    folders: Mapping[str, str],
    source_ids: Collection[int],
    shards: Collection[int] | None = None,
) -> Any:
    """A DuckDB connection with one view for each table of ``schema.TABLES`` and for each file of ``sql/views``.

    Args:
        pool: root of the pool, in a folder.
        run: root of the run, in a folder.
        folders: of tables whose folder is not their name.
        source_ids: sources of this run; a pool may hold more, and these are not seen.
        shards: of this run, where it takes only some of its sources; None takes all.

    Returns:
        ``duckdb.DuckDBPyConnection``. A table without parts is an empty view. Besides, the view ``places`` says for
        each row of a per-shard table in which part it lies: table, image_id, part.
    """
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    roots = {"pool": pool, "run": run}
    places = ['SELECT NULL::VARCHAR AS "table", NULL::BIGINT AS image_id, NULL::BIGINT AS part WHERE false']
    for table in TABLES.values():
        folder = roots[table.root] / folders.get(table.name, table.name)
        files = [file for file in sorted(folder.glob("part-*.parquet")) if _is_of(table, file, source_ids, shards)]
        connection.execute(f'CREATE VIEW "{table.name}" AS {_select(table, files, source_ids)}')
        if files and table.parts == "shard" and table.name not in LOGS:
            places.append(_places(table, files))
    connection.execute(f"CREATE VIEW places AS {' UNION ALL '.join(places)}")
    for name in VIEWS:
        connection.execute((SQL / "views" / f"{name}.sql").read_text(encoding="utf-8"))
    return connection


def _is_of(table: Table, file: Path, source_ids: Collection[int], shards: Collection[int] | None) -> bool:
    """Whether a part belongs to the run: parts of per-shard tables are named by the shard."""
    if table.parts != "shard":
        return True
    found = _PART.search(file.name)
    shard = int(found.group(1)) if found else -1
    return source_of_shard(shard) in source_ids and (shards is None or shard in shards)


def _select(table: Table, files: Sequence[Path], source_ids: Collection[int]) -> str:
    if not files:
        columns = ", ".join(f'NULL::{_duckdb_type(field.type)} AS "{field.name}"' for field in table.schema)
        return f"SELECT {columns} WHERE false"
    where = ""
    if table.name == "sources":
        where = f" WHERE source_id IN ({', '.join(map(str, sorted(source_ids)))})" if source_ids else " WHERE false"
    if table.name == "pages":
        where = " WHERE source IN (SELECT name FROM sources)"
    grown = ", union_by_name = true" if table.name == "urls" else ""  # its parts of before lack columns
    return f"SELECT * FROM read_parquet({_list(files)}{grown}){where}"


def _places(table: Table, files: Sequence[Path]) -> str:
    column = table.schema.names[0]  # image_id; query_id in queries
    part = r"regexp_extract(filename, 'part-(\d+)\.parquet$', 1)::BIGINT"
    return f"SELECT '{table.name}', {column}, {part} FROM read_parquet({_list(files)}, filename = true)"


def _list(files: Sequence[Path]) -> str:
    return "[" + ", ".join("'" + str(file).replace("'", "''") + "'" for file in files) + "]"


def _duckdb_type(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "TIMESTAMP WITH TIME ZONE"
    if pa.types.is_struct(kind):
        return "STRUCT(" + ", ".join(f'"{field.name}" {_duckdb_type(field.type)}' for field in kind) + ")"
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"{_duckdb_type(kind.value_type)}[]"
    if pa.types.is_map(kind):
        return f"MAP({_duckdb_type(kind.key_type)}, {_duckdb_type(kind.item_type)})"
    return _TYPES[kind]


# Files of sql/


def names_of(kind: str) -> list[str]:
    """Names of the files of one kind: ``reports``, ``checks`` or ``views``."""
    return sorted(file.stem for file in (SQL / kind).glob("*.sql"))


def run_sql(connection: Any, name: str) -> Any:
    """Run a report, a check, a view, or a file.

    Args:
        connection: of ``connect``.
        name: of a file of ``sql/``, or a path that ends in .sql.

    Returns:
        ``pandas.DataFrame``.

    Raises:
        ConfigError: nothing has this name, or DuckDB refuses the file.
    """
    import duckdb

    known = {found: kind for kind in reversed(KINDS) for found in names_of(kind)}
    if known.get(name) == "views":
        text = f'SELECT * FROM "{name}"'
    elif name in known:
        text = (SQL / known[name] / f"{name}.sql").read_text(encoding="utf-8")
    elif name.endswith(".sql") and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        listed = "; ".join(f"{kind}: {', '.join(names_of(kind))}" for kind in KINDS)
        raise ConfigError(f"sql {name!r} is not known; {listed}; or the path of a file that ends in .sql")
    try:
        return connection.execute(text).df()
    except duckdb.Error as error:
        raise ConfigError(f"sql {name!r}: {' '.join(str(error).split())}") from None


def run_checks(connection: Any) -> dict[str, int]:
    """Run all checks; those that found rows, with how many. Empty when all holds."""
    counts = {name: len(run_sql(connection, name)) for name in names_of("checks")}
    return {name: count for name, count in counts.items() if count}
