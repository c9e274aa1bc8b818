"""`clipctl analyze --html`: one page that holds everything it shows, tables, charts, samples, specs, and asks no network for
anything.

The page's template, style and script are the files of `clipctl/page/`; the drawing library is the one that comes with
vl-convert. A content security policy names the two scripts by their digests, so text of a model, were it ever taken for
markup, could neither run nor call home.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl import __version__
from clipctl.analysis import HEADINGS, VIEWS_OF_ANALYZE, Options
from clipctl.analysis.arms import arms_of, differing, specs_of, value_text
from clipctl.analysis.samples import chosen_groups, marked_parts, samples_view, tokens_of
from clipctl.charts import CHARTS, COLUMNS, TITLES
from clipctl.errors import SpecError, StoreError
from clipctl.folder import read_json
from clipctl.formats import safe_text
from clipctl.overview import HEADINGS as OVERVIEW_HEADINGS
from clipctl.overview import overview
from clipctl.sparkline import BARS
from clipctl.store import Runs, open_runs

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ARMS = 24
"""Groups of runs that charts show; of more, the newest."""
MOST_ROWS = 200
"""Of a section's table. The overview has all runs."""
MOST_NOTES = 4
MOST_GROUPS = 6
"""Prompts whose samples are shown."""
MOST_LETTERS = 4000
"""Of a sample's text."""
SHORT = {
    "overview": "Course",
    "entropy": "Entropy",
    "clip": "Clipping",
    "ledger": "Ledger",
    "passk": "pass@k",
    "what-if": "What-if",
    "compare": "Compare",
    "frontier": "Frontier",
    "events": "Events",
}
"""Sections with charts, in their order, and what the navigation calls them."""
TABLES = ("ledger", "passk", "what-if", "compare", "events")
"""Views whose table stands under their charts."""
EXPLAINED = {
    "overview": ("The course of training: lines are runs, or means over runs that differ in their seed alone.",),
    "ledger": (
        "A policy-gradient step pulls at entropy by Σ w A e over its tokens, and the ledger splits that pull in three: the "
        "reward's term, over all tokens as if nothing were clipped, and the terms of clip-low and clip-high, what clipping "
        "tokens with A < 0 and r < 1 − ε_low, or with A > 0 and r > 1 + ε_high, took away of it. Where inequalities (7) and "
        "(8) hold, clip-low's term is positive and raises entropy, clip-high's is negative and lowers it; under AdamW terms "
        "are shares of the gross pull, not nats.",
    ),
    "what-if": (
        "What other ε would have clipped and pulled on the same ratios, to first order: another ε would have led elsewhere.",
    ),
    "frontier": ("What a run paid in entropy for what it learned.",),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. number: what a column is sorted by; None for text. bars: whether the text is a sparkline."""

    text: str
    number: float | str | None = None
    bars: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    headings: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its place in the page's data, and what stands above it."""

    key: str
    title: str
    subtitle: str


@dataclass(frozen=True, slots=True)
class Section:
    """One view. missing: why it has no chart; empty where it has."""

    view: str
    short: str
    title: str
    explained: Sequence[str]
    panels: list[Panel]
    wide: bool
    table: Table | None
    notes: list[str]
    missing: str


def write_report(paths: Sequence[Path], file: Path) -> Path:
    """The page of the runs under the paths. Returns the file.

    Raises SpecError for a path that does not exist or holds no run, and for a file that does not end in .html, StoreError
    where it cannot be written.
    """
    if file.suffix not in (".html", ".htm"):
        raise SpecError(f"--html: {str(file)!r} must end in .html")
    with open_runs(paths) as runs:
        if not runs.folders:
            raise SpecError(f"analyze: no runs under {', '.join(map(str, paths))}; clipctl train makes one")
        page = report(runs, ", ".join(map(str, paths)))
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"--html: {file} cannot be written: {error.strerror or error}") from None
    return file


