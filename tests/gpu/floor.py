"""The least time that a rollout can take on a device: what its products and its memory traffic need, and nothing else.

For N responses of R tokens to prompts of P tokens in groups of G, with b responses decoded side by side and U updates, on a
device of C FLOP/s and W bytes/s, a dense decoder of B parameters without the embedding, V words, D hidden, L layers, H
heads of E values, K key-value heads, in 16 bits:

    a token through the body     2 B + 4 H E L (P + R)/2     FLOP; through the head 2 D V, of response tokens alone
    scoring                      N (P + R) tokens through the body, N R through the head
    training                     3 times scoring, once more with recomputed activations
    sampling                     the larger of N R tokens' products and N R / b readings of all weights, the cache that is read,
                                 4 L K E (P + R/2) bytes a token, and the prompts once a group
    AdamW                        30 bytes a parameter and update (28 in float32)

Sources: counting products as in arXiv 2001.08361, section 2.1; decoding as in arXiv 2211.05102, section 2.
"""

from dataclasses import dataclass

from clipctl.models import ModelShape


@dataclass(frozen=True, slots=True)
class Device:
    """flops: products of the model's precision, FLOP/s; bandwidth: of its memory, bytes/s."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Shape:
    """responses: N. prompt, response: mean tokens, P and R. group: G. side_by_side: b. updates: U. width: bytes of a value."""

    responses: int
    prompt: float
    response: float
    group: int
    side_by_side: int
    updates: int
    width: int = 2
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of each phase of a rollout."""

    sample: float
    score: float
    update: float

    @property
    def total(self) -> float:
        return self.sample + self.score + self.update


def floor(model: ModelShape, rollout: Shape, device: Device) -> Floor:
    """See the module's docstring."""
    n, p, r, width = rollout.responses, rollout.prompt, rollout.response, rollout.width
    embedding = model.vocabulary * model.hidden
    body_weights = model.parameters - embedding * (1 if model.tied else 2)
    body = 2 * body_weights
    head = 2 * embedding
    attention = 4 * model.heads * model.head_size * model.layers * (p + r) / 2
    cache = model.kv_values_per_token * width
    score = (n * (p + r) * (body + attention) + n * r * head) / device.flops
    products = n * r * (body + head) / device.flops
    weights = n * r / rollout.side_by_side * width * (body_weights + embedding) / device.bandwidth
    reads = n * r * (p + r / 2) * cache / device.bandwidth
    prompts = n / rollout.group * p * body / device.flops
    step = (30 if width == 2 else 28) * model.parameters / device.bandwidth
    update = (4 if rollout.recompute else 3) * score + rollout.updates * step
    return Floor(max(products, weights) + reads + prompts, score, update)
