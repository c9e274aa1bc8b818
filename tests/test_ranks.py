"""Several processes are one run: the numbers of one process, one writer, and an end that all share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from clipctl import open_runs
from clipctl.errors import SpecError
from clipctl.interrupts import StopNow, StopRequests, catch_signals
from clipctl.journal import RunWriter, SilentWriter
from clipctl.launch import check_nproc
from clipctl.ranks import Ranks
from clipctl.rendezvous import PORTS, Seat, find_seat, first_host, step_port
from runs import assert_same, differences

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "8",
}  # fmt: skip


# --- who this process is ----------------------------------------------------------------------------------------------


def test_torchrun_and_deepspeed_say_who_is_who() -> None:
    assert find_seat(TORCHRUN) == Seat(1, 3, 0, "n1", 29500, "torchrun or deepspeed")
    agent = find_seat(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert agent is not None
    assert agent.hosted
    assert find_seat(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_srun_says_who_is_who_unless_the_user_does() -> None:
    assert find_seat(SRUN) == Seat(5, 8, 1, "gpu03", step_port(77, 0), "srun")
    mine = find_seat(SRUN | {"MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "1234"})
    assert mine is not None
    assert (mine.address, mine.port) == ("10.0.0.3", 1234)
    assert find_seat(SRUN | TORCHRUN) == find_seat(TORCHRUN)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A batch script, and the shell of salloc: the tasks are those of the job, not of a step.
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"},
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[03-04]"},
        # A single task of srun within a larger job.
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SRUN | {"WORLD_SIZE": "1"},
    ],
)
def test_a_process_that_is_alone(environment: Mapping[str, str]) -> None:
    assert find_seat(environment) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "3"}, "RANK = 3: with WORLD_SIZE = 3 the last one is 2"),
        ({"RANK": "x"}, "RANK = 'x' in the environment: a number is needed"),
        (
            {"MASTER_ADDR": None, "RANK": None},
            "WORLD_SIZE = 3 says .* but RANK, MASTER_ADDR are not set: start them with",
        ),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(changes: Mapping[str, str | None], words: str) -> None:
    environment = {name: value for name, value in (TORCHRUN | dict(changes)).items() if value is not None}
    with pytest.raises(SpecError, match=words):
        find_seat(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],login", "gpu007"),
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("rack[2-3]n[05,07-09].site", "rack2n05.site"),
        ("a-b3.example.org,c", "a-b3.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_steps_that_run_at_once_have_ports_of_their_own() -> None:
    ports = {step_port(job, step) for job in range(4_000_000, 4_000_200) for step in range(3)}
    assert len(ports) == 600
    assert all(port in PORTS for port in ports)


def test_nproc_within_other_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "clipctl", "train", "--preset", "tiny", "--nproc", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("clipctl: --nproc = 2: this is process 1 of 3 that torchrun or deepspeed has started")
    with pytest.raises(SpecError, match="--nproc = 0: at least 1"):
        check_nproc(0)


def test_dry_run_says_what_each_process_does() -> None:
    command = [sys.executable, "-m", "clipctl", "train", "--preset", "tiny", "--dry-run", "--nproc"]
    said = [
        subprocess.run([*command, count], capture_output=True, text=True, check=True).stdout
        for count in ("1", "3", "99")
    ]
    assert "processes:" not in said[0]
    assert "processes:      3, each with the whole model and optimizer, 22 of 64 prompts a rollout" in said[1]
    assert "warning: rollout.prompts = 64: of 99 processes 35 have nothing to sample" in said[2]


# --- one process ------------------------------------------------------------------------------------------------------


def test_a_process_that_is_alone_does_without_torch_distributed() -> None:
    code = (
        "import sys, clipctl.ranks as r; a = r.ALONE; assert a.gather(3) == [3] and a.broadcast(4) == 4 and a.share(lambda: 5)"
        " == [5] and a.agree(True) and not a.asked_to_stop() and list(a.mine(3)) == [0, 1, 2]; a.barrier(); a.sum(None);"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_are_dealt_in_turns() -> None:
    assert [list(Ranks(rank, 3).mine(8)) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(Ranks(2, 3).mine(2)) == []


def test_who_does_not_write_can_do_all_that_the_writer_can() -> None:
    public = {name for name in vars(RunWriter) if not name.startswith("_")}
    assert public == {name for name in vars(SilentWriter) if not name.startswith("_")}


def test_a_request_waits_until_what_all_do_together_is_done() -> None:
    with catch_signals() as stop:
        with pytest.raises(StopNow), stop.interruptible(), stop.shielded():  # noqa: PT012
            signal.raise_signal(signal.SIGTERM)
            after = "still here"
        assert after == "still here"
        assert stop.reason == "SIGTERM"


def test_another_process_asks_and_fails_for_this_one() -> None:
    with catch_signals() as stop:
        stop.ask("SIGUSR2", False)
        stop.ask("Ctrl-C", True)
        deadline = time.monotonic() + 5
        while not stop.reason and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (stop.reason, stop.by_hand, stop.at_once) == ("SIGUSR2", False, False)
        failure = SpecError("rank 1 has no GPU")
        with pytest.raises(StopNow), stop.shielded():  # noqa: PT012
            stop.fail(failure)
            time.sleep(5)
        assert stop.error("x") is failure
    StopRequests().fail(failure)


def test_one_request_that_comes_in_several_ways_is_one() -> None:
    """A scheduler signals every process, the launcher hands its own on, others ask, and the job's end nears for all of them."""
    with catch_signals() as stop:
        stop.echo = 2.0
        stop.take("SIGUSR1", False)
        signal.raise_signal(signal.SIGUSR1)
        stop.ask("SIGUSR1", False)
        stop.end_with_job(time.time() + 0.1, 120)
        time.sleep(0.5)
        assert (stop.reason, stop.at_once) == ("SIGUSR1", False)
        stop.decided()
        stop.echo = 0.0
        signal.raise_signal(signal.SIGTERM)
        assert not stop.at_once


