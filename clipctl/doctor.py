"""`clipctl doctor`: what this machine has, and whether it has what a run needs. Starts nothing and downloads nothing."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from clipctl import __version__, machine_probe
from clipctl.errors import DependencyError
from clipctl.findings import (
    CORE,
    Finding,
    Probe,
    compiler_finding,
    cuda_finding,
    disk_findings,
    end_words,
    hub_finding,
    import_findings,
    memory_finding,
    nvidia_driver,
    package_findings,
    program_finding,
    shm_finding,
    slurm_finding,
    threads_finding,
)
from clipctl.machine import Cores, Disk, Memory, cores, disk, memory
from clipctl.models import cache_folder
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
from clipctl.spec import RunSpec

SCHEMA_VERSION = 1
"""Of the JSON."""
PROBE_SECONDS = 120
PROBES = (
    "torch",
    "transformers",
    "math_verify",
    "vllm",
    "deepspeed",
    "submitit",
    "torchvision",
    "gmpy2",
    "cuda",
    "hub",
)
"""In the order in which they are told; the slow ones are started first."""
SLOW = ("vllm", "transformers", "deepspeed", "cuda", "torch")
MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "missing": "MISSING"}


def examine(spec: RunSpec | None, runs_dir: Path) -> list[Finding]:
    """What there is, and with a spec, what of its needs is not there."""
    load = os.getloadavg()[0]
    probes = run_probes()
    have, processors, places = memory(), cores(), disk_places(runs_dir)
    found = [*machine_findings(probes, have, processors, places, load, needed_packages(spec) if spec else CORE)]
    if spec is not None:
        compilers = need_compilers(spec, next(finding for finding in found if finding.name == "compilers"))
        found += [] if compilers is None else [compilers]
        found += [
            need_device(spec, probes["cuda"]),
            need_threads(spec, processors),
            need_model(spec, probes["hub"]),
            *need_rows(spec, probes["hub"]),
            need_memory(spec, have, probes["cuda"]),
            need_disk(spec, places["runs"][1]),
        ]
    return found


def machine_findings(
    probes: Mapping[str, Probe],
    have: Memory,
    processors: Cores,
    places: Mapping[str, tuple[Path, Disk]],
    load: float,
    needed: Sequence[str],
) -> Iterator[Finding]:
    """All but what a spec needs."""
    yield program_finding()
    yield from package_findings()
    yield from import_findings(probes, needed)
    yield cuda_finding(probes["cuda"], nvidia_driver())
    yield memory_finding(have)
    shm = shm_finding(disk(Path("/dev/shm"))) if Path("/dev/shm").is_dir() else None
    yield from () if shm is None else (shm,)
    yield from disk_findings(places)
    yield hub_finding(probes["hub"])
    yield threads_finding(processors, probes["torch"], load, os.environ)
    yield slurm_finding(os.environ)
    yield compiler_finding()


def disk_places(runs_dir: Path) -> dict[str, tuple[Path, Disk]]:
    """Where clipctl writes, by name."""
    from huggingface_hub import constants

    folders = {
        "runs": runs_dir,
        "cache": cache_folder(),
        "hub cache": Path(constants.HF_HUB_CACHE),
        "temporary files": Path(tempfile.gettempdir()),
    }
    return {name: (folder, disk(folder)) for name, folder in folders.items()}


def run_probes(names: Sequence[str] = PROBES, seconds: float = PROBE_SECONDS) -> dict[str, Probe]:
    """Every probe in a process of its own, at most two at once: imports need memory and cores."""
    order = sorted(names, key=lambda name: SLOW.index(name) if name in SLOW else len(SLOW))
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(order, pool.map(lambda name: run_probe(name, seconds), order), strict=True))
    return {name: done[name] for name in names}


def run_probe(name: str, seconds: float = PROBE_SECONDS) -> Probe:
    """One probe, killed after so many seconds."""
    # -P: a file of the working directory must not pass for a package.
    command = [sys.executable, "-P", machine_probe.__file__, name]
    started = perf_counter()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(perf_counter() - started, None, lost=f"it did not end within {seconds:g} s")
    took = perf_counter() - started
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return Probe(took, None, lost=end_words(done.returncode))
    return Probe(took, answer.get("facts"), answer.get("error", ()))


def report_text(findings: Sequence[Finding]) -> str:
    """A line for each finding."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{MARKS[finding.status]:8}{finding.name:{width}}  {finding.text}" + (f"; {finding.fix}" if finding.fix else "")
        for finding in findings
    )


def report_json(findings: Sequence[Finding]) -> str:
    """All findings with their facts; `missing` names those that are in the way."""
    missing = [finding.name for finding in findings if finding.status == "missing"]
    rows = [asdict(finding) for finding in findings]
    answer = {"schema_version": SCHEMA_VERSION, "clipctl": __version__, "missing": missing, "findings": rows}
    return json.dumps(answer, indent=2, ensure_ascii=False)


FORMATS = {"text": report_text, "json": report_json}


def check_needs(findings: Sequence[Finding], what: str) -> None:
    """Raises DependencyError where something is missing. what: needs it."""
    missing = [finding.name for finding in findings if finding.status == "missing"]
    if missing:
        raise DependencyError(f"doctor: {what} lacks {', '.join(missing)}; the lines marked MISSING say what mends it")
