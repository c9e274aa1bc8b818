"""README says what the code does: every command, option, preset, metric and file is in it, and its Python runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clipctl.metrics import METRICS
from clipctl.spec import RunSpec, preset_names
from clipctl.views import VIEWS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def metrics_table() -> str:
    return "\n".join(["| Name | Formula |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in METRICS.items())])


def test_the_table_of_metrics_is_the_one_of_the_code() -> None:
    found = README.split("<!-- metrics -->")[1].split("<!-- end of metrics -->")[0].strip()
    assert found == metrics_table(), "run: python tests/test_docs.py"


def test_readme_opens_with_the_two_commands() -> None:
    commands = re.findall(r"^    (bash \S+)", README, flags=re.MULTILINE)[:2]
    assert commands == ["bash quickstart.sh", "bash check.sh"]
    assert "bash check.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_preset_group_and_view_is_named() -> None:
    for name in [*preset_names(), *RunSpec.model_fields, *(view for view in VIEWS)]:
        assert f"`{name}`" in README or re.search(rf"`[^`]*\b{re.escape(name)}\b[^`]*`", README), name


def test_every_module_is_in_the_table_of_files() -> None:
    files = README.split("## Files")[1]
    for module in (ROOT / "clipctl").glob("*.py"):
        if not module.name.startswith("__"):
            assert module.name in files, module.name


def test_the_plots_of_the_results_are_there_and_small() -> None:
    shown = set(re.findall(r"!\[[^]]+\]\(docs/(\S+)\)", (ROOT / "RESULTS.md").read_text()))
    assert shown == {path.name for path in (ROOT / "docs").iterdir()}
    assert all((ROOT / "docs" / name).stat().st_size < 100_000 for name in shown)


@pytest.mark.parametrize("command", ["train", "eval", "sweep", "analyze", "theory", "export", "doctor"])
def test_every_option_is_named(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipctl", command, "--help"], capture_output=True, text=True, check=True
    )
    for option in set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}:
        assert option in README, option


def test_user_documents_do_not_name_the_developers_folders() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "clipctl" / "tiny" / "README.md"]:
        assert "../shared" not in document.read_text()


ANALYSES = [
    line.split("    #")[0].strip()
    for line in re.findall(r"^    (clipctl analyze runs/(?!arms|gsm8k).*)", README, re.MULTILINE)
]


@pytest.mark.slow
@pytest.mark.parametrize("command", ANALYSES)
def test_every_analysis_in_readme_runs(command: str, tmp_path: Path) -> None:
    from test_store import SPEC, write

    from clipctl.journal import create_run

    for name in ("a", "b"):
        writer = create_run(tmp_path / "runs", name, SPEC, "tiny")
        for rollout in range(2):
            write(writer, rollout)
        writer.close("finished", "")
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


WHOLE = re.sub(r" \\\n +", " ", README)
"""Lines that end in a backslash, with what follows."""
LINES = [line.split("    #")[0].strip() for line in re.findall(r"^    ((?:clipctl|bash) .*)", WHOLE, re.MULTILINE)]
BOTH = (
    "clipctl train --preset smollm2-gsm8k --set engine.sampler=vllm --set engine.trainer=deepspeed --steps 2 "
    "--set rollout.prompts=2 --set rollout.group_size=4 "
    "--set optim.responses_per_update=4 --set rollout.max_response_tokens=48 --name gsm8k"
)
MISMATCH = "select rollout, mismatch_max, mismatch_mean, mismatch_outside, entropy from rollouts"
FIG3 = "clipctl sweep --preset fig3 --jobs 4 --launcher slurm --slurm partition=gpu --slurm time=4:00:00"
NOT_RUN = {
    "bash quickstart.sh": "sets up an environment; continuous integration runs it",
    "bash check.sh": "runs this test-suite",
    "clipctl train --preset qwen3b-gsm8k --eps-low 0.15 --no-clip-high": "3B parameters; its --dry-run is run",
    "clipctl train --preset qwen3b-gsm8k --name first": "3B parameters",
    FIG3: "a cluster; tests/test_slurm.py runs the same on a small Slurm",
    f"{FIG3} --wait": "the same",
    f"{FIG3.replace(' --slurm partition=gpu', '')} --print-script > fig3.sh": "the same",
    "clipctl doctor --preset qwen3b-gsm8k --set engine.device=cuda": "exits 3 without a GPU; test_doctor.py runs it",
    "clipctl train --preset qwen3b-gsm8k --name first --nproc 8": "8 GPUs",
    "clipctl train --preset tiny --set engine.trainer=deepspeed --set ledger.network_every=0 --nproc 2": "test_deepspeed.py",
    "clipctl train --preset llama8b-gsm8k --set engine.trainer=deepspeed --set engine.deepspeed.zero_stage=3 --nproc 8": "8 GPUs",
    "clipctl train --preset tiny --set engine.sampler=vllm": "needs vLLM; test_vllm.py trains with it",
    "clipctl eval --model smollm2-135m-instruct --benchmark svamp --top-p 1 --set engine.sampler=vllm": "the same",
    BOTH: "needs vLLM, DeepSpeed and GSM8K",
    f'clipctl analyze runs/gsm8k --sql "{MISMATCH}"': "the run that it made",
    "clipctl eval --run runs/my-run@40 --benchmark gsm8k --benchmark math500 -k 8": "benchmarks from the hub",
    "clipctl eval --model qwen2.5-3b-instruct --benchmark gsm8k --benchmark math500 -k 8 --set engine.device=cuda": "a GPU",
}
"""Lines of README's blocks that no test runs, and why."""
SHORTER = {
    "clipctl train --preset tiny": " --steps 1",
    "clipctl sweep --preset tiny --grid": " --dry-run",
    "clipctl eval": " --limit 8 -k 2",
    "clipctl theory": " --steps 8",
}
"""What is added to lines that would take long."""


