"""What a run needs of a job of Slurm, as options of sbatch, from its spec."""

import math
from collections.abc import Mapping, Sequence

from clipctl.benchmarks import grader_of_benchmark
from clipctl.rewards import grader_of, math_settings
from clipctl.spec import RunSpec
from clipctl.tasks import TASKS

Options = Mapping[str, str | int | bool]
OF_TASKS = ("ntasks", "ntasks_per_node", "ntasks_per_core", "ntasks_per_socket", "ntasks_per_gpu", "nodes")
GPUS = ("gres", "gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "ntasks_per_gpu", "tres_per_task")
CORES = ("cpus_per_task", "cpus_per_gpu", "tres_per_task")
"""Options that say how many tasks, GPUs and cores a job has; one of them that is given leaves none to be chosen."""


def resources(specs: Sequence[RunSpec], options: Options) -> dict[str, str | int | bool]:
    """The options, and those that the specs need and that they leave open; a job of an array has what its hungriest run needs.

    One task; a core for each thread of torch and each grading process; for engine.device = 'cuda' a GPU of any type for each task
    of a node, or as many as one vLLM engine is spread over. `gres`, because every plugin that selects nodes knows it.
    """
    chosen: dict[str, str | int | bool] = {}
    if not any(key in options for key in OF_TASKS):
        chosen["ntasks"] = 1
    if not any(key in options for key in CORES):
        chosen["cpus_per_task"] = max(spec.engine.threads + _graders(spec) for spec in specs)
    gpus = [_gpus(spec, tasks_of_a_node(options)) for spec in specs if spec.engine.device == "cuda"]
    if gpus and not any(key in options for key in GPUS):
        chosen["gres"] = f"gpu:{max(gpus)}"
    return {**chosen, **options}


def _graders(spec: RunSpec) -> int:
    """Grading processes: for the reward, for outcomes beside one that does not grade, for benchmarks during training. A task
    that there is not starts none: the run ends at once."""
    graders = {grader_of(spec.reward, TASKS[spec.data.task].grader if spec.data.task in TASKS else None)}
    if spec.eval.every:
        graders |= {grader_of_benchmark(text, spec.eval.file) for text in spec.eval.benchmarks}
    return math_settings(spec.reward).workers if "math" in graders else 0


def _gpus(spec: RunSpec, tasks: int) -> int:
    """Several tasks with an engine over several GPUs are refused when the run starts."""
    return max(tasks, spec.engine.vllm.tensor_parallel)


def tasks_of_a_node(options: Options) -> int:
    """The most that one node may get."""
    if "ntasks_per_node" in options:
        return _count(options["ntasks_per_node"])
    # Of a range of nodes the fewest, which get the most.
    nodes = _count(str(options.get("nodes", 1)).partition("-")[0])
    return math.ceil(_count(options.get("ntasks", nodes)) / nodes)


def _count(value: str | int | bool) -> int:
    """A number of sbatch; 1 for what sbatch will refuse."""
    return max(1, int(value)) if str(value).isdecimal() else 1
