"""The command line: parse, call, print. No logic, and nothing heavy is imported before a command needs it."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from clipctl import __version__
from clipctl.errors import ClipctlError, Interrupted, Preempted, SpecError
from clipctl.interrupts import early

app = typer.Typer(
    name="clipctl",
    help="Train language models by RL with verifiable rewards, and see and control what clipping does to entropy.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Examples: clipctl train --preset tiny | clipctl train --preset qwen3b-gsm8k --eps-low 0.15 --no-clip-high "
    "--dry-run | clipctl analyze runs/",
)
presets_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The run specs that come with clipctl.")
models_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The models that presets name.")
app.add_typer(presets_app, name="presets")
app.add_typer(models_app, name="models")

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of the runs.")]


def _version(value: bool) -> None:
    if value:
        print(f"clipctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    pass


@app.command()
def train(
    preset: Annotated[str | None, typer.Option(help="A name of `clipctl presets list`.")] = None,
    spec: Annotated[Path | None, typer.Option(help="A TOML run spec, over the preset where both are given.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the spec; may be repeated.")
    ] = None,
    eps_low: Annotated[float | None, typer.Option(help="clip.low: clips ratios under 1 - F.")] = None,
    eps_high: Annotated[float | None, typer.Option(help="clip.high: clips ratios over 1 + F.")] = None,
    no_clip_low: Annotated[bool, typer.Option("--no-clip-low", help="Turn clip-low off (clip.low = 1).")] = False,
    no_clip_high: Annotated[bool, typer.Option("--no-clip-high", help="Turn clip-high off (clip.high = inf).")] = False,
    steps: Annotated[int | None, typer.Option(help="run.steps: rollouts.")] = None,
    seed: Annotated[int | None, typer.Option(help="run.seed.")] = None,
    model: Annotated[str | None, typer.Option(help="model.path: a known or hub name, a folder, a .gguf.")] = None,
    name: Annotated[str | None, typer.Option(help="run.name; without it <preset>-<date>-<4 hex>.")] = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(
            help="With --name: go on with a run of that name or start it; refuse one that exists; or that does not."
        ),
    ] = "auto",
    nproc: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Processes on this machine, one for each GPU; on many machines: torchrun or srun."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and why; start nothing.")] = False,
) -> None:
    """Train a model; prints the run's folder. With --name, the same command again goes on where the run was interrupted.

    Example: clipctl train --preset qwen3b-gsm8k --eps-low 0.15 --no-clip-high --name first
    """
    from clipctl.layers import nest
    from clipctl.spec import parse_assignment, preset_layer, read_toml, resolve_spec

    flags: dict[str, Any] = {
        "clip.low": _one_of("--eps-low", eps_low, "--no-clip-low", 1.0 if no_clip_low else None),
        "clip.high": _one_of("--eps-high", eps_high, "--no-clip-high", float("inf") if no_clip_high else None),
        "run.steps": steps,
        "run.seed": seed,
        "run.name": name,
        "model.path": model,
    }
    resolved = resolve_spec(
        preset_layer(preset) if preset is not None else {},
        read_toml(spec) if spec is not None else {},
        nest(dict(parse_assignment(text) for text in assignments or ())),
        nest({key: value for key, value in flags.items() if value is not None}),
    )
    from clipctl.launch import check_nproc, start_ranks
    from clipctl.rendezvous import find_seat, quiet_torch

    if nproc is not None:
        check_nproc(nproc)
    seat = find_seat()
    first = seat is None or seat.rank == 0
    if dry_run:
        from clipctl.attempts import foresee
        from clipctl.plan import make_plan, plan_lines

        processes = nproc or (seat.size if seat is not None else 1)
        plan, earlier = make_plan(resolved, processes), foresee(runs_dir, resolved, resume, processes)
        if first:
            print("\n".join([f"{'run:':16}{earlier}", *plan_lines(plan)]))
        return
    from clipctl.interrupts import catch_signals
    from clipctl.plan import clip_warnings

    for warning in clip_warnings(resolved) if first else ():
        print(f"warning: {warning}", file=sys.stderr)
    label = preset or (spec.stem if spec else resolved.data.task)
    if nproc is not None and nproc > 1:
        start_ranks(nproc, resolved.engine.threads)
        first = (seat := find_seat()) is not None and seat.rank == 0
    if seat is not None:
        quiet_torch()
    with catch_signals() as stop:
        # A signal counts from here on, while torch is still being loaded.
        with stop.interruptible():
            from clipctl.progress import show_progress
            from clipctl.train import train as run
        with show_progress(resolved.run.steps, shown=first) as (report, warn):
            folder = run(resolved, runs_dir=runs_dir, label=label, resume=resume, report=report, warn=warn)
    if first:
        print(folder)


@app.command("eval")
def evaluation(
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN[@ROLLOUT]", help="A run's folder or name; its last checkpoint, or that one."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model by itself: hub name, folder, .gguf file or known name.")
    ] = None,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            metavar="NAME",
            help="gsm8k, math500, amc23, aime24, aime25, svamp, arith, NAME=FILE or a file; may be repeated.",
        ),
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="eval.k: samples of each problem.")] = None,
    temperature: Annotated[float | None, typer.Option(help="eval.temperature; 0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="eval.top_p: the nucleus.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="eval.max_response_tokens.")] = None,
    limit: Annotated[int | None, typer.Option(help="eval.limit: the first N problems of each benchmark.")] = None,
    seed: Annotated[int | None, typer.Option(help="eval.seed: key of the draws.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any key of eval, model, engine, arith, grading; may be repeated."
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Folder name; without it made from what is evaluated.")] = None,
    output: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
    compare: Annotated[
        str | None,
        typer.Option(metavar="EVAL", help="An evaluation, or RUN[@ROLLOUT] with its own: paired on problems."),
    ] = None,
) -> None:
    """Evaluate a run's checkpoint or a model: mean@k, pass@k, cons@k with 95 % intervals over problems.

    The same command goes on where it was stopped, and shows the numbers again when it is finished.

    Examples: clipctl eval --run runs/tiny-a@40 --benchmark arith | clipctl eval --model qwen2.5-3b-instruct --benchmark
    gsm8k --benchmark math500 -k 8 --set engine.device=cuda
    """
    from clipctl.eval_report import check_format, eval_report, find_evaluation
    from clipctl.eval_spec import resolve_eval_spec
    from clipctl.layers import nest
    from clipctl.spec import parse_assignment

    check_format(output)
    if (run is None) == (model is None):
        raise SpecError("eval: give one of --run RUN[@ROLLOUT] and --model M")
    other = None if compare is None else find_evaluation(compare, runs_dir, "--compare")
    from clipctl.eval_runner import model_target, run_evaluation, run_target
    from clipctl.progress import show_eval_progress

    flags: dict[str, Any] = {
        "eval.benchmarks": tuple(benchmarks) if benchmarks else None,
        "eval.k": k,
        "eval.temperature": temperature,
        "eval.top_p": top_p,
        "eval.max_response_tokens": max_tokens,
        "eval.limit": limit,
        "eval.seed": seed,
    }
    resolved = resolve_eval_spec(
        run_target(run, runs_dir) if run is not None else model_target(str(model)),
        nest(dict(parse_assignment(text) for text in assignments or ())),
        nest({key: value for key, value in flags.items() if value is not None}),
    )
    with show_eval_progress() as (report, tell):
        folder = run_evaluation(resolved, runs_dir=runs_dir, name=name, report=report, tell=tell)
    print(eval_report(folder, output, sys.stdout.isatty(), other))


@app.command()
def sweep(
    preset: Annotated[
        str | None, typer.Option(help="A sweep, such as fig3, or a preset to vary; of `clipctl presets list`.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="A TOML sweep file, or a run spec to vary.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of all run specs; may be repeated.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key; with several --grid all combinations are run."),
    ] = None,
    zipped: Annotated[
        list[str] | None,
        typer.Option("--zip", metavar="KEY=V1,V2", help="The same, but the lists of all --zip go side by side."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="So many seeds of each, from run.seed on.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs at once, among which cores and GPUs are divided: 1, on Slurm all, where not given."
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes of each run on this machine, one for each GPU.")
    ] = None,
    launcher: Annotated[
        Literal["local", "slurm"], typer.Option(help="This machine, or an array of Slurm jobs that requeue themselves.")
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of sbatch: time=4:00:00, partition=..., gres=gpu:1, mem=32G."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="With slurm: until all runs have ended.")] = False,
    print_script: Annotated[
        bool, typer.Option("--print-script", help="With slurm: a script for sbatch instead of submitting.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run those again that failed.")] = False,
    name: Annotated[str | None, typer.Option(help="Folder of the sweep; without it made from what is swept.")] = None,
    runs_dir: RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the table of runs; start nothing.")] = False,
) -> None:
    """Run many specs, seeds and all; prints the sweep's folder. The same command again runs only what is missing.

    Examples: clipctl sweep --preset tiny --grid clip.low=0.1,0.2 --grid clip.high=0.1,inf --seeds 5 --jobs 2 | clipctl sweep
    --preset fig3 --dry-run
    """
    from clipctl.spec import parse_assignment
    from clipctl.sweep_spec import default_name, expand, file_sweep, parse_lists, preset_sweep, resolve_sweep

    if (preset is None) == (spec is None):
        raise SpecError("sweep: give one of --preset NAME and --spec FILE")
    if launcher == "slurm" and nproc is not None:
        raise SpecError("--nproc: on Slurm the tasks of a job are the processes of its run: --slurm ntasks=N")
    if launcher == "local" and (slurm or wait or print_script):
        raise SpecError("--slurm, --wait and --print-script: only with --launcher slurm")
    described = resolve_sweep(
        preset_sweep(preset) if preset is not None else file_sweep(Path(str(spec))),
        dict(parse_assignment(text) for text in assignments or ()),
        parse_lists(grid or (), "--grid"),
        parse_lists(zipped or (), "--zip"),
        seeds,
    )
    members = expand(described)
    title = default_name(preset or str(spec), described) if name is None else name
    from clipctl.sweep_folder import place_members, planning, record_sweep

    if dry_run:
        from clipctl.sweep_view import table_lines

        print("\n".join(table_lines(place_members(runs_dir, title, members), retry_failed=retry_failed)))
        return
    if launcher == "slurm":
        from clipctl import slurm as cluster

        options = cluster.parse_options(slurm or (), described.slurm)
        with planning(runs_dir):
            placed = place_members(runs_dir, title, members)
            folder = record_sweep(runs_dir, title, described, placed)
            if print_script:
                print(cluster.print_script(folder, placed, jobs or len(placed), options, retry_failed=retry_failed))
                return
            queued = cluster.submit(folder, placed, jobs or len(placed), options, retry_failed=retry_failed)
        print("\n".join(cluster.queue_lines(placed, queued)), file=sys.stderr, flush=True)
        if wait:
            cluster.wait_for_runs(folder, placed, lambda line: print(line, file=sys.stderr, flush=True))
        print(folder)
        return
    from clipctl.shares import share_machine
    from clipctl.sweep import run_sweep
    from clipctl.sweep_view import show_sweep, table_lines, views_lines

    shares, warnings = share_machine([member.spec.engine for member in members], jobs or 1)
    with planning(runs_dir):
        placed = place_members(runs_dir, title, members)
        folder = record_sweep(runs_dir, title, described, placed)
    lines = [*table_lines(placed, retry_failed=retry_failed), *(f"warning: {line}" for line in warnings)]
    print("\n".join(lines), file=sys.stderr, flush=True)
    with show_sweep(folder) as (tell, watch):
        run_sweep(folder, placed, shares, retry_failed=retry_failed, nproc=nproc, tell=tell, watch=watch)
    print("\n".join(f"draw it: {line}" for line in views_lines(described, folder)), file=sys.stderr)
    print(folder)


@app.command()
def analyze(
    paths: Annotated[list[Path], typer.Argument(help="Runs, folders of runs, or globs.")],
    sql: Annotated[
        str | None,
        typer.Option(
            help="One SELECT over the views runs, rollouts, updates, histograms, probes, samples, events, ..."
        ),
    ] = None,
    view: Annotated[
        str | None,
        typer.Option(
            help="overview (without --view), entropy, clip, ledger, passk, what-if, compare, frontier, samples or events."
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Group runs by a spec key; may be repeated. Without it: by all but the seed."),
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="For what-if: clip.low=... and clip.high=...")
    ] = None,
    rollouts: Annotated[bool, typer.Option("--rollouts", help="For ledger: every rollout, not the summary.")] = False,
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", help="For passk, frontier: of pass@k; without it all samples of a problem."),
    ] = None,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option("--benchmark", metavar="NAME", help="For passk, frontier: of this one; may be repeated."),
    ] = None,
    rollout: Annotated[int | None, typer.Option(help="For samples: of this rollout; without it the last.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For samples: of this prompt_id.")] = None,
    output: Annotated[
        str | None,
        typer.Option("--format", help="table, json, csv, parquet or md; else by --out's suffix, else table."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to FILE.json, .csv, .parquet, .md or .txt: complete or not at all.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Show the runs as they go; q or Ctrl-C ends it. A pipe gets a line per rollout."),
    ] = False,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="FORMAT DIR", help="Write each run to a folder in DIR for another tracker: tensorboard or wandb."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the view too: FILE.png, FILE.svg or FILE.html.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write everything to one page, REPORT.html, that needs no network.")
    ] = None,
) -> None:
    """Read runs, finished, live or broken, and print a view or the answer to a query.

    \b
    overview   a row for each run            clipctl analyze runs/
    entropy    both definitions, normalized  clipctl analyze runs/ --view entropy --plot entropy.png
    clip       sided fractions, ratios       clipctl analyze runs/ --view clip --format csv
    ledger     who pulls at entropy          clipctl analyze runs/ --view ledger --rollouts
    passk      pass@k over k and training    clipctl analyze runs/ --view passk --by clip.low --plot passk.svg
    what-if    other ε, to first order       clipctl analyze runs/ --view what-if --grid clip.low=0.1,0.2
    compare    groups of runs, intervals     clipctl analyze runs/ --view compare --by clip.high
    frontier   pass@k against entropy        clipctl analyze runs/ --view frontier --plot frontier.html
    samples    one prompt with its group     clipctl analyze runs/a --view samples --rollout 3
    events     alarms, control, ends         clipctl analyze runs/ --view events
    a query                                  clipctl analyze runs/ --sql "select run_id, entropy from rollouts"
    """
    from clipctl.analysis import Options, check_together

    given = {
        "--follow": follow, "--html": html, "--export": export, "--sql": sql, "--view": view, "--plot": plot, "--by": by,
        "--grid": grid, "--rollouts": rollouts, "--rollout": rollout, "--prompt": prompt, "--k": k, "--benchmark": benchmarks,
        "--format": output, "--out": out,
    }  # fmt: skip
    check_together([option for option, value in given.items() if value is not None and value is not False])
    if follow:
        from clipctl.follow import follow as show

        show(paths)
        return
    if html is not None:
        from clipctl.report import write_report

        print(write_report(paths, html))
        return
    if export is not None:
        from clipctl.exporters import export_paths

        print("\n".join(map(str, export_paths(paths, *export))))
        return
    from clipctl.analyze import analyze as answer
    from clipctl.limits import ended_by_signals

    if sql is not None:
        from clipctl.limits import limit_memory

        limit_memory()
    options = Options(tuple(grid or ()), tuple(by or ()), rollout, prompt, rollouts, k, tuple(benchmarks or ()))
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    with ended_by_signals():
        printed = answer(
            paths, sql, output, terminal, view=view or "overview", options=options, plot=plot, out=out, width=width
        )
        for note in printed.notes:
            print(f"note: {note}", file=sys.stderr)
        for part in printed.parts:
            sys.stdout.buffer.write(part)
        sys.stdout.flush()


@app.command()
def theory(
    trials: Annotated[int, typer.Option(help="Random pairs of policies.")] = 200,
    states: Annotated[int, typer.Option(help="States of each policy.")] = 3,
    actions: Annotated[int, typer.Option(help="Actions of each state.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    eps_low: Annotated[float | None, typer.Option(help="Fixed; without it drawn for each trial.")] = None,
    eps_high: Annotated[float | None, typer.Option(help="Fixed; without it drawn for each trial.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the many-step mode.")] = 192,
    output: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
    plot: Annotated[Path | None, typer.Option(help="Write a chart: FILE.png, FILE.svg or FILE.html.")] = None,
) -> None:
    """Check the paper's theorems on tabular policies, by enumeration: predicted against true change of entropy, where the
    inequalities hold and where they fail, and what clipping does over many steps.

    Example: clipctl theory --plot theory.png
    """
    from clipctl.theory_report import Options, theory_report

    options = Options(trials, states, actions, seed, eps_low, eps_high, steps)
    print(theory_report(options, output, plot, sys.stdout.isatty()))


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN[@ROLLOUT]", help="A run's folder or name; its last checkpoint, or that one.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new or empty folder.")],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a run's policy as a plain transformers folder: safetensors, tokenizer, generation config, model card; prints it.

    Example: clipctl export tiny-a@20 --to policies/tiny-a-20
    """
    from clipctl.export import export as write

    print(write(run, to, runs_dir))


