"""One sampled prompt with its group: what was answered, what it earned, and which tokens were clipped."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipctl.analysis.answer import Answer, Options, as_arrow, without
from clipctl.analysis.arms import _literal
from clipctl.errors import SpecError
from clipctl.store import Runs

SHOWN = 5
"""Clipped tokens that a row names."""
CHOSEN = """
with groups as (
    select run_id, rollout, position, any_value(prompt_id) as prompt_id,
        coalesce(sum(clip_low + clip_high), 0) as clipped, max(advantage) - min(advantage) as spread
    from samples where {where} group by all
)
select run_id, rollout, position, prompt_id from groups
qualify row_number() over (partition by run_id order by {newest} clipped desc, spread > 0 desc, position) = 1
order by run_id
"""
SAMPLES = """
select s.run_id as run, s.rollout, s.prompt_id, s.position, s.sample, s.reward, s.outcome, s.advantage, s.entropy, s.tokens,
    s.truncated, s.clip_low, s.clip_high, q.question, q.answer, s.text
from samples as s join {chosen} on s.run_id = c.run_id and s.rollout = c.rollout and s.position = c.position
    left join questions as q on q.run_id = s.run_id and q.rollout = s.rollout and q.position = s.position
order by run, s.sample
"""
TOKENS = """
select t.run_id as run, t.sample, t.token, t.token_id, t.entropy, t.clip_low, t.clip_high, t.text
from tokens as t join {chosen} on t.run_id = c.run_id and t.rollout = c.rollout and t.position = c.position
order by run, t.sample, t.token
"""


def chosen_groups(runs: Runs, options: Options) -> list[dict[str, Any]]:
    """The group of each run that is shown: of the asked or the last rollout and of the asked prompt, or else the one with the
    most clipped tokens. Raises SpecError where no run has such a group."""
    asked = []
    if options.rollout is not None:
        asked.append(f"rollout = {int(options.rollout)}")
    if options.prompt is not None:
        asked.append(f"prompt_id = {_literal(options.prompt)}")
    query = CHOSEN.format(
        where=" and ".join(asked) or "true", newest="rollout desc," if options.rollout is None else ""
    )
    rows: list[dict[str, Any]] = runs.table(query).to_pylist()
    if not rows and asked:
        known = runs.table(
            "select min(rollout) as first, max(rollout) as last, any_value(prompt_id) as prompt from samples"
        ).to_pylist()[0]
        raise SpecError(
            f"--view samples: no run has a sample with {' and '.join(asked)}; there are rollouts {known['first']} to "
            f"{known['last']}, and prompts such as {known['prompt']!r}"
        )
    return rows


def _chosen_sql(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = ", ".join(f"({_literal(group['run_id'])}, {group['rollout']}, {group['position']})" for group in groups)
    return f"(values {rows}) as c(run_id, rollout, position)"


def samples_view(runs: Runs, options: Options) -> Answer:
    """One group of each run, a row a sample: reward, outcome, advantage, mean entropy (nats), tokens, how many of them were
    clipped, the text, and, where tokens are stored, the most-clipped ones and the text with all of them marked."""
    groups = chosen_groups(runs, options)
    notes = without(runs, [group["run_id"] for group in groups], "samples", "samples")
    chosen = _chosen_sql(groups)
    rows = runs.table(SAMPLES.format(chosen=chosen)).to_pylist()
    tokens = tokens_of(runs, groups)
    for row in rows:
        mine = tokens.get((row["run"], row["sample"]), [])
        row["most_clipped"] = ", ".join(map(_named, most_clipped(mine))) if mine else None
        row["marked_text"] = marked_text(mine) if mine else None
    if not tokens:
        notes = (*notes, "no tokens are stored (store.tokens), so clipped ones cannot be named")
    return Answer(as_arrow(rows), notes)


def tokens_of(runs: Runs, groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Stored tokens of the groups by run and sample, in their order."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for token in runs.table(TOKENS.format(chosen=_chosen_sql(groups))).to_pylist():
        found.setdefault((token["run"], token["sample"]), []).append(token)
    return found


def times_clipped(token: Mapping[str, Any]) -> int:
    """Clips of either side; 0 where they are not known."""
    return (token["clip_low"] or 0) + (token["clip_high"] or 0)


def most_clipped(tokens: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tokens clipped most often, those of the highest entropy first among equals, at most SHOWN."""
    clipped = [token for token in tokens if times_clipped(token)]
    return sorted(clipped, key=lambda token: (-times_clipped(token), -token["entropy"]))[:SHOWN]


def token_text(token: Mapping[str, Any]) -> str:
    """The token's text, or its id where the text is not stored."""
    return f"<{token['token_id']}>" if token["text"] is None else str(token["text"])


def _named(token: Mapping[str, Any]) -> str:
    sides = [f"{side} × {token[f'clip_{side}']}" for side in ("low", "high") if token[f"clip_{side}"]]
    return f"{token['token']} {token_text(token)!r} {' '.join(sides)}"


def marked_text(tokens: Sequence[Mapping[str, Any]]) -> str:
    """The response with ⟪clipped tokens⟫ in brackets: ↓ behind them for clip-low, ↑ for clip-high."""
    parts = []
    for token in tokens:
        arrows = "↓" * bool(token["clip_low"]) + "↑" * bool(token["clip_high"])
        parts.append(f"⟪{token_text(token)}⟫{arrows}" if arrows else token_text(token))
    return "".join(parts)


def marked_parts(tokens: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The response in parts, each with `clip-low` or `clip-high` (the one that was more often) where it was clipped, else
    with an empty word."""
    parts: list[tuple[str, str]] = []
    for token in tokens:
        low, high = token["clip_low"] or 0, token["clip_high"] or 0
        clip = "" if not low + high else "clip-low" if low >= high else "clip-high"
        if parts and not clip and not parts[-1][1]:
            parts[-1] = (parts[-1][0] + token_text(token), "")
        else:
            parts.append((token_text(token), clip))
    return parts
