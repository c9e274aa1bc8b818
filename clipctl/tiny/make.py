"""Makes the embedded model: `python -m clipctl.tiny.make [--to FOLDER]` writes the model folder, in about 2 minutes.

The model answers "7 + 12 + 5" with a chain of thought such as "well 12 plus 7 makes 19 and 5 is 24.". It is pretrained
on text that gives it entropy to lose and errors to lose: at every free place (opening word, which two numbers come
first and in which order, the words for plus and equals, the link) one of several equally good words is drawn, and which
one is likely depends on the number before it; sums are looked up in an addition table some of whose entries are mostly
wrong, always in the same way. Training stops before the policy is as sharp as the text.

One thread, one seed: the same bytes every time on one machine.
"""

import argparse
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from clipctl.arith import LARGEST_TERM, pretraining_terms
from clipctl.tiny import FOLDER

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
STEPS = 2000
ROWS_PER_STEP = 128
LEARNING_RATE = 4e-3

SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>")
LARGEST_NUMBER = 84
OPENINGS = ("well", "okay", "now", "right", "look", "first", "hm", "sure")
PLUS = ("plus", "+", "and", "with")
EQUALS = ("is", "=", "makes", "gives")
LINKS = ("plus", "and", "then", "with")
WORDS = (*OPENINGS, *PLUS, *EQUALS, "then", ".")

OPENING_WEIGHTS = (0.65, 0.20, 0.06, 0.03, 0.02, 0.02, 0.01, 0.01)
FIRST_WEIGHTS = (0.75, 0.20, 0.05)
SECOND_WEIGHTS = (0.80, 0.20)
FOUR_WEIGHTS = (0.72, 0.20, 0.05, 0.03)
RIGHT = (0.95, 0.60, 0.12)
"""Probability of the right sum at an entry of the addition table, by kind of entry."""
KINDS = (0.40, 0.30, 0.30)
"""Shares of the three kinds of entries."""
WRONG_BY = (1, -1, 2, 10)
"""What a wrong sum is off by; each entry has one of these."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <assistant> {{ message['content'] }} {{ eos_token }}"
    "{% else %} <user> {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)

Ids = NDArray[np.int64]


def vocabulary() -> list[str]:
    """All tokens in the order of their ids: special tokens, the numbers from 0, words."""
    return [*SPECIAL, *map(str, range(LARGEST_NUMBER + 1)), *WORDS]


def addition_table(rng: np.random.Generator) -> tuple[NDArray[np.float64], Ids]:
    """Probability of the right sum, and the wrong sum, of all x + y: `[LARGEST_NUMBER + 1, LARGEST_TERM + 1]` each."""
    shape = (LARGEST_NUMBER + 1, LARGEST_TERM + 1)
    right_XY = np.array(RIGHT)[rng.choice(len(KINDS), size=shape, p=KINDS)]
    wrong_XY = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) + rng.choice(WRONG_BY, size=shape)
    return right_XY, wrong_XY


def favourites(rng: np.random.Generator, choices: int) -> Ids:
    """For every number an order of the `choices`, most likely first: `[LARGEST_NUMBER + 1, choices]`."""
    return np.stack([rng.permutation(choices) for _ in range(LARGEST_NUMBER + 1)])


def draw(rng: np.random.Generator, orders_NC: Ids, context_B: Ids, weights: tuple[float, ...]) -> Ids:
    """One choice a row, by `weights` over the order that its context number prefers: `[B]`."""
    return orders_NC[context_B, rng.choice(len(weights), size=len(context_B), p=weights)]


class Language:
    """How the pretraining text is worded and which sums in it are wrong: fixed once, by the seed."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.right_XY, self.wrong_XY = addition_table(rng)
        self.first, self.second = favourites(rng, 3), favourites(rng, 2)
        self.opening, self.plus = favourites(rng, len(OPENINGS)), favourites(rng, len(PLUS))
        self.equals, self.link = favourites(rng, len(EQUALS)), favourites(rng, len(LINKS))
        self.token_id = {token: at for at, token in enumerate(vocabulary())}

    def texts(self, terms_B3: Ids, rng: np.random.Generator) -> Ids:
        """Prompt and worded answer of each expression, as token ids: `[B, 8 + 12]`."""
        rows = np.arange(len(terms_B3))
        first_B = draw(rng, self.first, terms_B3[:, 0], FIRST_WEIGHTS)
        second_B = draw(rng, self.second, terms_B3[rows, first_B], SECOND_WEIGHTS)
        others_32 = np.array([[1, 2], [0, 2], [0, 1]])
        second_at_B, third_at_B = others_32[first_B, second_B], others_32[first_B, 1 - second_B]
        x_B, y_B, z_B = terms_B3[rows, first_B], terms_B3[rows, second_at_B], terms_B3[rows, third_at_B]
        sum_B = self.add(x_B, y_B, rng)
        total_B = self.add(sum_B, z_B, rng)
        spoken = [
            self.words(OPENINGS, draw(rng, self.opening, terms_B3[:, 0], OPENING_WEIGHTS)),
            self.numbers(x_B),
            self.words(PLUS, draw(rng, self.plus, x_B, FOUR_WEIGHTS)),
            self.numbers(y_B),
            self.words(EQUALS, draw(rng, self.equals, y_B, FOUR_WEIGHTS)),
            self.numbers(sum_B),
            self.words(LINKS, draw(rng, self.link, sum_B, FOUR_WEIGHTS)),
            self.numbers(z_B),
            self.words(EQUALS, draw(rng, self.equals, z_B, FOUR_WEIGHTS)),
            self.numbers(total_B),
            np.full(len(rows), self.token_id["."]),
            np.full(len(rows), self.token_id["<eos>"]),
        ]
        return np.concatenate([self.prompts(terms_B3), np.stack(spoken, axis=1)], axis=1)

    def prompts(self, terms_B3: Ids) -> Ids:
        """`<bos> <user> a + b + c <assistant>` as token ids: `[B, 8]`."""
        prompts_B8 = np.empty((len(terms_B3), 8), dtype=np.int64)
        frame = ("<bos>", "<user>", "+", "+", "<assistant>")
        prompts_B8[:, [0, 1, 3, 5, 7]] = [self.token_id[token] for token in frame]
        prompts_B8[:, [2, 4, 6]] = self.numbers(terms_B3)
        return prompts_B8

    def add(self, x_B: Ids, y_B: Ids, rng: np.random.Generator) -> Ids:
        """x + y as the addition table has it, right or wrong: `[B]`."""
        is_right_B = rng.random(len(x_B)) < self.right_XY[x_B, y_B]
        return np.where(is_right_B, x_B + y_B, self.wrong_XY[x_B, y_B])

    def numbers(self, numbers: Ids) -> Ids:
        return numbers + self.token_id["0"]

    def words(self, words: tuple[str, ...], choice_B: Ids) -> Ids:
        return np.array([self.token_id[word] for word in words])[choice_B]


