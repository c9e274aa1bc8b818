"""What an evaluation says: a table as lm-eval has it, JSON with everything, CSV; and against another one on the same problems."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipctl.errors import SpecError
from clipctl.eval_metrics import ProblemSamples, by_problem, comparisons, pass_intervals, samples_each, summary
from clipctl.folder import is_evaluation
from clipctl.formats import as_csv, as_table
from clipctl.intervals import Comparison, Interval
from clipctl.store import open_runs

SCHEMA_VERSION = 1
"""Of the JSON that `--format json` prints."""
DESCRIBING = ("response tokens", "truncated", "no answer")
"""Metrics that describe the samples and say nothing of how good they are."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation as it is stored: its `evaluations` rows and its problems, by benchmark; benchmarks without a finished
    problem have none."""

    eval_id: str
    facts: dict[str, dict[str, Any]]
    problems: dict[str, list[ProblemSamples]]


def find_evaluation(text: str, runs_dir: Path, option: str) -> Evaluation:
    """EVAL or RUN[@ROLLOUT], as a folder or a name in `runs_dir`: an evaluation's folder, or a run's own evaluation, without
    a rollout the last one. Raises SpecError where there is none."""
    name, at, rollout = text.partition("@")
    folder = next((path for path in (Path(name), runs_dir / name) if name and path.is_dir()), None)
    if folder is None:
        raise SpecError(f"{option}: no evaluation or run {name!r}, as a folder or in {runs_dir}")
    if at and not rollout.isdecimal():
        raise SpecError(f"{option}: {text!r}: what follows @ is a number of rollouts")
    folder = folder.resolve()
    wanted = "path is not null" if is_evaluation(folder) else "path is null"
    if rollout:
        wanted += f" and rollout = {int(rollout)}"
    with open_runs(folder) as runs:
        found = runs.table(f"select * from evaluations where {wanted} order by rollout").to_pylist()
        if not found:
            stored = runs.table("select distinct rollout from evaluations order by 1")["rollout"].to_pylist()
            listed = ", ".join(map(str, stored)) or "none"
            raise SpecError(f"{option}: {text!r} has no evaluation there; rollouts that were evaluated: {listed}")
        eval_id = found[-1]["eval_id"]
        quoted = eval_id.replace("'", "''")
        rows = runs.table(f"select * exclude (text) from evals where eval_id = '{quoted}'").to_pylist()
    facts = {row["benchmark"]: row for row in found if row["eval_id"] == eval_id}
    groups = {name: by_problem(row for row in rows if row["benchmark"] == name) for name in facts}
    return Evaluation(eval_id, facts, groups)


def shown_ks(n: int) -> list[int]:
    """The k of pass@k in a table: powers of two above 1, and n."""
    return sorted({k for k in (2**power for power in range(1, 16)) if k < n} | ({n} if n > 1 else set()))


def metric_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row for each benchmark and metric: mean@n, pass@k of some k, cons@n, lengths."""
    rows = []
    for benchmark, problems in evaluation.problems.items():
        if not problems:
            continue
        n = samples_each(problems)
        found = summary(problems)
        passes = pass_intervals(problems)
        first = {f"mean@{n}": found.pop(f"mean@{n}")} | {f"pass@{k}": passes[k] for k in shown_ks(n)}
        rows += [_row(benchmark, metric, interval, n) for metric, interval in (first | found).items()]
    return rows


def comparison_rows(first: Evaluation, second: Evaluation) -> list[dict[str, Any]]:
    """The same rows for first - second, of the benchmarks that both have. Raises SpecError where they share no problem."""
    rows = []
    for benchmark, problems in first.problems.items():
        other = second.problems.get(benchmark)
        found = comparisons(problems, other) if problems and other else None
        for metric, comparison in (found or {}).items():
            row = _row(benchmark, f"{metric} - {second.eval_id}", comparison.difference, samples_each(problems))
            rows.append(row | {"smallest_detectable": comparison.smallest_detectable, "power": comparison.power})
    if not rows:
        raise SpecError(f"--compare: {second.eval_id} shares no problem with {first.eval_id}")
    return rows


def _row(benchmark: str, metric: str, interval: Interval, n: int) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "metric": metric,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "problems": interval.problems,
        "n": n,
        "reliable": interval.reliable,
        "note": interval.note,
    }


def table_text(evaluation: Evaluation, other: Evaluation | None, terminal: bool) -> str:
    """The table, what is marked in it, and what the comparison can show."""
    import pyarrow as pa

    rows = metric_rows(evaluation)
    against = [] if other is None else comparison_rows(evaluation, other)
    notes = _notes([*rows, *against])
    shown = [
        {
            "benchmark": row["benchmark"],
            "metric": row["metric"],
            "value": f"{row['value']:.4g}",
            "±": f"{(row['high'] - row['low']) / 2:.2g}{'*' if _is_marked(row) else ''}",
            "95 % interval": f"{row['low']:.4g} … {row['high']:.4g}",
            "problems": row["problems"],
            "n": row["n"],
        }
        for row in [*rows, *against]
    ]
    lines = [*_heading(evaluation)]
    lines += [as_table(pa.Table.from_pylist(shown), terminal)] if shown else ["no problem is finished"]
    lines += [f"* {note}" for note in notes]
    if other is not None:
        lines += dict.fromkeys(f"{row['benchmark']}, {row['metric']}: {row['power']}" for row in against)
        lines += _differing(evaluation, other)
    return "\n".join(lines)