# --- the same run, whatever the number of processes -------------------------------------------------------------------

SMALL = [
    "--steps", "3", "--set", "data.arith.problems=64", "--set", "rollout.prompts=9", "--set", "rollout.group_size=4",
    "--set", "rollout.max_response_tokens=12", "--set", "rollout.dynamic_sampling=true", "--set", "optim.responses_per_update=12",
    "--set", "optim.epochs=2", "--set", "optim.lr=1e-3", "--set", "ledger.probe_states=16", "--set", "ledger.probe_every=2",
    "--set", "ledger.network_every=2", "--set", "store.tokens='all'", "--set", "engine.tokens_per_microbatch=64",
    "--set", "eval.every=2", "--set", "eval.benchmarks=['arith']", "--set", "eval.k=2",
    "--set", "eval.limit=5", "--set", "eval.reuse=false",
]  # fmt: skip
"""9 prompts in 3 updates of 3 groups, twice: nothing that 2 divides; refills, probes through the network, evaluations."""
CLOSE = {"relative": 2e-3, "absolute": 2e-5}
"""How far numbers of two runs may be apart when only the order differs in which gradients add up: AdamW divides by √v, so where
a gradient is rounding, so is the step. Measured: 1.8e-4 relative, 1.4e-5 where differences of log-probs are near 0."""


def lab(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exit code and seconds of each case of tests/ranks_lab.py, and what it said, without what packages warn of."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks_lab.py")), str(folder)],
        input=json.dumps(cases), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for case, result in zip(cases, found, strict=True):
        lines = (folder / case["log"]).read_text().splitlines()
        result["said"] = [line for line in lines if line.startswith(("clipctl:", "[rank", "Traceback"))]
    return found


def case(name: str, nproc: int, *arguments: str, **accident: Any) -> dict[str, Any]:
    log = f"{name}-{accident.get('at', 'whole')}.log"
    return {"log": log, "arguments": [*SMALL, "--name", name, "--nproc", str(nproc), *arguments], **accident}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one, of two and of three processes."""
    folder = tmp_path_factory.mktemp("whole")
    results = lab(folder, [case("one", 1), case("two", 2), case("three", 3)])
    assert [result["exit"] for result in results] == [0, 0, 0], [result["said"] for result in results]
    return folder / "runs"


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with open_runs(folder) as runs:
        return list(runs.sql(query).fetchall())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "three"])
def test_numbers_do_not_depend_on_the_number_of_processes(whole: Path, name: str) -> None:
    """All views: samples, texts, counts and evaluations are the same, floats within rounding."""
    assert differences(whole / "one", whole / name, **CLOSE) == {}
    texts = "select rollout, position, sample, text from texts order by all"
    assert rows(whole / "one", texts) == rows(whole / name, texts)
    (words,) = rows(whole / name, "select message from events where kind = 'processes'")
    assert words == (f"{2 if name == 'two' else 3} processes: {2 if name == 'two' else 3} on {os.uname().nodename}",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "three"])
def test_at_the_same_weights_they_are_the_same_bits(whole: Path, name: str) -> None:
    """Loss, counts, ledger, entropies and log-probs of the first update, at inner step 0; not the gradient's sum."""
    columns = (
        "loss, tokens, tokens_advantage, clip_low, clip_high, ratio_min, ratio_max, noise_max, entropy_token_mean, "
        "pg_reward, npg_reward, x_mass, y_mass"
    )
    first = f"select {columns} from updates where rollout = 0 and inner_step = 0"
    assert rows(whole / "one", first) == rows(whole / name, first)
    assert rows(whole / "one", first)[0][7] == 0.0
    scored = "select position, sample, token, logprob, entropy from tokens where rollout = 0 order by all"
    assert rows(whole / "one", scored) == rows(whole / name, scored)
    norm = "select grad_norm from updates where rollout = 0 and inner_step = 0"
    assert rows(whole / "one", norm)[0][0] == pytest.approx(rows(whole / name, norm)[0][0], rel=1e-6)


