"""Attention and key-value cache of the torch engine, in transformers' own extension points.

The attention is the scaled dot product with keys and values that are not repeated for grouped queries where a kernel takes
them so: in decoding the queries of one key-value head become the query positions of one call, which also takes a mask.
The cache is one block of memory per layer that all rows write at the same column; a row that began later has its
first columns masked. So prompts of any length decode side by side, and finished rows are taken out by an index.

Letters: B rows, H query heads, K key-value heads, Q query positions, C columns, E head size.
"""

from typing import Any

from torch import Tensor, float32, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: TID253

from clipctl.errors import ModelError

NAME = "clipctl_grouped"
GROWTH = 64
"""Columns by which a full cache grows at least."""


def use_grouped_attention(model: Any) -> Any:
    """The model with this module's attention. Raises ModelError for layers that look at a window only."""
    from transformers import AttentionInterface

    config: Any = model.config
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if "sliding_attention" in (layers or ()) or (layers is None and window):
        raise ModelError(
            f"model.path: {config.name_or_path} attends over a sliding window, which the torch engine does not do; "
            "use a model with full attention"
        )
    AttentionInterface.register(NAME, grouped_attention)
    config._attn_implementation = NAME
    return model


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B,H,Q,E], key and value [B,K,C,E], mask [B,1,Q,C] or None for causal -> [B,Q,H,E]."""
    rows, heads, positions, size = query.shape
    groups = key.shape[1]
    if positions == 1:
        grouped = query.view(rows, groups, heads // groups, size)
        mixed = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return mixed.reshape(rows, 1, heads, size), None
    if heads != groups and repeats_keys(query, attention_mask):
        key, value = (states.repeat_interleave(heads // groups, 1) for states in (key, value))
    mixed = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=heads != key.shape[1],
    )
    return mixed.transpose(1, 2).contiguous(), None


def repeats_keys(query: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether grouped queries need repeated keys: on a GPU only the kernel for 16-bit values without a mask takes groups, and
    what is left for others would hold the scores of all pairs of positions."""
    return query.device.type != "cpu" and (attention_mask is not None or query.dtype == float32)


class ColumnLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [B,K,capacity,E], filled up to `columns` of `at_most`.

    Capacity doubles: blocks that grow little by little leave a GPU's allocator with blocks that fit nothing.
    """

    def __init__(self, at_most: int) -> None:
        super().__init__()
        self.columns = 0
        self.at_most = at_most

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.columns + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = max(end, min(max(end + GROWTH, 2 * self.keys.shape[2]), self.at_most))
            self.keys = _grown(self.keys, self.columns, capacity)
            self.values = _grown(self.values, self.columns, capacity)
        self.keys[:, :, self.columns : end] = key_states
        self.values[:, :, self.columns : end] = value_states
        self.columns = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def take(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self.keys = self.keys.index_select(0, rows_B)
        self.values = self.values.index_select(0, rows_B)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1


class ColumnCache(Cache):  # type: ignore[misc]
    """One `ColumnLayer` a layer of the model. at_most: columns that will ever be needed."""

    def __init__(self, layers: int, at_most: int) -> None:
        super().__init__(layers=[ColumnLayer(at_most) for _ in range(layers)])

    def take(self, rows_B: Tensor) -> None:
        for layer in self.layers:
            layer.take(rows_B)


def _grown(states: Tensor, filled: int, capacity: int) -> Tensor:
    rows, groups, _, size = states.shape
    grown = states.new_empty(rows, groups, capacity, size)
    grown[:, :, :filled] = states[:, :, :filled]
    return grown
