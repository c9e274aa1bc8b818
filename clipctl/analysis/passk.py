"""pass@k and mean@k, over k and over training, and against entropy.

Of evaluations where a run has some; else of the rollouts' own groups, which are training prompts at the training
temperature, and named so. Intervals of one run are BCa over problems; those of a mean over seeds are Student's t.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from clipctl.analysis.answer import Answer, Options, as_arrow, without
from clipctl.analysis.arms import Arm, arms_of, mean_and_interval
from clipctl.errors import SpecError
from clipctl.intervals import mean_interval, pass_at_k_values
from clipctl.spec import nearest
from clipctl.store import Runs

OWN_GROUPS = "own groups"
"""`benchmark` of a run without an evaluation."""
NEEDED = "evaluation and no graded group (clipctl eval --run makes one)"

SETTINGS = """
settings as (
    select *, count(distinct (temperature, top_p)) over (partition by benchmark) > 1 as several,
        row_number() over (partition by coalesce(run_id, model), benchmark, rollout, temperature, top_p
            order by started_at desc, eval_id desc) as newest
    from evaluations
)
"""
"""Evaluations with their place among those of one thing with the same settings, the newest first."""
EVALUATED = f"""
with {SETTINGS}
select coalesce(e.run_id, s.model) as series,
    e.benchmark || coalesce(case when several then printf(' T=%g p=%g', temperature, top_p) end, '') as benchmark,
    e.rollout, e.problem_id, count(*) as n, sum(e.correct::int) as c
from evals as e join settings as s on e.eval_id = s.eval_id and e.benchmark = s.benchmark
    and e.rollout is not distinct from s.rollout
where newest = 1 and e.correct is not null group by all
"""
"""Samples and correct ones of each problem; of two evaluations of one thing with the same settings, the newer one."""
OLDER = f"""
with {SETTINGS}
select coalesce(run_id, model) as series, benchmark, rollout,
    any_value(eval_id) filter (newest = 1) as shown, list(eval_id order by newest) filter (newest > 1) as others
from settings group by coalesce(run_id, model), benchmark, rollout, temperature, top_p having count(*) > 1 order by all
"""
GROUPED = f"""
select run_id as series, '{OWN_GROUPS}' as benchmark, rollout, position::varchar as problem_id, count(*) as n,
    sum((outcome = 'correct')::int) as c