@pytest.mark.slow
def test_the_other_lines_of_readme_run(tmp_path: Path) -> None:
    assert not NOT_RUN.keys() - set(LINES), "no longer in README"
    run = [line for line in LINES if line not in {*NOT_RUN, *ANALYSES}]
    assert len(run) >= 5
    named = ["clipctl presets list", "clipctl presets show tiny", "clipctl presets schema", "clipctl models list"]
    assert all(line.split()[1] in README and line.split()[2] in README for line in named)
    before = "clipctl train --preset tiny --name tiny-a --set eval.every=1 --set 'eval.benchmarks=[\"arith\"]' --set eval.limit=8"
    for line in [before, *run, *named]:
        added = next((more for start, more in SHORTER.items() if line.startswith(start)), "")
        words = [sys.executable, "-m", *shlex.split(line + added)]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CLIPCTL_CACHE": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=200, env=environment
        )
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout, line


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"In Python:\n\n((?:    .*\n|\n)+)", README)
    code = re.sub(r"^    ", "", block, flags=re.MULTILINE)
    subprocess.run([sys.executable, "-c", code + "\nassert table.num_rows == 10"], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_has_all_of_the_package_and_the_presets(tmp_path: Path) -> None:
    import zipfile

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("clipctl-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {file for file in (ROOT / "clipctl").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    wanted = {str(file.relative_to(ROOT)) for file in package}
    wanted |= {f"clipctl/{file.relative_to(ROOT)}" for file in (ROOT / "presets").rglob("*.toml")}
    assert "clipctl/page/report.js" in wanted
    assert wanted <= held


if __name__ == "__main__":
    before, rest = README.split("<!-- metrics -->")
    after = rest.split("<!-- end of metrics -->")[1]
    text = f"{before}<!-- metrics -->\n{metrics_table()}\n<!-- end of metrics -->{after}"
    (ROOT / "README.md").write_text(text)
