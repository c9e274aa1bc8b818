"""Two runs compared: everything that is stored of them but times, attempts, and what is told of interruptions."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from clipctl import open_runs

SMALL: dict[str, Any] = {
    "run.name": "x",
    "run.steps": 3,
    "data.arith.problems": 64,
    "rollout.prompts": 6,
    "rollout.group_size": 4,
    "rollout.max_response_tokens": 12,
    "rollout.dynamic_sampling": True,
    "optim.responses_per_update": 8,
    "optim.epochs": 2,
    "optim.lr": 1e-3,
    "ledger.probe_states": 16,
    "ledger.probe_every": 2,
    "ledger.network_every": 2,
    "control.target_entropy": 0.5,
    "store.tokens": "all",
}
"""Everything that a run carries: refills, probes through the network, a controller, tokens; six updates a rollout."""
VIEWS = {
    "rollouts": "rollout",
    "updates": "rollout, inner_step",
    "samples": "rollout, position, sample",
    "texts": "rollout, position, sample",
    "tokens": "rollout, position, sample, token",
    "histograms": "rollout, inner_step, advantage_sign, ratio_from",
    "probes": "rollout, inner_step",
    "noise": "source, quantile",
    "questions": "rollout, position",
    "evaluations": "rollout, benchmark",
    "evals": "rollout, benchmark, position, sample",
    "events": "rollout, kind, message",
}
OF_ATTEMPTS = ("processes", "resumed", "interrupted", "failed", "checkpoint_damaged", "status_damaged")


def stored(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """View → its rows in order, without times and attempts."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    with open_runs(folder) as runs:
        for view, order in VIEWS.items():
            columns = [name for name in runs.sql(f"from {view} limit 0").columns if not _is_time(name)]
            if view == "events":
                # How long an evaluation took is told in words.
                columns[columns.index("message")] = "regexp_replace(message, ', [0-9.]+ s', '') as message"
            where = f"where kind not in {OF_ATTEMPTS}" if view == "events" else ""
            found[view] = runs.sql(f"select {', '.join(columns)} from {view} {where} order by {order}").fetchall()
        (problem,) = runs.sql("select problem from runs").fetchall()
        found["problems"] = [problem]
    return found


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, weights and optimizer, by file and name."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[f"{file.name}/{name}"] = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def assert_same(run: Path, other: Path, rollouts: int) -> None:
    """Both runs have stored the same, bit for bit, and end with the same weights and optimizer."""
    one, two = stored(run), stored(other)
    for view in one:
        assert one[view] == two[view], view
    assert one["rollouts"], "nothing is stored"
    weights, others = (tensors(folder / "checkpoints" / str(rollouts)) for folder in (run, other))
    assert weights.keys() == others.keys()
    differing = [name for name in weights if weights[name] != others[name]]
    assert differing == [], f"{differing[:5]} of {len(weights)}"


def differences(run: Path, other: Path, *, relative: float, absolute: float) -> dict[str, list[str]]:
    """View → what differs between two runs: all that is no float, and floats that are not as close as that."""
    one, two = stored(run), stored(other)
    found: dict[str, list[str]] = {}
    for view in one:
        if len(one[view]) != len(two[view]):
            found[view] = [f"{len(one[view])} rows, {len(two[view])} rows"]
            continue
        pairs = [
            (a, b) for left, right in zip(one[view], two[view], strict=True) for a, b in zip(left, right, strict=True)
        ]
        apart = [f"{a} {b}" for a, b in pairs if a != b and not _are_close(a, b, relative, absolute)]
        if apart:
            found[view] = apart
    return found


def _are_close(one: Any, two: Any, relative: float, absolute: float) -> bool:
    floats = isinstance(one, float) and isinstance(two, float)
    return floats and abs(one - two) <= absolute + relative * max(abs(one), abs(two))


def _is_time(column: str) -> bool:
    return column in ("run_id", "eval_id", "path", "attempt", "time", "started_at", "seconds") or column.startswith(
        "seconds_"
    )
