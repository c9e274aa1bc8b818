"""Shared fixtures: small real models, built from a configuration, and where the benchmark files lie."""

import os
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# A background job begins with it ignored and hands that on; tests of Ctrl-C need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = 300


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """GSM8K, MATH-500 and the like, beside the checkout."""
    if not DATA.is_dir():
        pytest.skip(f"benchmark files are not at {DATA}")
    return DATA


def random_llama(seed: int = 0, *, vocabulary: int = VOCABULARY, dtype: str = "float32", **changes: Any) -> Any:
    """A Llama of two layers with grouped queries and random weights, peaked enough that entropy is well under log V."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()
    return model.to(getattr(torch, dtype))
