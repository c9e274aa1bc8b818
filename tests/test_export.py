"""Exported policies: transformers loads the checkpoint, the card says what was measured, a folder is whole or not there."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import clipctl.export as exporting
from clipctl.errors import ModelError, SpecError, StoreError
from clipctl.eval_runner import run_evaluation, run_target
from clipctl.eval_spec import resolve_eval_spec
from clipctl.export import export
from clipctl.model_card import model_card
from clipctl.spec import load_spec, nest, spec_from_json, spec_json
from clipctl.store import open_runs
from clipctl.targets import Target, find_target
from clipctl.train import train

TEMPLATE = "{# ``` | <b> #}{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 rollouts in bfloat16 with a template of its own; the model of rollout 1 is gone, that of rollout 2
    is there without its state."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = {
        "run.name": "a",
        "run.steps": 3,
        "rollout.prompts": 4,
        "optim.responses_per_update": 16,
        "optim.lr": 1e-3,
        "clip.high": float("inf"),
        "model.dtype": "bfloat16",
        "model.chat_template": TEMPLATE,
        "checkpoint.keep": 1,
        "checkpoint.models_every": 2,
        "ledger.network_every": 0,
        "eval.every": 3,
        "eval.benchmarks": ("arith",),
        "eval.limit": 4,
        "eval.reuse": False,
    }
    train(load_spec("tiny", overrides), runs_dir=folder)
    assert {path.name for path in (folder / "a" / "checkpoints").glob("[0-9]*")} == {"2", "3"}
    return folder


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_transformers_loads_the_policy_of_the_checkpoint(runs_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([[1, 20, 30, 40]])
    logits = {}
    for text, checkpoint in (("a", 3), ("a@2", 2), (str(runs_dir / "a") + "@3", 3)):
        folder = export(text, tmp_path / str(len(logits)), runs_dir)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        saved = AutoModelForCausalLM.from_pretrained(runs_dir / "a" / "checkpoints" / str(checkpoint), dtype="auto")
        assert next(model.parameters()).dtype == torch.bfloat16
        logits[text] = model(ids).logits
        assert torch.equal(logits[text], saved(ids).logits)
        assert model.generation_config.eos_token_id == 2
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == TEMPLATE
        assert not (folder / "manifest.json").exists()
        assert not (folder / "state").exists()
        assert (folder / "model.safetensors").stat().st_size > 1e5
    assert not torch.equal(logits["a"], logits["a@2"])
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}


def test_the_card_has_the_numbers_of_the_store_and_the_whole_spec(runs_dir: Path, tmp_path: Path) -> None:
    run_evaluation(
        resolve_eval_spec(
            run_target("a@2", runs_dir), nest({"eval.limit": 3, "eval.k": 2, "arith.style": "expression"})
        ),
        runs_dir=runs_dir,
        name="later",
    )
    card = text_of(export("a@2", tmp_path / "two", runs_dir))
    with open_runs(runs_dir / "a") as runs:
        entropies = [row[0] for row in runs.sql("select entropy from rollouts order by rollout").fetchall()]
        ((clipped,),) = runs.sql("select sum(clip_low) / sum(tokens) from updates where rollout = 1").fetchall()
    assert f"| entropy, nats | {entropies[0]:.4g} | {entropies[1]:.4g} |" in card
    assert f"| {clipped:.4g} |\n| clip-high" in card
    assert "rollout 2" not in card
    assert "| Clipping | ε\\_low = 0.1, ε\\_high off |" in card
    assert "| Rollouts | 2 of 3, " in card
    # The run's own of the base model, none after 3 rollouts, and that of `clipctl eval` after 2.
    assert [line.split(" | ")[1:4] for line in card.splitlines() if line.startswith("| arith | ")] == [
        ["0", "4", "8"],
        ["2", "3", "2"],
    ]
    (spec,) = re.findall(r"^````json\n(.*?)^````$", card, re.DOTALL | re.MULTILINE)
    assert spec_from_json(spec) == find_target("a", runs_dir, "").spec
    shutil.rmtree(runs_dir / "later")


def test_nothing_of_the_users_is_markup_in_the_card(runs_dir: Path) -> None:
    target = find_target("a", runs_dir, "")
    odd = target.spec.model_copy(
        update={"model": target.spec.model.model_copy(update={"path": "x/<img src=y>|`[a](b)\x1b[1m\n---\n# no"})}
    )
    card = model_card(Target(target.folder, odd, 3, target.checkpoint))
    before_spec = card.split("## Spec")[0]
    assert "<img" not in before_spec.replace("\\<img", "")
    assert "\x1b" not in before_spec
    assert before_spec.count("\n# ") == 1
    assert "base_model" not in before_spec
    named = target.spec.model_copy(
        update={"model": target.spec.model.model_copy(update={"path": "qwen2.5-3b-instruct"})}
    )
    block = model_card(Target(target.folder, named, 3, None)).split("---")[1]
    assert 'base_model: "Qwen/Qwen2.5-3B-Instruct"' in block
    assert json.loads(spec_json(named))["model"]["path"] == "qwen2.5-3b-instruct"


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_taken(runs_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(SpecError, match=r"--to: .*full is not empty; give a new or empty folder"):
        export("a", tmp_path / "full", runs_dir)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]
    with pytest.raises(SpecError, match=r"notes is no folder"):
        export("a", tmp_path / "full" / "notes", runs_dir)
    with pytest.raises(StoreError, match=r"--to: .*deeper cannot be written: .*File exists"):
        export("a", tmp_path / "full" / "notes" / "deeper", runs_dir)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert export("a", tmp_path / "link", runs_dir) == tmp_path / "empty"
    assert (tmp_path / "link" / "model.safetensors").exists()
    assert (export("a", tmp_path / "new" / "deep", runs_dir) / "config.json").exists()


def test_what_cannot_be_finished_leaves_nothing(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def full(source: Path, to: Path) -> None:
        copied.append(source.name)
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        to.write_bytes(source.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(exporting.shutil, "copyfile", full)
        with pytest.raises(StoreError, match=r"--to: .*out cannot be written: .*No space left on device"):
            export("a", tmp_path / "out", runs_dir)
    assert list(tmp_path.iterdir()) == []
    # What a killed export left does not stand in the way.
    (tmp_path / ".out.exporting").mkdir()
    (tmp_path / ".out.exporting" / "half").write_text("x")
    export("a", tmp_path / "out", runs_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_is_not_exported(runs_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_dir / "a", tmp_path / "b")
    weights = tmp_path / "b" / "checkpoints" / "3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StoreError, match=r"checkpoint 3 of b is damaged: model.safetensors is not what was written"):
        export("b", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
    # What only going on needs is not looked at.
    shutil.copy(runs_dir / "a" / "checkpoints" / "3" / "model.safetensors", weights)
    (weights.parent / "state" / "state.json").write_text("{}")
    export("b", tmp_path / "out", tmp_path)


def test_what_is_wrong_is_named(runs_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"a has no checkpoint 1; it has 2, 3 .*checkpoint\.models_every = N .*checkpoint\.keep"
    ):
        export("a@1", tmp_path / "out", runs_dir)
    with pytest.raises(SpecError, match=r"export: a@0 is the base model, tiny"):
        export("a@0", tmp_path / "out", runs_dir)
    with pytest.raises(SpecError, match=r"export: 'a@last': what follows @ is a number of rollouts"):
        export("a@last", tmp_path / "out", runs_dir)
    with pytest.raises(SpecError, match=r"export: no run 'aa', as a folder or in .* \(did you mean a\?\)"):
        export("aa", tmp_path / "out", runs_dir)
    assert list(tmp_path.iterdir()) == []
