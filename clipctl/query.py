"""What `--sql` takes: exactly one SELECT over the documented views, checked on DuckDB's own syntax tree before it runs."""

import json
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from clipctl.errors import SpecError

if TYPE_CHECKING:
    import duckdb

TABLE_FUNCTIONS = ("generate_series", "json_each", "json_tree", "range", "unnest")
"""Functions that may stand after FROM: those that read nothing but their arguments."""


def named_views(connection: "duckdb.DuckDBPyConnection", query: str, views: Collection[str]) -> set[str]:
    """The views that a query reads.

    Raises SpecError for anything but one SELECT (also DESCRIBE and SUMMARIZE of a view), for a name that is no view, and
    for a table function that could read more than its arguments.
    """
    import duckdb

    try:
        statements = connection.extract_statements(query)
    except duckdb.Error as error:
        raise SpecError(f"--sql: {one_line(error)}") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise SpecError("--sql: exactly one SELECT is taken; runs are only ever read")
    tree = syntax_tree(connection, query)
    own = {entry["key"].lower() for node in _nodes(tree) for entry in node.get("cte_map", {}).get("map", ())}
    names: set[str] = set()
    for node in _nodes(tree):
        if node.get("type") == "TABLE_FUNCTION":
            _check_function(node["function"]["function_name"])
        elif node.get("type") in ("BASE_TABLE", "SHOW_REF"):
            names |= _view(node, views, own)
    return names


def syntax_tree(connection: "duckdb.DuckDBPyConnection", query: str) -> dict[str, Any]:
    """DuckDB's syntax tree of one SELECT. Raises SpecError where it has none."""
    ((text,),) = connection.execute("select json_serialize_sql(?::varchar)", [query]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise SpecError(f"--sql: {tree['error_message']}")
    assert isinstance(tree, dict)
    return tree


def table_names(tree: dict[str, Any]) -> set[str]:
    """All names in a tree that stand where a table can."""
    return {node["table_name"].lower() for node in _nodes(tree) if node.get("type") == "BASE_TABLE"}


def nearest(name: str, choices: Collection[str]) -> str:
    """`; did you mean 'x'?` for the choice that looks most like the name, and all choices where none does."""
    close = get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(choices)}"


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and DuckDB's drawing of the query."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())[:400]


def _view(node: dict[str, Any], views: Collection[str], own: set[str]) -> set[str]:
    name = node["table_name"].strip('"')
    if node["type"] == "SHOW_REF" and not name:  # describe and summarize of a query, which is a node of its own
        return set()
    schema, catalog = node.get("schema_name", ""), node.get("catalog_name", "")
    if schema in ("", "main") and not catalog:
        if name.lower() in own and not schema:
            return set()
        if name.lower() in views:
            return {name.lower()}
    full = ".".join(filter(None, (catalog, schema, name)))
    raise SpecError(f"--sql: no view {full!r}{nearest(name, views)}")


def _check_function(name: str) -> None:
    if name.lower() not in TABLE_FUNCTIONS:
        raise SpecError(
            f"--sql: {name}() is not taken after FROM; views and {', '.join(TABLE_FUNCTIONS)} are: nothing but runs is read"
        )


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)