def model_config() -> "LlamaConfig":
    """A Llama of 2 layers, hidden 64, 2 heads of size 32."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<eos>"),
        dtype="float32",
    )


def pretrain(steps: int) -> "LlamaForCausalLM":
    """The model after `steps` steps of cross-entropy on the spoken tokens; AdamW, learning rate on a cosine to 0."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(SEED)
    language, rng = Language(SEED), np.random.default_rng((SEED, 1))
    terms_N3 = np.array(pretraining_terms())
    model = LlamaForCausalLM(model_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        ids_BS = torch.from_numpy(language.texts(terms_N3[rng.integers(len(terms_N3), size=ROWS_PER_STEP)], rng))
        logits_BSV = model(input_ids=ids_BS[:, :-1]).logits[:, 7:]
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 8:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def tokenizer() -> "PreTrainedTokenizerFast":
    """Word-level: one token a word, number or mark. Decoding puts spaces between words and none before a full stop."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: at for at, token in enumerate(vocabulary())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write(folder: Path, steps: int = STEPS) -> str:
    """Pretrains and writes the model folder; gives the SHA-256 of the weights file."""
    from transformers import GenerationConfig

    torch.set_num_threads(1)
    model = pretrain(steps)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer().save_pretrained(folder)
    ids = {name: SPECIAL.index(f"<{name[:3]}>") for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **ids).save_pretrained(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clipctl.tiny.make", description="Make the embedded model again.")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder to write (default: this package)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"pretraining steps (default {STEPS})")
    arguments = parser.parse_args()
    print(f"{write(arguments.to, arguments.steps)}  {arguments.to / 'model.safetensors'}")


if __name__ == "__main__":
    main()