def report(runs: Runs, where: str) -> str:
    """The page as text. where: the runs' paths, as the title names them."""
    import jinja2
    import markupsafe
    import vl_convert

    folder = resources.files("clipctl") / "page"
    style, template = ((folder / name).read_text() for name in ("report.css", "report.html"))
    # A script ends at the first `</script`, whatever it means by it.
    bundle, script = (
        text.replace("</script", "<\\/script")
        for text in (
            vl_convert.javascript_bundle("globalThis.vegaEmbed = vegaEmbed;"),
            (folder / "report.js").read_text(),
        )
    )
    overall = overview(runs)
    charted, note = charted_runs(runs)
    with open_runs(charted) as some:
        charts: dict[str, Any] = {}
        sections = [section(view, some, charts, note) for view in SHORT]
        groups, groups_note = sample_groups(some)
    specs, shared = spec_tables(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    raw = markupsafe.Markup
    return environment.from_string(template).render(
        title=f"{len(overall)} {'run' if len(overall) == 1 else 'runs'}: {safe_text(where)}",
        made_by=f"clipctl {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        policy="; ".join(
            [
                "default-src 'none'",
                f"script-src {' '.join(map(source_digest, (bundle, script)))}",
                "style-src 'unsafe-inline'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        style=raw(style),
        bundle=raw(bundle),
        script=raw(script),
        data=raw(inline_json({"charts": charts})),
        overview=table_of(overall.select(sorted(overall.column_names, key=_place)), OVERVIEW_HEADINGS),
        sections=sections,
        groups=groups,
        groups_note=groups_note,
        specs=specs,
        specs_note="There is one run." if len(overall) == 1 else "All runs have one spec.",
        shared=shared,
        environment=environment_table(runs),
    )


def _place(column: str) -> int:
    return FIRST.index(column) if column in FIRST else len(FIRST)


def charted_runs(runs: Runs) -> tuple[list[str], str]:
    """Folders of the runs that charts show, and a note where those are not all."""
    folders = dict(runs.sql("select run_id, path from runs").fetchall())
    arms = [arm for arm in arms_of(runs) if arm.runs]
    if len(arms) <= MOST_ARMS:
        return list(folders.values()), ""
    note = (
        f"Charts show the {MOST_ARMS} newest of {len(arms)} groups of runs; the table of runs has all. For others, give "
        "their paths to clipctl analyze."
    )
    return [folders[run] for arm in arms[-MOST_ARMS:] for run in arm.runs], note


def section(view: str, runs: Runs, charts: dict[str, Any], note: str) -> Section:
    """One view's charts, which are added to `charts`, and its table; or why it has none."""
    panels: list[Panel] = []
    table, notes, missing = None, [note] if note else [], ""
    try:
        for chart in CHARTS[view](runs, Options()):
            spec = chart.to_dict(validate=False)
            title = spec.pop("title", "")
            words = title if isinstance(title, dict) else {"text": title}
            key = f"{view}-{len(panels)}"
            panels.append(Panel(key, safe_text(str(words["text"])), safe_text(str(words.get("subtitle", "")))))
            charts[key] = packed({name: part for name, part in spec.items() if name not in ("$schema", "config")})
        if view in TABLES:
            answer = VIEWS_OF_ANALYZE[view](runs, Options())
            table = table_of(answer.table, HEADINGS.get(view, {}), MOST_ROWS)
            notes += [safe_text(text) for text in answer.notes[:MOST_NOTES]]
            if len(answer.notes) > MOST_NOTES:
                notes.append(f"And {len(answer.notes) - MOST_NOTES} more notes: clipctl analyze --view {view}")
    except SpecError as error:
        missing = safe_text(str(error).removeprefix(f"--view {view}: ").capitalize())
    title = "Training" if view == "overview" else TITLES[view]
    return Section(
        view if view != "overview" else "course",
        SHORT[view],
        title,
        EXPLAINED.get(view, ()),
        [] if missing else panels,
        COLUMNS.get(view) == 1,
        table,
        notes,
        missing,
    )


def packed(node: Any) -> Any:
    """A chart's specification with its rows by column, and with text that obeys nobody."""
    if isinstance(node, dict):
        if isinstance(node.get("values"), list) and node["values"] and isinstance(node["values"][0], dict):
            return {
                **{key: packed(value) for key, value in node.items() if key != "values"},
                "values": _by_column(node["values"]),
            }
        return {key: packed(value) for key, value in node.items()}
    if isinstance(node, list):
        return [packed(value) for value in node]
    return safe_text(node) if isinstance(node, str) else node


def _by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"packed": {"keys", "columns"}}`: a column is its values, or its different texts and each row's place among them."""
    columns: list[Any] = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        if any(isinstance(value, str) for value in values):
            texts = list(dict.fromkeys(values))
            place = {text: at for at, text in enumerate(texts)}
            columns.append({"values": packed(texts), "places": [place[value] for value in values]})
        else:
            columns.append(values)
    return {"packed": {"keys": list(rows[0]), "columns": columns}}


def inline_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends one, or begins a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def source_digest(script: str) -> str:
    """A script's name in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def table_of(table: "pa.Table", headings: Mapping[str, str], most: int | None = None) -> Table:
    """An Arrow table as cells, at most so many rows, with a note on the others."""
    rows = table.slice(0, most).to_pylist() if most is not None else table.to_pylist()
    note = f"{len(table) - len(rows)} more rows are left out here." if len(rows) < len(table) else ""
    names = [safe_text(headings.get(name, name)) for name in table.column_names]
    return Table(names, [[cell(value) for value in row.values()] for row in rows], note)


def cell(value: Any) -> Cell:
    """A value as text, and the number that it is sorted by; NULL is an empty cell."""
    if value is None:
        return Cell("")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, datetime):
        return Cell(f"{value:%Y-%m-%d %H:%M:%S}")
    if isinstance(value, int | float):
        shown = str(value) if isinstance(value, int) else "∞" if value == math.inf else f"{value:.4g}"
        return Cell(shown, repr(value) if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity")
    text = safe_text(str(value))
    return Cell(text, bars=bool(text) and set(text) <= {*BARS, " "})


def sample_groups(runs: Runs) -> tuple[list[dict[str, Any]], str]:
    """Samples of one prompt of some runs: title, question with its answer where they are stored, and for each sample its
    facts and its text in parts, clipped tokens apart."""
    chosen = chosen_groups(runs, Options())[:MOST_GROUPS]
    if not chosen:
        return [], ""
    rows = samples_view(runs, Options()).table.to_pylist()
    tokens = tokens_of(runs, chosen)
    groups = []
    for group in chosen:
        mine = [row for row in rows if row["run"] == group["run_id"]]
        title = f"{group['run_id']}, rollout {group['rollout']}, prompt {group['prompt_id']}: {len(mine)} samples"
        samples = [
            {"facts": facts(row), "parts": text_parts(row, tokens.get((row["run"], row["sample"]), []))} for row in mine
        ]
        question, answer = (visible(str(mine[0][name] or ""))[:MOST_LETTERS] for name in ("question", "answer"))
        groups.append({"title": safe_text(title), "question": question, "answer": answer, "samples": samples})
    note = "Of each run the last rollout's prompt with the most clipped tokens, with its whole group."
    return groups, note


def facts(row: Mapping[str, Any]) -> str:
    """A sample in a line."""
    words = [
        f"reward {_short(row['reward'])}",
        str(row["outcome"] or "not graded").replace("_", " "),
        f"advantage {_short(row['advantage'])}",
        f"entropy {_short(row['entropy'])} nat",
        f"{row['tokens']} tokens{', cut' if row['truncated'] else ''}",
    ]
    clips = [f"{row[f'clip_{side}']} × clip-{side}" for side in ("low", "high") if row[f"clip_{side}"]]
    return safe_text(" · ".join([*words, *clips]))


def text_parts(row: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A sample's text, its clipped tokens as parts of their own where tokens are stored."""
    if tokens:
        return [{"text": visible(text), "clip": clip} for text, clip in marked_parts(tokens)]
    text = row["text"]
    if text is None:
        return [{"text": "(texts are not stored: store.texts)", "clip": ""}]
    cut = f"\n… {len(text) - MOST_LETTERS} more letters" if len(text) > MOST_LETTERS else ""
    return [{"text": visible(text[:MOST_LETTERS]) + cut, "clip": ""}]


def visible(text: str) -> str:
    """`safe_text` that keeps lines and tabs."""
    return "\n".join("\t".join(map(safe_text, line.split("\t"))) for line in text.split("\n"))


def spec_tables(runs: Runs) -> tuple[Table | None, list[tuple[str, str]]]:
    """A row a run with the keys in which specs differ, and the keys that all share with their values."""
    specs = {run: spec for run, spec in specs_of(runs).items() if spec}
    keys = [key for key in differing(list(specs.values())) if key != "run.name"]
    first = next(iter(specs.values()), {})
    shared = [(safe_text(key), safe_text(value_text(first[key]))) for key in sorted(first) if key not in keys]
    if not keys:
        return None, [pair for pair in shared if pair[0] != "run.name"]
    rows = [[cell(run), *(_spec_cell(spec.get(key)) for key in keys)] for run, spec in specs.items()]
    return Table(["run", *map(safe_text, keys)], rows), [pair for pair in shared if pair[0] != "run.name"]


def _spec_cell(value: Any) -> Cell:
    if value == "Infinity":
        return cell(math.inf)
    return (
        cell(value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else Cell(safe_text(value_text(value)))
    )


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"


FIRST = ("run", "state", "verdict")
"""Columns that the page's overview begins with: the answer before its numbers."""
ENVIRONMENT = """
select run_id as run, state, preset, model, seed, created_at as started, finished_at as finished, version as clipctl,
    left(git_commit, 12) as commit, host, attempt, message, path
from runs order by created_at, run_id
"""


def environment_table(runs: Runs) -> Table:
    """Where, when and with what each run was made; versions of packages that all runs share stand once, in the note."""
    rows = runs.table(ENVIRONMENT).to_pylist()
    made_with = [read_json(Path(row.pop("path")) / "status.json", []).get("packages") for row in rows]
    versions = [found if isinstance(found, dict) else {} for found in made_with]
    shared = dict(set.intersection(*(set(found.items()) for found in versions))) if versions else {}
    for row, found in zip(rows, versions, strict=True):
        others = {name: version for name, version in found.items() if name not in shared}
        row["packages"] = _versions(others) or None
    if not any(row["packages"] for row in rows):
        rows = [{name: value for name, value in row.items() if name != "packages"} for row in rows]
    note = (
        f"All runs: {_versions({name: versions[0][name] for name in versions[0] if name in shared})}." if shared else ""
    )
    return Table([*map(safe_text, rows[0])], [[cell(value) for value in row.values()] for row in rows], note)


def _versions(found: Mapping[str, Any]) -> str:
    return safe_text(", ".join(f"{name} {version}" for name, version in found.items()))
