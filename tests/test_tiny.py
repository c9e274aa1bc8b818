"""The embedded model: it loads like any other, its files are what `make.py` writes, and its base numbers hold."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from clipctl.arith import arith_problems
from clipctl.tiny import FOLDER
from clipctl.tiny.make import RIGHT, Language, write

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():  # noqa: ANN201
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def test_it_is_a_small_llama_that_engines_accept(model) -> None:  # noqa: ANN001
    assert model.config.model_type == "llama"
    assert model.config.head_dim in (32, 64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum((FOLDER / name).stat().st_size for name in FILES) < 4_000_000
    generation = GenerationConfig.from_pretrained(FOLDER)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


def test_chat_template_and_round_trip(tokenizer) -> None:  # noqa: ANN001
    messages = [{"role": "user", "content": "7 + 12 + 5"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "<user>", "7", "+", "12", "+", "5", "<assistant>"]
    text = "well 12 plus 7 makes 19 then 5 is 24."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, skip_special_tokens=True) == text
    answered = [*messages, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(ids)


def test_pretraining_text_is_what_the_chat_template_and_the_tokenizer_give(tokenizer) -> None:  # noqa: ANN001
    terms_B3 = np.array([[7, 12, 5], [20, 1, 20]])
    for ids, terms in zip(Language(7).texts(terms_B3, np.random.default_rng(0)), terms_B3, strict=True):
        question = " + ".join(map(str, terms))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert list(ids[:8]) == prompt
        spoken = tokenizer.decode(ids[8:], skip_special_tokens=True)
        x, y, _, z, _ = map(int, re.findall(r"\d+", spoken))
        assert sorted((x, y, z)) == sorted(terms)
        assert re.fullmatch(
            r"\w+ \d+ (plus|\+|and|with) \d+ (is|=|makes|gives) \d+ (plus|and|then|with) \d+ (is|=|makes|gives) \d+\.",
            spoken,
        )


def test_sums_are_right_as_often_as_the_addition_table_says() -> None:
    language = Language(7)
    x_B, y_B = np.full(20_000, 9), np.full(20_000, 14)
    sums_B = language.add(x_B, y_B, np.random.default_rng(0))
    share = (sums_B == 23).mean()
    assert share == pytest.approx(language.right_XY[9, 14], abs=4 * 0.5 / 20_000**0.5)
    assert set(sums_B) == {23, language.wrong_XY[9, 14]}
    np.testing.assert_allclose([(language.right_XY == right).mean() for right in RIGHT], (0.4, 0.3, 0.3), atol=0.04)
    assert not (language.wrong_XY == np.add.outer(np.arange(85), np.arange(21))).any()


def test_base_numbers(model, tokenizer) -> None:  # noqa: ANN001
    """mean@8, pass@8 and entropy (Eq. 4) at temperature 1 leave something to learn and something to lose."""
    problems, samples, spoken = arith_problems("expression", 200, 9), 8, 16
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for question, _ in problems
    ]
    ids_RS = torch.tensor(prompts).repeat_interleave(samples, dim=0)
    generator = torch.Generator().manual_seed(0)
    entropies = []
    with torch.no_grad():
        for _ in range(spoken):
            logprob_RV = model(input_ids=ids_RS).logits[:, -1].log_softmax(-1)
            entropies.append(-(logprob_RV.exp() * logprob_RV).sum(-1))
            ids_RS = torch.cat([ids_RS, torch.multinomial(logprob_RV.exp(), 1, generator=generator)], dim=1)
    response_RT = ids_RS[:, len(prompts[0]) :]
    is_token_RT = (response_RT == tokenizer.eos_token_id).long().cumsum(1).roll(1, 1)
    is_token_RT[:, 0] = 0
    is_token_RT = is_token_RT == 0
    texts = tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(response_RT, is_token_RT, strict=True)], skip_special_tokens=True
    )
    answers = [answer for _, answer in problems for _ in range(samples)]
    correct_PG = np.array(
        [re.findall(r"\d+", text)[-1:] == [answer] for text, answer in zip(texts, answers, strict=True)]
    ).reshape(-1, samples)
    entropy_RT = torch.stack(entropies, dim=1) * is_token_RT
    entropy = (entropy_RT.sum(1) / is_token_RT.sum(1)).mean().item()
    assert 0.2 < correct_PG.mean() < 0.6
    assert correct_PG.mean() + 0.2 < correct_PG.any(axis=1).mean() < 0.95
    assert 0.2 < entropy < 0.6


def test_files_are_what_make_writes(tmp_path: Path) -> None:
    write(tmp_path, steps=1)
    for name in FILES:
        made, shipped = tmp_path / name, FOLDER / name
        if name == "model.safetensors":
            assert made.stat().st_size == shipped.stat().st_size
        elif name.endswith(".json"):
            different = {"transformers_version"}
            pairs = [json.loads(path.read_text()) for path in (made, shipped)]
            kept = [{key: value for key, value in pair.items() if key not in different} for pair in pairs]
            assert kept[0] == kept[1], name
        else:
            assert made.read_text() == shipped.read_text(), name


@pytest.mark.slow
def test_the_same_bytes_again(tmp_path: Path) -> None:
    assert write(tmp_path / "once", steps=30) == write(tmp_path / "again", steps=30)
    assert write(tmp_path / "other", steps=31) != write(tmp_path / "once", steps=30)
