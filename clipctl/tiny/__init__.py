"""The embedded model `tiny`: a Llama-type causal LM of 0.14 M parameters that adds three numbers aloud; see README.md.

The folder itself is a model folder as transformers loads it; `make.py` is the script that wrote it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""The model folder: config, weights, tokenizer, chat template, generation config."""