@app.command()
def doctor(
    preset: Annotated[
        str | None, typer.Option(help="Also what this preset needs; exit 3 where something lacks.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="The same of a TOML run spec, over the preset.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the spec; may be repeated.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    output: Annotated[Literal["text", "json"], typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """Look at this machine: versions, engines, GPUs, memory, disk, hub, threads, Slurm, compilers; a line for each, with what
    mends it where something is wrong. Starts nothing, downloads nothing.

    Example: clipctl doctor --preset qwen3b-gsm8k --set engine.device=cuda
    """
    from clipctl.doctor import FORMATS, check_needs, examine
    from clipctl.layers import nest
    from clipctl.spec import parse_assignment, preset_layer, read_toml, resolve_spec

    layers = [
        preset_layer(preset) if preset is not None else {},
        read_toml(spec) if spec is not None else {},
        nest(dict(parse_assignment(text) for text in assignments or ())),
    ]
    resolved = resolve_spec(*layers) if any(layers) else None
    findings = examine(resolved, runs_dir)
    print(FORMATS[output](findings))
    check_needs(findings, preset or (str(spec) if spec else "clipctl" if resolved is None else "this spec"))


@presets_app.command("list")
def presets_list() -> None:
    """Name and first line of every preset, and of every sweep."""
    from clipctl.spec import preset_names, preset_text
    from clipctl.sweep_spec import sweep_names, sweep_text

    texts = {name: preset_text(name) for name in preset_names()} | {name: sweep_text(name) for name in sweep_names()}
    width = max(map(len, texts))
    for preset, text in texts.items():
        print(f"{preset:{width}}  {text.splitlines()[0].lstrip('# ')}")


@presets_app.command("show")
def presets_show(name: str) -> None:
    """The TOML text of a preset, or of a sweep."""
    from clipctl.spec import preset_text
    from clipctl.sweep_spec import sweep_names, sweep_text

    print(sweep_text(name) if name in sweep_names() else preset_text(name), end="")


@presets_app.command("schema")
def presets_schema() -> None:
    """The JSON Schema of a run spec, for editors."""
    from clipctl.spec import schema_json

    print(schema_json())


@models_app.command("list")
def models_list() -> None:
    """The known models: name, hub name, parameters, where they are."""
    from clipctl.models import model_lines

    print("\n".join(model_lines()))


@models_app.command("pull")
def models_pull(name: str) -> None:
    """Get a model into the cache; prints its folder."""
    from clipctl.models import pull_model

    print(pull_model(name))


def _one_of(flag: str, value: float | None, off_flag: str, off_value: float | None) -> float | None:
    if value is not None and off_value is not None:
        raise SpecError(f"{flag} and {off_flag} contradict each other; give one of them")
    return value if value is not None else off_value


def _stop_early(number: int, frame: object) -> None:
    # A terminal that closes and its shell both send SIGHUP; the second one must not end the ending.
    if not early:
        early.append(signal.Signals(number).name)
        raise KeyboardInterrupt


_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""Of all wrong usage; typer has no public name for it."""


def _refuse_usage(error: Any) -> NoReturn:
    from pydantic import ValidationError

    if isinstance(error.__cause__, ValidationError):
        from clipctl.spec import option_line

        _end(error.exit_code, f"clipctl: {error.param.opts[0]}: {option_line(error.__cause__)}", False)
    error.show()
    sys.exit(error.exit_code)


def _end(code: int, line: str, told: bool) -> NoReturn:
    # The code is decided: a further signal must not change it while Python shuts down.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        if not told:
            print(line, file=sys.stderr, flush=True)
    except OSError:
        # A log on a full disk. Python would try once more when it ends, and end with a code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(code)


def _end_interrupted() -> NoReturn:
    if early:
        _end(Preempted.exit_code, f"clipctl: stopped by {early[0]}; the same command goes on", False)
    sys.exit(Interrupted.exit_code)


def main() -> NoReturn:
    """Run the command line; user errors become one line on stderr and their exit code."""
    debug = "--debug" in sys.argv
    # A shell script's background job starts with SIGINT ignored, which must end a run cleanly; one under nohup with SIGHUP
    # ignored, which stays so.
    heeded = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    for number in (signal.SIGINT, *heeded):
        signal.signal(number, signal.default_int_handler)
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command == "analyze":
        from clipctl.limits import give_way

        give_way()
    try:
        if command in ("train", "sweep", "eval"):
            # Those that go on: what a scheduler sends before they have handlers of their own is a request like later ones.
            for number in (*heeded, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, _stop_early)
        # The launcher of deepspeed adds --local_rank to every command line.
        words = [word for word in sys.argv[1:] if word != "--debug" and not word.startswith("--local_rank=")]
        if code := app(args=words, standalone_mode=False):
            sys.exit(code)
    except SystemExit as end:
        if end.code == Interrupted.exit_code:
            _end_interrupted()
        if isinstance(end.__context__, BrokenPipeError):
            # Typer ends with 1 there.
            sys.exit(0)
        raise
    except KeyboardInterrupt:
        _end_interrupted()
    except _USAGE_ERROR as error:
        _refuse_usage(error)
    except BrokenPipeError:
        # Whoever read has enough; what Python would still flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ClipctlError as error:
        if debug:
            raise
        _end(error.exit_code, f"clipctl: {error}", error.told)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _end(
                7, f"clipctl: {error.filename or 'output'} cannot be written: {error.strerror}; free some space", False
            )
        line = f"clipctl: a bug in clipctl: {type(error).__name__}: {error}; run again with --debug and report it"
        _end(1, line, getattr(error, "told", False))
    sys.exit(0)