from samples where outcome is not null and run_id not in (select run_id from evals where run_id is not null) group by all
"""
COUNTS = f"select * from ({EVALUATED} union all {GROUPED}) order by series, benchmark, rollout, problem_id"

Key = tuple[str, str, int | None]
"""Run (or the model that was evaluated by itself), benchmark, rollout (None of such a model)."""
Counts = tuple[np.ndarray, np.ndarray]
"""Samples and correct samples of each problem, int64 [P]."""


def counts_of(runs: Runs) -> dict[Key, Counts]:
    """Samples and correct ones by run, benchmark and rollout, in that order."""
    table = runs.table(COUNTS)
    keys = list(zip(*(table[name].to_pylist() for name in ("series", "benchmark", "rollout")), strict=True))
    n_N, c_N = (table[name].to_numpy().astype(np.int64) for name in ("n", "c"))
    starts = [at for at in range(len(keys)) if at == 0 or keys[at] != keys[at - 1]]
    return {keys[start]: (n_N[start:stop], c_N[start:stop]) for start, stop in pairwise([*starts, len(keys)])}


def chosen_counts(runs: Runs, options: Options) -> tuple[dict[Key, Counts], tuple[str, ...]]:
    """Those of `counts_of` that are of the benchmarks and have k samples of each problem; and a note for each benchmark of
    which some have not.

    Raises SpecError for a benchmark that no run has, and where nothing has k samples.
    """
    k = 1 if options.k is None else options.k
    if k < 1:
        raise SpecError(f"--k: at least 1, found {k}")
    counts = counts_of(runs)
    known = list(dict.fromkeys(_plain(benchmark) for _, benchmark, _ in counts))
    for name in options.benchmark if counts else ():
        if name not in known:
            raise SpecError(
                f"--benchmark: {name!r} is not what these runs have: {', '.join(known)}{nearest(name, known)}"
            )
    mine = {key: of for key, of in counts.items() if not options.benchmark or _plain(key[1]) in options.benchmark}
    enough = {key: of for key, of in mine.items() if of[0].min() >= k}
    if mine and not enough:
        most = max(int(n_P.min()) for n_P, _ in mine.values())
        raise SpecError(
            f"--k: {k}, and there are at most {most} samples of each problem; clipctl eval -k {k} takes more"
        )
    few: dict[str, list[str]] = {}
    for series, benchmark, _ in dict.fromkeys(key for key in mine if key not in enough):
        few.setdefault(benchmark, []).append(series)
    notes = (f"{name}: fewer than {k} samples of {', '.join(dict.fromkeys(of))}: left out" for name, of in few.items())
    return enough, tuple(notes)


def _plain(benchmark: str) -> str:
    """Its name without the settings that tell two evaluations of it apart."""
    return benchmark if benchmark == OWN_GROUPS else benchmark.split(" ")[0]


def passk_rows(runs: Runs, options: Options) -> list[dict[str, Any]]:
    """Rows of `passk_view`. Raises as `chosen_counts`."""
    return _rows_of(chosen_counts(runs, options)[0], arms_of(runs, options.by), options.k)


def _rows_of(counts: Mapping[Key, Counts], arms: Sequence[Arm], most: int | None) -> list[dict[str, Any]]:
    rollouts: dict[tuple[str, str], set[int]] = {}
    for series, benchmark, rollout in counts:
        rollouts.setdefault((series, benchmark), set()).update(set() if rollout is None else {rollout})
    single: dict[tuple[str, str, int | None, int], dict[str, Any]] = {}
    for (series, benchmark, rollout), (n_P, c_P) in counts.items():
        largest, whole = most or int(n_P.min()), _whole(benchmark, rollout, rollouts[series, benchmark])
        for k in powers_of_two(largest) if whole else sorted({1, largest}):
            single[series, benchmark, rollout, k] = _row(series, benchmark, rollout, k, n_P, c_P, interval=whole)
    means = (row for arm in arms if len(arm.runs) > 1 for row in _means(arm, single))
    return [*single.values(), *means]


def _whole(benchmark: str, rollout: int | None, rollouts: set[int]) -> bool:
    """Whether all k and intervals are made: own groups are as many as rollouts, so only of the first and the last."""
    return benchmark != OWN_GROUPS or rollout in (min(rollouts), max(rollouts))


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest k itself."""
    return sorted({*(1 << bit for bit in range(largest.bit_length())), largest})


def _row(
    series: str, benchmark: str, rollout: int | None, k: int, n_P: np.ndarray, c_P: np.ndarray, *, interval: bool
) -> dict[str, Any]:
    value_P = pass_at_k_values(n_P, c_P, k)
    found = mean_interval(value_P, np.random.default_rng(0)) if interval else None
    return {
        "series": series, "runs": 1, "benchmark": benchmark, "rollout": rollout, "k": k, "problems": value_P.size,
        "samples": int(n_P.min()), "pass_at_k": found.value if found else float(value_P.mean()),
        "pass_at_k_low": found.low if found else None, "pass_at_k_high": found.high if found else None,
        "interval": "BCa over problems" if found else None, "unreliable": found.note if found else None,
    }  # fmt: skip


