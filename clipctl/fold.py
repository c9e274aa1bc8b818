"""The fold: a run's journal moved into `metrics.duckdb`, which is built as a new file and renamed, so nothing ever waits."""

from pathlib import Path

from clipctl.folder import committed_segments, create_tables, held_segments, load_run, quoted
from clipctl.schema import FOLDED, SCHEMA_VERSION
from clipctl.segments import sync


def fold(folder: Path) -> None:
    """Builds metrics.duckdb from everything the run has, as a new file renamed over the old one, and then removes the
    segments that it holds. A run with damage is left alone."""
    import duckdb

    beside = folder / ".metrics.duckdb"
    beside.unlink(missing_ok=True)
    held = [file for file in committed_segments(folder) if file.name.split("-")[0] in FOLDED]
    with duckdb.connect(":memory:") as source:
        create_tables(source)
        if load_run(source, folder, folder.name):
            return  # A damaged journal stays as it is, for readers to name and for people to mend.
        try:
            source.execute(f"attach '{quoted(beside)}' as target")
            for table in FOLDED:
                source.execute(f"create table target.{table} as select * from main.raw_{table}")
            source.execute("create table target.segments (name varchar)")
            names = sorted({*(file.name for file in held), *held_segments(folder)})
            if names:
                source.execute("insert into target.segments select unnest(?)", [names])
            source.execute("create table target.store_version as select ? as version", [SCHEMA_VERSION])
            source.execute("detach target")
        except duckdb.Error as error:
            beside.unlink(missing_ok=True)
            raise OSError(str(error).splitlines()[0]) from None
    sync(beside)
    beside.rename(folder / "metrics.duckdb")
    sync(folder)
    for file in held:
        file.unlink()