@pytest.mark.slow
def test_masters_in_float32_and_microbatches_that_are_cut(tmp_path: Path) -> None:
    """bfloat16 weights: where the float32 masters lie close to the middle of two bfloat16 numbers, rounding of the gradient's
    sum becomes a step of the weights of 1/256; only the first rollout is compared closely. And one micro-batch for 3."""
    bfloat16 = ["--set", "model.dtype='bfloat16'", "--steps", "1"]
    large = ["--set", "engine.tokens_per_microbatch=8192"]
    cases = [case("a1", 1, *bfloat16), case("a2", 2, *bfloat16), case("b1", 1, *large), case("b3", 3, *large)]
    assert [result["exit"] for result in lab(tmp_path, cases)] == [0] * 4
    runs = tmp_path / "runs"
    same = "select rollout, position, sample, text from texts order by all"
    assert rows(runs / "a1", same) == rows(runs / "a2", same)
    numbers = "select loss, grad_norm, entropy_token_mean from updates order by inner_step"
    for one, two in zip(rows(runs / "a1", numbers), rows(runs / "a2", numbers), strict=True):
        assert one == pytest.approx(two, rel=2e-2, abs=2e-4)
    # A token whose ratio lies at an edge may be in the bin beside it.
    assert differences(runs / "b1", runs / "b3", **CLOSE).keys() <= {"histograms"}
    tokens = "select rollout, inner_step, sum(tokens) from histograms group by all order by all"
    assert rows(runs / "b1", tokens) == rows(runs / "b3", tokens)
    assert rows(runs / "b3", "select noise_max from updates where inner_step = 0") == [(0.0,)] * 3


# --- interrupted, and gone on with ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_to_one_process_stops_all_and_they_go_on(tmp_path: Path, whole: Path) -> None:
    """In an update of either rank, and while one samples; then with two processes to the bits of an undisturbed run of two, and
    with three to its numbers."""
    cases = [
        case("x", 2, accident="SIGTERM", rank=1, at="update 14"),
        case("x", 2, accident="SIGINT", rank=0, at="update 3"),
        case("x", 2),
        case("y", 2, accident="SIGUSR2", rank=1, at="group 16"),
        case("y", 2),
        case("z", 2, accident="SIGTERM", rank=0, at="update 8"),
        case("z", 3),
    ]
    results = lab(tmp_path, cases)
    assert [result["exit"] for result in results] == [75, 130, 0, 75, 0, 75, 0], [result["said"] for result in results]
    assert results[0]["said"][0].startswith("clipctl: stopped by SIGTERM; runs/x keeps what was measured")
    assert results[1]["said"][0].startswith("clipctl: stopped by Ctrl-C; runs/x keeps what was measured")
    assert [len(result["said"]) for result in results] == [1, 1, 0, 1, 0, 1, 0]
    runs = tmp_path / "runs"
    for name in ("x", "y"):
        assert_same(runs / name, whole / "two", 3)
    assert differences(runs / "z", whole / "two", **CLOSE) == {}
    (told,) = rows(runs / "z", "select message from events where kind = 'resumed'")
    assert told[0].endswith("numbers may differ from those of an undisturbed run: processes 2 is now 3")


