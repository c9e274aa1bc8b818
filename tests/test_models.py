"""Shapes of preset models, where models come from, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_llama

from clipctl.errors import ModelError
from clipctl.models import (
    MODELS,
    ModelShape,
    find_model,
    load_causal_lm,
    load_tokenizer,
    model_lines,
    model_shape,
    pull_model,
    refuse_inexact,
    stop_ids,
)

PUBLISHED = {
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-3-8b-instruct": 8_030_261_248,
    "olmo-2-0425-1b-instruct": 1_484_916_736,
    "smollm2-135m-instruct": 134_515_008,
}
ARCHITECTURE = {"qwen": "Qwen2", "llama": "Llama", "olmo": "Olmo2", "smollm": "Llama"}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert MODELS[name].shape.parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_transformers(name: str) -> None:
    """The model that transformers builds from these sizes, on the meta device, has as many weights."""
    import transformers

    shape = MODELS[name].shape
    family = next(value for key, value in ARCHITECTURE.items() if name.startswith(key))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


def test_the_shape_of_a_folder_is_read_from_its_configuration(tmp_path: Path) -> None:
    model = random_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert shape == ModelShape(300, 64, 2, 4, 2, 16, 96, False, 512)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.kv_values_per_token == 2 * 2 * 2 * 16


def test_a_name_and_its_hub_name_are_one_model() -> None:
    assert model_shape("Qwen/Qwen2.5-3B-Instruct") == model_shape("qwen2.5-3b-instruct")
    assert model_shape("somebody/something") is None


def test_tiny_is_in_the_package() -> None:
    folder = find_model("tiny", pull=False)
    tokenizer = load_tokenizer(folder, None)
    assert not tokenizer.plain_template
    assert tokenizer.tokenizer.eos_token_id in stop_ids(folder, tokenizer)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 4_000_000
    model = load_causal_lm(folder, "float32", "cpu")
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32


def model_folder(folder: Path) -> Path:
    """A random model with the embedded model's tokenizer."""
    random_llama().save_pretrained(folder)
    for file in find_model("tiny", pull=False).glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_a_model_without_a_chat_template_gets_a_plain_one(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    assert find_model(str(folder), pull=False) == folder
    tokenizer = load_tokenizer(folder, None)
    assert tokenizer.plain_template
    assert tokenizer.decode(tokenizer.encode_prompt("1 + 2 + 3")).split() == "1 + 2 + 3".split()
    given = load_tokenizer(folder, "{% for m in messages %}{{ m['content'] }} 7{% endfor %}")
    assert not given.plain_template
    assert given.decode(given.encode_prompt("1 + 2")).split() == "1 + 2 7".split()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder, file or known model 'nothing'"):
        find_model("nothing", pull=False)
    with pytest.raises(ModelError, match=r"no file '.*none\.gguf'"):
        find_model(str(tmp_path / "none.gguf"), pull=False)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_model(str(tmp_path), pull=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        find_model(str(tmp_path), pull=False)


def test_a_model_that_is_not_in_the_cache_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="clipctl models pull qwen2.5-3b-instruct"):
        find_model("qwen2.5-3b-instruct", pull=False)
    with pytest.raises(ModelError, match="not in the cache and the hub is not reachable"):
        pull_model("Qwen/Qwen2.5-3B-Instruct")
    assert not list(tmp_path.iterdir())


def test_models_whose_logits_are_more_than_a_product_are_refused() -> None:
    from transformers import Gemma2Config, LlamaConfig

    refuse_inexact(LlamaConfig())
    with pytest.raises(ModelError, match="final_logit_softcapping = 30"):
        refuse_inexact(Gemma2Config())


def test_a_sliding_window_is_refused() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from clipctl.engine.attention import use_grouped_attention

    config = Qwen2Config(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=1,
    )  # fmt: skip
    with pytest.raises(ModelError, match="sliding window"):
        use_grouped_attention(Qwen2ForCausalLM(config))


def test_no_stop_token_is_an_error(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    tokenizer = load_tokenizer(folder, None)
    tokenizer.tokenizer.eos_token = None
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(ModelError, match="names no token that ends a response"):
        stop_ids(folder, tokenizer)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [5, 9]}))
    assert stop_ids(folder, tokenizer) == {5, 9}


def test_the_list_names_every_model() -> None:
    listed = "\n".join(model_lines())
    assert all(name in listed and known.hub in listed for name, known in MODELS.items())


@pytest.mark.slow
def test_smollm2_from_the_package_that_carries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model, converted from GGUF: right shape, sane answers, converted once."""
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path))
    folder = pull_model("smollm2-135m-instruct")
    assert model_shape(str(folder)) == MODELS["smollm2-135m-instruct"].shape
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert pull_model("HuggingFaceTB/SmolLM2-135M-Instruct") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    tokenizer = load_tokenizer(folder, None)
    model = load_causal_lm(folder, "float32", "cpu")
    ids = tokenizer.encode_prompt("What is the capital of France?")
    assert ids.count(tokenizer.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_ids(folder, tokenizer)
