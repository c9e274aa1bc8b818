"""The command line as a user types it: real processes, exit codes, one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "transformers", "vllm", "deepspeed", "duckdb", "pyarrow", "rich", "altair")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("CLIPCTL_DATA", None)


@pytest.mark.parametrize(("command", "more"), [("analyze", 10), ("train", 0)])
def test_what_looks_at_runs_gives_way_to_them(command: str, more: int) -> None:
    script = (
        "import os, sys, clipctl.cli\n"
        "clipctl.cli.app = lambda **_: print(os.nice(0))\n"
        f"sys.argv = ['clipctl', '--debug', {command!r}]\n"
        "clipctl.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == min(19, os.nice(0) + more)


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGHUP", 75), ("SIGINT", 130)]
)
def test_a_signal_before_a_run_has_handlers_is_a_request_too(
    command: str, name: str, code: int, tmp_path: Path
) -> None:
    """It comes while the preset is read."""
    script = (
        "import os, signal, sys, time, clipctl.cli, clipctl.spec, clipctl.sweep_spec\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"def read(name): os.kill(os.getpid(), signal.{name}); time.sleep(9)\n"
        "clipctl.spec.preset_layer = clipctl.sweep_spec.preset_sweep = read\n"
        f"sys.argv = ['clipctl', {command!r}, '--preset', 'tiny']\n"
        "clipctl.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == ("" if code == 130 else f"clipctl: stopped by {name}; the same command goes on\n")


@pytest.mark.parametrize(
    ("before", "code", "words"), [("SIG_DFL", 75, "stopped by SIGHUP; the same"), ("SIG_IGN", 2, "no preset")]
)
def test_a_terminal_that_closes_before_a_run_has_handlers(before: str, code: int, words: str) -> None:
    """Its shell sends SIGHUP as well, or SIGTERM: both wait here when the first one is answered. nohup has it ignored."""
    script = (
        "import os, signal, sys, clipctl.cli, clipctl.spec\n"
        f"signal.signal(signal.SIGHUP, signal.{before})\n"
        "read, both = clipctl.spec.preset_layer, {signal.SIGHUP, signal.SIGUSR1}\n"
        "def reading(name):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        f"    for number in both if {code} == 75 else [signal.SIGHUP]: os.kill(os.getpid(), number)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\n"
        "    return read(name)\n"
        "clipctl.spec.preset_layer = reading\n"
        "sys.argv = ['clipctl', 'train', '--preset', 'tinny']\n"
        "clipctl.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert words in done.stderr


def clipctl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipctl", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=300,
        check=False,
    )


def refused(code: int, *arguments: str, **environment: str) -> str:
    """The one line of a command that must fail with this exit code."""
    done = clipctl(*arguments, **environment)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("clipctl: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["doctor", "--help"], ["analyze", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom clipctl.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert end.code == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_names_every_command_and_option() -> None:
    assert all(
        command in clipctl("--help").stdout for command in ("train", "analyze", "export", "doctor", "presets", "models")
    )
    options = clipctl("train", "--help").stdout
    for option in ("preset", "spec", "set", "eps-low", "eps-high", "no-clip-low", "no-clip-high", "steps", "seed",
                   "model", "name", "runs-dir", "dry-run"):  # fmt: skip
        assert f"--{option}" in options


def test_the_missions_line_answers_without_gpu_and_network() -> None:
    done = clipctl("train", "--preset", "qwen3b-gsm8k", "--eps-low", "0.15", "--no-clip-high", "--dry-run")
    assert done.returncode == 0
    for words in ("Qwen/Qwen2.5-3B-Instruct", "4096 responses", "16 updates", "15 of them can clip", "ε_low 0.15",
                  "clip-high off", "1/N", "memory", "disk"):  # fmt: skip
        assert words in done.stdout
    assert done.stderr == ""


def test_views_of_a_run(tmp_path: Path) -> None:
    """The ledger and what-if, in table and JSON, and what is said of wrong grids and views."""
    runs = str(tmp_path / "runs")
    small = ["--set", "rollout.prompts=8", "--set", "optim.lr=3e-4", "--steps", "2", "--runs-dir", runs, "--name", "a"]
    assert clipctl("train", "--preset", "tiny", *small).returncode == 0
    ledger = json.loads(clipctl("analyze", runs, "--view", "ledger", "--format", "json").stdout)["rows"]
    assert [row["step"] for row in ledger] == ["1 policy gradient", "2 natural gradient", "3 through the network"]
    for row in ledger:
        shares = [row[name] for name in row if name.startswith("pull_") and row[name] is not None]
        assert sum(map(abs, shares)) == pytest.approx(1)
    assert "high down" in clipctl("analyze", runs, "--view", "ledger").stdout
    grid = ["--grid", "clip.low=0.1,0.137", "--grid", "clip.high=0.2,inf"]
    rows = json.loads(clipctl("analyze", runs, "--view", "what-if", *grid, "--format", "json").stdout)["rows"]
    assert [(row["eps_low"], row["eps_high"], row["note"]) for row in rows] == [
        (0.1, 0.1, "as run"),
        (0.1, 0.2, "first order"),
        (0.1, "Infinity", "first order"),
        (0.137, 0.2, "first order, interpolated"),
        (0.137, "Infinity", "first order, interpolated"),
    ]
    assert rows[2]["pg_clip_high"] == rows[2]["clip_high_percent"] == 0
    query = "select sum(pg_clip_low) as low, 100 * sum(clip_high) / sum(tokens) as high from updates"
    (recorded,) = json.loads(clipctl("analyze", runs, "--sql", query, "--format", "json").stdout)["rows"]
    assert rows[0]["pg_clip_low"] == pytest.approx(recorded["low"], rel=1e-6)
    assert rows[0]["clip_high_percent"] == pytest.approx(recorded["high"])
    for arguments, words in (
        (["--view", "front"], "--view: 'front' is not one of overview, entropy, clip, ledger, passk, what-if, compare"),
        (
            ["--view", "what-if", "--grid", "clip.mid=1"],
            "'clip.mid=1' must be clip.low=V1,V2,... or clip.high=V1,V2,...",
        ),
        (["--view", "what-if", "--grid", "clip.low=1.5"], "clip.low = 1.5 is not from 0 to 1"),
        (["--view", "what-if", "--grid", "clip.high=a"], "'a' in 'clip.high=a' is not a number"),
        (["--grid", "clip.high=1"], "belongs to --view what-if"),
        (["--view", "ledger", "--sql", "select 1"], "leave --view out"),
    ):
        refused = clipctl("analyze", runs, *arguments)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
        assert words in refused.stderr


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    for name in ((), ("--name", "a")):
        assert clipctl(*TRAIN, "--dry-run", "--runs-dir", str(tmp_path / "runs"), *name).returncode == 0
    assert not (tmp_path / "runs").exists()
    (tmp_path / "a").mkdir()
    assert "'a' exists in" in refused(
        2, *TRAIN, "--dry-run", "--name", "a", "--resume", "never", "--runs-dir", str(tmp_path)
    )


def test_a_run_and_its_analysis(tmp_path: Path) -> None:
    runs = str(tmp_path / "runs")
    arguments = ["train", "--preset", "tiny", "--steps", "2", "--name", "a", "--eps-low", "0.15", "--no-clip-high"]
    small = ["--set", "rollout.prompts=8", "--set", "optim.epochs=1", "--runs-dir", runs]
    done = clipctl(*arguments, *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{runs}/a"
    lines = done.stderr.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith("alarm: ")] == ["rollout 1/2", "rollout 2/2"]
    query = "select name, eps_low, eps_high, state from runs"
    answer = json.loads(clipctl("analyze", runs, "--sql", query, "--format", "json").stdout)
    assert answer["rows"] == [{"name": "a", "eps_low": 0.15, "eps_high": "Infinity", "state": "finished"}]
    overview = clipctl("analyze", runs).stdout
    assert "finished" in overview
    assert "a" in overview
    assert "…" not in overview
    csv = clipctl("analyze", runs, "--sql", "select rollout from rollouts order by 1", "--format", "csv").stdout
    assert csv.split() == ["rollout", "0", "1"]


def test_a_run_without_a_name_gets_preset_date_and_hex(tmp_path: Path) -> None:
    done = clipctl("train", "--preset", "tiny", "--steps", "1", "--set", "rollout.prompts=4", "--set",
                   "optim.epochs=1", "--runs-dir", str(tmp_path))  # fmt: skip
    name = Path(done.stdout.strip()).name
    import re

    assert re.fullmatch(r"tiny-\d{8}-\d{6}-[0-9a-f]{4}", name)


def test_a_preset_under_a_file_under_set_under_a_flag(tmp_path: Path) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text("[run]\nsteps = 7\nseed = 7\n[clip]\nlow = 0.3\nhigh = inf\n")
    done = clipctl("train", "--preset", "tiny", "--spec", str(spec), "--set", "clip.low=0.4", "--set", "run.seed=8",
                   "--eps-low", "0.5", "--dry-run")  # fmt: skip
    assert "ε_low 0.5, clip-high off" in done.stdout
    assert "7 rollouts" in done.stdout


def test_a_warning_where_clipping_cannot_have_an_effect() -> None:
    done = clipctl("train", "--preset", "tiny", "--set", "optim.responses_per_update=512", "--set", "optim.epochs=1",
                   "--eps-low", "0.1", "--dry-run")  # fmt: skip
    assert "warning: one update a rollout" in done.stdout


TRAIN = ("train", "--preset", "tiny")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), "model.path"),
        (("train", "--preset", "tinny"), "did you mean tiny?"),
        ((*TRAIN, "--set", "clip.lwo=0.1"), "clip.lwo: unknown key (did you mean clip.low?)"),
        ((*TRAIN, "--set", "stpes=3"), "stpes: unknown key (did you mean run.steps?)"),
        ((*TRAIN, "--set", "clip.low"), "'clip.low' is not KEY=VALUE"),
        ((*TRAIN, "--eps-low", "1.5"), "clip.low: input should be less than or equal to 1, found 1.5"),
        ((*TRAIN, "--eps-low=-0.1"), "clip.low: input should be greater than or equal to 0, found -0.1"),
        ((*TRAIN, "--eps-high", "0.3", "--no-clip-high"), "--eps-high and --no-clip-high contradict each other"),
        ((*TRAIN, "--eps-low", "0.3", "--no-clip-low"), "--eps-low and --no-clip-low contradict each other"),
        ((*TRAIN, "--set", "optim.responses_per_update=24"), "optim.responses_per_update = 24 does not divide"),
        ((*TRAIN, "--set", "optim.responses_per_update=4"), "optim.responses_per_update = 4 would split a group"),
        ((*TRAIN, "--name", "a/b"), "run.name 'a/b' is not allowed"),
        ((*TRAIN, "--name", "../b"), "run.name '../b' is not allowed"),
        ((*TRAIN, "--steps", "x"), "--steps: input should be a whole number, found 'x'"),
        ((*TRAIN, "--eps-low", "x"), "--eps-low: input should be a number, found 'x'"),
        ((*TRAIN, "--resume", "x"), "--resume: 'x' is not one of 'auto', 'never', 'must'"),
        (("sweep", "--preset", "tiny", "--seeds", "0"), "--seeds: input should be greater than or equal to 1, found "),
        (("analyze", ".", "-k", "1.5"), "--k: input should be a whole number, found '1.5'"),
        ((*TRAIN, "--name", ""), "run.name '' is not allowed"),
        (("train", "--preset", "", "--model", "tiny"), "''"),
        (("doctor", "--preset", ""), "''"),
        (("sweep", "--preset", "tiny", "--name", "", "--dry-run"), "--name: '' is not allowed: letters, digits"),
        (
            ("eval", "--model", "tiny", "--benchmark", "arith", "--name", ""),
            "--name: '' is not allowed: letters, digits",
        ),
        ((*TRAIN, "--set", "rollout.top_p=0.9"), "rollout.top_p = 0.9"),
        ((*TRAIN, "--set", "data.task=gms8k"), "did you mean gsm8k?"),
        ((*TRAIN, "--spec", "/nowhere/spec.toml"), "--spec: no file '/nowhere/spec.toml'"),
        (("analyze", "/nowhere"), "/nowhere"),
        (("presets", "show", "tinny"), "did you mean tiny?"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    extra = ("--runs-dir", str(tmp_path)) if arguments[0] == "train" else ()
    assert words in refused(2, *arguments, *extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "no rows"),
        ('{"question": "1 + 1"}\n', "answer"),
        ('{"question": "1 + 1", "answer": "2"}\n{"question": "1 + 2", "answer": ""}\n', "row"),
        ('{"question": "1 + 1", "answer": "two"}\n', "no number"),
        ('{"question": \n', "JSON"),
        ('{"question": "1 + 1", "answer": ' + "9" * 5000 + "}\n", "not JSON"),
        ("[" * 100_000 + "\n", "not JSON"),
        ('{"question": "\\ud800", "answer": "2"}\n', "surrogate"),
    ],
)
def test_unusable_data_is_one_line_and_exit_4(rows: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows)
    line = refused(
        4, *TRAIN, "--set", "data.task=gsm8k", "--set", f"data.path={file}", "--runs-dir", str(tmp_path / "r")
    )
    assert words in line
    assert str(file) in line


def test_missing_data_and_models_are_exit_4(tmp_path: Path) -> None:
    runs = ("--runs-dir", str(tmp_path / "runs"))
    assert "data.path" in refused(4, *TRAIN, "--set", "data.task=gsm8k", "--set", "data.path=/nowhere.jsonl", *runs)
    assert "model.path" in refused(4, *TRAIN, "--model", str(tmp_path / "nothing"), *runs)
    assert "model.path" in refused(4, *TRAIN, "--model", str(tmp_path), *runs)
    assert "gsm8k" in refused(4, *TRAIN, "--set", "data.task=gsm8k", *runs)
    done = clipctl(*TRAIN, "--model", "meta-llama/Llama-3.2-1B-Instruct", *runs, CLIPCTL_CACHE=str(tmp_path / "c"))
    pulling, line = done.stderr.splitlines()
    assert done.returncode == 4
    assert pulling.startswith("pulling meta-llama/Llama-3.2-1B-Instruct, about 2.5 GB")
    assert "clipctl models pull" in line
    assert "nothing-like-it" in refused(4, "models", "pull", "nothing-like-it")
    assert not any((tmp_path / "runs").iterdir())


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    assert "'old' exists in" in refused(2, *TRAIN, "--name", "old", "--resume", "never", "--runs-dir", str(tmp_path))
    (tmp_path / "old" / "notes.txt").write_text("")
    assert "old is no run (it has notes.txt" in refused(2, *TRAIN, "--name", "old", "--runs-dir", str(tmp_path))


def test_a_runs_folder_that_cannot_be_written_is_exit_7(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in refused(7, *TRAIN, "--steps", "1", "--runs-dir", str(file))


def test_a_full_disk_is_exit_7_and_keeps_earlier_rollouts(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = clipctl("train", "--preset", "tiny", "--steps", "400", "--name", "full", "--set", "store.tokens=all",
                       "--set", "rollout.prompts=16", "--set", "optim.epochs=1", "--runs-dir", str(disk))  # fmt: skip
        assert done.returncode == 7, done.stderr
        assert "space" in done.stderr.strip().splitlines()[-1].lower()
        assert "Traceback" not in done.stderr
        answer = clipctl("analyze", str(disk), "--sql", "select count(*) as n from rollouts", "--format", "json")
        assert json.loads(answer.stdout)["rows"][0]["n"] >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_error_that_cannot_be_printed_keeps_its_exit_code() -> None:
    """A log on a full disk."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "clipctl", *TRAIN, "--set", "clip.loww=1"], stderr=full, check=False
        )
    assert done.returncode == 2