# --- the end of one is the end of all ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_fails_or_dies_ends_all_with_one_line(tmp_path: Path) -> None:
    host = os.uname().nodename
    nowhere = ["--set", "model.path='nowhere/none'"]
    reward = ["--set", 'reward={kind="function", function="ranks_lab:dice"}']
    cases = [
        case("kill1", 3, accident="SIGKILL", rank=1, at="update 4"),
        case("kill0", 3, accident="SIGKILL", rank=0, at="update 4"),
        case("killed-sampling", 2, accident="SIGKILL", rank=1, at="group 2"),
        case("memory", 2, accident="out of memory", rank=1, at="update 4"),
        case("memory0", 2, accident="out of memory", rank=0, at="update 4"),
        case("bug", 2, accident="bug", rank=1, at="update 4"),
        case("diverge", 2, accident="diverge", rank=1, at="update 4"),
        case("hang", 2, accident="hang", rank=1, at="update 4"),
        case("reward", 2, *reward),
        case("model", 2, *nowhere),
        case("inf", 2, "--set", "optim.lr=1e30"),
    ]
    results = lab(tmp_path, cases)
    said = {
        case["arguments"][case["arguments"].index("--name") + 1]: result
        for case, result in zip(cases, results, strict=True)
    }
    exits = {name: result["exit"] for name, result in said.items()}
    assert exits == {
        "kill1": 6, "kill0": 6, "killed-sampling": 6, "memory": 6, "memory0": 6, "bug": 1, "diverge": 5, "hang": 6, "reward": 4,
        "model": 4, "inf": 5,
    }, [result["said"] for result in results]  # fmt: skip
    assert all(result["seconds"] < 60 for result in results)
    for name in ("kill1", "killed-sampling"):
        (line,) = said[name]["said"]
        assert line.startswith("clipctl: rank 1 (process ")
        assert line.endswith(f" on {host}) is gone: it was killed, or crashed; the run was ended")
    first, second = said["kill0"]["said"]
    assert first.startswith("clipctl: rank 0 (process ")
    assert first.endswith("was killed by SIGKILL")
    assert second.startswith("[rank 1] clipctl: rank 0 (process ")
    for name, start in {
        "memory": f"clipctl: rank 1 on {host}: out of memory (CUDA out of memory. Tried to allocate 20.00 MiB); lower engine.",
        "memory0": "clipctl: out of memory (CUDA out of memory. Tried to allocate 20.00 MiB); lower engine.",
        "bug": f"clipctl: rank 1 on {host}: a bug in clipctl: KeyError: 'a bug'",
        "diverge": f"clipctl: rank 1 on {host}: the update is not finite: loss nan",
        "hang": "clipctl: rank 1 (process ",
        "reward": f"clipctl: rank 1 on {host}: ",
        "model": "clipctl: model.path: nowhere/none ",
        "inf": "clipctl: the update is not finite: ",
    }.items():
        (line,) = said[name]["said"]
        assert line.startswith(start), line
    states = dict(rows(tmp_path / "runs", "select name, state from runs"))
    assert states["memory"] == states["kill1"] == states["bug"] == states["hang"] == "failed"
    assert states["diverge"] == states["inf"] == "diverged"


def started(runs_dir: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = ["train", "--preset", "tiny", "--name", "x", "--steps", "60", "--set", "rollout.prompts=8", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipctl", *command, "--runs-dir", str(runs_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stderr is not None
    while "rollout 1/60" not in (line := process.stderr.readline()):
        assert line, "the run ended before its first rollout"
    return process


@pytest.mark.slow
def test_nothing_outlives_the_launcher(tmp_path: Path) -> None:
    """Not even the grading processes of its processes, when it is killed; and a signal to it reaches all of them."""
    math = ("--set", "reward.kind='math'", "--nproc", "2")
    process = started(tmp_path, *math)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) > 2
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=15)[1]
    process = started(tmp_path, *math)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert [line[:30] for line in said.splitlines() if line.startswith("clipctl")] == [
        "clipctl: stopped by SIGTERM; "[:30] + str(tmp_path)[:1]
    ]
    assert not psutil.wait_procs(children, timeout=15)[1]


@pytest.mark.slow
def test_torchrun_starts_the_same_run_and_other_specs_are_refused(tmp_path: Path) -> None:
    """Two runs at once, each on the port that torchrun found for it."""
    base = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = [
        "train",
        "--preset",
        "tiny",
        "--steps",
        "1",
        "--set",
        "rollout.prompts=4",
        "--set",
        "optim.responses_per_update=16",
    ]
    good = [sys.executable, *base, "-m", "clipctl", *train, "--name", "x"]
    seeds = f"exec {sys.executable} -m clipctl {' '.join(train)} --name y --seed $RANK"
    bad = [sys.executable, *base, "--no-python", "sh", "-c", seeds]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in (good, bad)
    ]
    (folder, log), (_, refused) = (process.communicate(timeout=300) for process in processes)
    assert processes[0].returncode == 0, log
    assert folder == "runs/x\n"
    assert log.count("rollout 1/1") == 1
    assert processes[1].returncode != 0
    line = "clipctl: rank 1 of 2 was given another spec than rank 0: run.seed = 0, now 1; processes that are started together"
    assert refused.count(line) == 1
    assert not (tmp_path / "runs" / "y").exists()