def _is_marked(row: Mapping[str, Any]) -> bool:
    """Whether the interval is shown as unreliable; lengths and shares of answers that do not vary are no finding."""
    return row["note"] is not None and row["metric"] not in DESCRIBING


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why intervals are marked, each reason once with the metrics that it is about."""
    about: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if _is_marked(row):
            about.setdefault((row["benchmark"], row["note"]), []).append(row["metric"])
    return [f"{benchmark} {', '.join(metrics)}: {note}" for (benchmark, note), metrics in about.items()]


def _heading(evaluation: Evaluation) -> list[str]:
    facts = next(iter(evaluation.facts.values()))
    lines = [
        f"{evaluation.eval_id} ({facts['state']}): {facts['model']}, {facts['k']} samples, temperature "
        f"{facts['temperature']:g}, top-p {facts['top_p']:g}, at most {facts['max_tokens']} tokens, seed {facts['seed']}"
    ]
    for name, row in evaluation.facts.items():
        if not row["complete"]:
            lines.append(f"{name} is incomplete: {row['problems_done'] or 0} of {row['problems']} problems")
        if row["reused_from"]:
            lines.append(f"{name}: reused from {row['reused_from']}")
    return lines


def _differing(first: Evaluation, second: Evaluation) -> list[str]:
    """Settings in which two evaluations differ beside the model."""
    names = (
        "k",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "template_hash",
        "chat_template_hash",
        "grader_version",
        "settings",
    )
    lines = []
    for benchmark in first.facts.keys() & second.facts.keys():
        one, two = first.facts[benchmark], second.facts[benchmark]
        differing = [name for name in names if one[name] != two[name]]
        if differing:
            lines.append(f"{benchmark}: the two differ in {', '.join(differing)} too")
    return sorted(lines)


def json_text(evaluation: Evaluation, other: Evaluation | None, terminal: bool) -> str:
    """Everything: settings, every metric, pass@k of every k, the comparison."""
    results = []
    for benchmark, facts in evaluation.facts.items():
        problems = evaluation.problems[benchmark]
        found: dict[str, Any] = {name: value for name, value in facts.items() if name not in ("eval_id", "benchmark")}
        metrics = {name: asdict(value) for name, value in summary(problems).items()} if problems else {}
        curve = [{"k": k} | asdict(value) for k, value in pass_intervals(problems).items()] if problems else []
        results.append({"benchmark": benchmark, "settings": found, "metrics": metrics, "pass_at_k": curve})
    answer: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "eval_id": evaluation.eval_id, "results": results}
    if other is not None:
        answer["comparison"] = {"with": other.eval_id, "results": _comparison_json(evaluation, other)}
        answer["comparison"]["notes"] = _differing(evaluation, other)
    return json.dumps(answer, indent=1, default=str)


def _comparison_json(first: Evaluation, second: Evaluation) -> list[dict[str, Any]]:
    comparison_rows(first, second)  # Raises where nothing is shared.
    pairs = {name: (problems, second.problems.get(name, [])) for name, problems in first.problems.items()}
    found = {name: comparisons(*pair) for name, pair in pairs.items() if all(pair)}
    return [
        {"benchmark": name, "metric": metric, "power": comparison.power, **_comparison_dict(comparison)}
        for name, metrics in found.items()
        for metric, comparison in (metrics or {}).items()
    ]


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return asdict(comparison.difference) | {
        "smallest_detectable": comparison.smallest_detectable,
        "zero_inside": comparison.zero_inside,
        "only_first": len(comparison.only_first),
        "only_second": len(comparison.only_second),
    }


def csv_text(evaluation: Evaluation, other: Evaluation | None, terminal: bool) -> str:
    """The rows of the table with full numbers."""
    import pyarrow as pa

    rows = metric_rows(evaluation) + ([] if other is None else comparison_rows(evaluation, other))
    names = ["benchmark", "metric", "value", "low", "high", "problems", "n", "reliable", "smallest_detectable", "note"]
    columns = {name: [row.get(name) for row in rows] for name in names}
    return as_csv(pa.table(columns), terminal)


FORMATS: dict[str, Callable[[Evaluation, Evaluation | None, bool], str]] = {
    "table": table_text,
    "json": json_text,
    "csv": csv_text,
}


def check_format(output: str) -> None:
    """Raises SpecError for a format that there is not."""
    if output not in FORMATS:
        raise SpecError(f"--format: {output!r} is not one of {', '.join(FORMATS)}")


def eval_report(folder: Path, output: str, terminal: bool, other: Evaluation | None = None) -> str:
    """What the evaluation in the folder says, against another one where it is given."""
    return FORMATS[output](find_evaluation(str(folder), folder.parent, "eval"), other, terminal)