def test_debug_shows_the_traceback() -> None:
    done = clipctl("train", "--preset", "tinny", "--debug")
    assert "Traceback" in done.stderr


def test_presets_list_show_and_schema() -> None:
    names = [line.split()[0] for line in clipctl("presets", "list").stdout.splitlines()]
    assert {"qwen1.5b-random", "llama1b-random", "olmo1b-random", "qwen3b-gsm8k", "llama8b-gsm8k", "qwen7b-dapo", "tiny",
            "tiny-random", "smollm2-arith", "smollm2-gsm8k"} <= set(names)  # fmt: skip
    assert 'path = "tiny"' in clipctl("presets", "show", "tiny").stdout
    assert json.loads(clipctl("presets", "schema").stdout)["properties"]["clip"]


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m clipctl presets schema | head -1"],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
    command = f"{sys.executable} -m clipctl presets schema | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_models_list_names_every_preset_model() -> None:
    listed = clipctl("models", "list").stdout
    for name in ("tiny", "Qwen/Qwen2.5-3B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "smollm2-135m-instruct"):
        assert name in listed


def test_a_log_reader_that_goes_away_does_not_end_a_run(tmp_path: Path) -> None:
    run = "train --preset tiny --steps 3 --set rollout.prompts=4 --set optim.epochs=1 --name a"
    command = f"{sys.executable} -m clipctl {run} --runs-dir {tmp_path} 2>&1 | head -1"
    subprocess.run(["bash", "-c", command], env=ENVIRONMENT, check=False, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "finished"


def test_sums_of_counts_are_numbers_in_json(tmp_path: Path) -> None:
    small = ["--set", "rollout.prompts=4", "--set", "optim.epochs=1", "--runs-dir", str(tmp_path)]
    assert clipctl("train", "--preset", "tiny", "--steps", "1", *small).returncode == 0
    answer = clipctl("analyze", str(tmp_path), "--sql", "select sum(tokens) as n from updates", "--format", "json")
    assert isinstance(json.loads(answer.stdout)["rows"][0]["n"], int)


def test_a_policy_that_is_not_finite_diverges(tmp_path: Path) -> None:
    done = clipctl("train", "--preset", "tiny", "--steps", "1", "--set", "rollout.prompts=4", "--set",
                   "rollout.temperature=1e-42", "--runs-dir", str(tmp_path))  # fmt: skip
    assert done.returncode == 5
    assert "not finite" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--follow", "--view", "entropy"], "--follow: shows runs as they go and goes with no other option; leave --view out"),
        (["--html", "r.html", "--plot", "p.png", "--by", "clip.low"], "leave --plot, --by out"),
        (["--export", "wandb", "d", "--sql", "select 1"], "--export: writes folders for another tracker"),
        (["--follow", "--html", "r.html"], "leave --html out"),
        (["--sql", "select 1", "--view", "overview"], "--sql: is an answer of its own and goes with --format and --out alone"),
        (["--html", "r.html", "--format", "json"], "leave --format out"),
        (["--follow", "--rollout", "0"], "leave --rollout out"),
    ],
)  # fmt: skip
def test_options_of_analyze_that_do_not_go_together_are_refused(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in refused(2, "analyze", str(tmp_path), *arguments)
    assert not list(tmp_path.iterdir())