def _means(arm: Arm, single: Mapping[tuple[str, str, int | None, int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over the runs of an arm, where at least two of them have the same measurement."""
    keys = dict.fromkeys(key[1:] for run in arm.runs for key in single if key[0] == run)
    for benchmark, rollout, k in keys:
        rows = [single[run, benchmark, rollout, k] for run in arm.runs if (run, benchmark, rollout, k) in single]
        if len(rows) > 1:
            mean, low, high = mean_and_interval([row["pass_at_k"] for row in rows])
            yield rows[0] | {
                "series": arm.name, "runs": len(rows), "pass_at_k": mean, "pass_at_k_low": low, "pass_at_k_high": high,
                "interval": "t over runs", "unreliable": None,
            }  # fmt: skip


def passk_view(runs: Runs, options: Options) -> Answer:
    """pass@k of every evaluation for k = 1 (mean@k), 2, 4, ... up to `k`, without it to the samples of a problem, with 95 %
    intervals; after the runs the means over seeds. All samples of a problem count for every k (Chen et al. 2021, Eq. 1).
    `unreliable` says why an interval is not to be relied on. Own groups have intervals, and every k, in a run's first and
    last rollout alone."""
    counts, few = chosen_counts(runs, options)
    rows = _rows_of(counts, arms_of(runs, options.by), options.k)
    notes = without(runs, [row["series"] for row in rows], "passk", needed(options))
    return Answer(as_arrow(rows), (*notes, *few, *own_groups(rows), *older(runs, options)))


def needed(options: Options) -> str:
    """What a run lacks of which the view shows nothing."""
    if not options.benchmark and options.k is None:
        return NEEDED
    of = f"evaluation of {' or '.join(options.benchmark)}" if options.benchmark else "evaluation or graded group"
    return of + (f" with {options.k} samples of each problem" if options.k else "")


def older(runs: Runs, options: Options) -> tuple[str, ...]:
    """A note for each measurement that was made several times, of which only the newest is shown."""
    return tuple(
        f"{row['series']}{'' if row['rollout'] is None else '@' + str(row['rollout'])}, {row['benchmark']}: "
        f"{row['shown']} is shown; older ones with its temperature and top-p are not: {', '.join(row['others'])}"
        for row in runs.table(OLDER).to_pylist()
        if not options.benchmark or row["benchmark"] in options.benchmark
    )


def own_groups(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A note that names the runs which have no evaluation."""
    own = dict.fromkeys(str(row["series"]) for row in rows if row["benchmark"] == OWN_GROUPS and row["runs"] == 1)
    few = ", ".join(list(own)[:5]) + (f" and {len(own) - 5} more" if len(own) > 5 else "")
    return (f"{few}: no evaluation; pass@k is of the rollouts' own groups, on training prompts",) if own else ()


FRONTIER = """
select run_id, rollout, entropy, entropy_normalized from rollouts where entropy is not null order by run_id, rollout
"""


def frontier_view(runs: Runs, options: Options) -> Answer:
    """mean@k and pass@k (without `k`: that of the samples of a problem) against entropy, one row a run, benchmark and rollout.

    Entropy is that of the same policy; for the policy after the last rollout, which has no rollout to be measured in, that
    of the last rollout: `entropy_rollout` says which.
    """
    counts, few = chosen_counts(runs, options)
    rows = _frontier_of(counts, runs, options)
    notes = without(runs, [row["series"] for row in rows], "frontier", needed(options))
    return Answer(as_arrow(rows), (*notes, *few, *own_groups(rows), *older(runs, options)))


def frontier_rows(runs: Runs, options: Options) -> list[dict[str, Any]]:
    """Rows of `frontier_view`, runs first, then means over the runs of an arm. Raises as `chosen_counts`."""
    return _frontier_of(chosen_counts(runs, options)[0], runs, options)


def _frontier_of(counts: Mapping[Key, Counts], runs: Runs, options: Options) -> list[dict[str, Any]]:
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    for row in runs.table(FRONTIER).to_pylist():
        measured.setdefault(row["run_id"], {})[row["rollout"]] = row
    rows: list[dict[str, Any]] = []
    for (run, benchmark, rollout), (n_P, c_P) in counts.items():
        near = [at for at in measured.get(run, {}) if rollout is not None and at <= rollout]
        if near:
            entropy, k = measured[run][max(near)], options.k or int(n_P.min())
            rows.append(
                {
                    "series": run,
                    "runs": 1,
                    "benchmark": benchmark,
                    "rollout": rollout,
                    "entropy_rollout": max(near),
                    "entropy": entropy["entropy"],
                    "entropy_normalized": entropy["entropy_normalized"],
                    "k": k,
                    "mean_at_k": float(pass_at_k_values(n_P, c_P, 1).mean()),
                    "pass_at_k": float(pass_at_k_values(n_P, c_P, k).mean()),
                }
            )
    return rows + [row for arm in arms_of(runs, options.by) if len(arm.runs) > 1 for row in _frontier_means(arm, rows)]


def _frontier_means(arm: Arm, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    mine: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["series"] in arm.runs:
            mine.setdefault((row["benchmark"], row["rollout"], row["k"]), []).append(row)
    averaged = ("entropy", "entropy_normalized", "mean_at_k", "pass_at_k")
    for group in mine.values():
        if len(group) > 1:
            means = {
                name: mean_and_interval([row[name] for row in group if row[name] is not None])[0] for name in averaged
            }
            yield {**group[0], "series": arm.name, "runs": len(group), **means}
