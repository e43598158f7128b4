"""Bytes and multiplications of each kernel and each step of a tower, computed from shapes alone. No torch here.

Letters: B sessions, L positions of each (a block, or one token), N context tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from twotower.bench.roofline import Cost, Roofline
from twotower.model.config import ATTENTION, MAMBA, MOE, ModelConfig

BF16, FP32, FP64 = 2, 4, 8


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of one model, with weights in bf16 and routed experts at some precision."""

    config: ModelConfig
    experts_precision: str = "bf16"
    read: float | None = None
    """Experts that a layer reads; None: the expected number (`distinct`)."""

    def linear(self, rows: int, inputs: int, outputs: int, out_bytes: int = BF16) -> Cost:
        """A matrix (rows, inputs) times a weight matrix."""
        moved = BF16 * inputs * (outputs + rows) + out_bytes * rows * outputs
        return Cost(moved, 2.0 * rows * inputs * outputs)

    def distinct(self, rows: int) -> float:
        """The expected number of experts that `rows` tokens need, if they choose at random."""
        config = self.config
        return config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** rows)

    def expert_bytes(self) -> float:
        """Bytes of both matrices of one expert, as stored."""
        config = self.config
        hidden, width = config.hidden_size, config.moe_intermediate_size
        if self.experts_precision == "fp8":
            return 2 * hidden * width + FP32 * (hidden + width)
        if self.experts_precision == "fp4":
            groups = width * -(-hidden // 16) + hidden * -(-width // 16)
            return 9 * groups + 2 * FP32
        return 2 * BF16 * hidden * width

    def experts(self, rows: int) -> Cost:
        """The routed experts."""
        config = self.config
        read = self.distinct(rows) if self.read is None else self.read
        moved = read * self.expert_bytes() + rows * config.hidden_size * (BF16 + FP32)
        return Cost(moved, 4.0 * rows * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size)

    def route(self, rows: int) -> Cost:
        """The router; its weights are kept in fp64."""
        config = self.config
        moved = config.hidden_size * (FP64 * config.n_routed_experts + BF16 * rows)
        return Cost(moved + 12 * rows * config.num_experts_per_tok, 2.0 * rows * config.hidden_size * config.n_routed_experts)

    def norm(self, rows: int) -> Cost:
        """Residual, adaLN and norm: two rows read, two written."""
        return Cost(4 * BF16 * rows * self.config.hidden_size, 8.0 * rows * self.config.hidden_size)

    def scan(self, batch: int, length: int, *, commit: bool) -> Cost:
        """From in_proj's output to out_proj's input; a commit writes the new state and the delta's factors as well."""
        c = self.config
        state = batch * c.d_inner * c.ssm_state_size
        tail = batch * c.conv_dim * c.conv_kernel
        projected = batch * length * (c.d_inner + c.conv_dim + c.mamba_num_heads)
        moved = BF16 * (projected + tail + batch * length * c.d_inner) + FP32 * state
        pairs = batch * c.mamba_num_heads * length * length * (c.ssm_state_size + c.mamba_head_dim)
        flops = 2.0 * length * state + pairs  # half of the pairs of positions lie in the past
        if not commit:
            return Cost(moved, flops)
        factors = batch * length * (c.d_inner + c.n_groups * c.ssm_state_size) + tail
        return Cost(moved + FP32 * state + BF16 * factors, flops + 3.0 * length * state)

    def apply(self, batch: int, length: int) -> Cost:
        """A delta applied to the state, which is read, updated and written."""
        c = self.config
        state = batch * c.d_inner * c.ssm_state_size
        factors = batch * length * (c.d_inner + c.n_groups * c.ssm_state_size)
        return Cost(2 * FP32 * state + BF16 * factors, 3.0 * length * state)

    def attention(self, batch: int, length: int, context: int) -> Cost:
        """Attention of a block over [context, block]."""
        c = self.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        moved = BF16 * batch * (2 * length * queries + 2 * (context + length) * keys)
        return Cost(moved, 4.0 * batch * length * (context + length) * queries)

    def unmask(self, batch: int, length: int) -> Cost:
        """Unmasking, which reads logits in fp32 once."""
        rows = batch * length
        return Cost(FP32 * rows * self.config.vocab_size, 4.0 * rows * self.config.vocab_size)

    def head(self, rows: int) -> Cost:
        """Hidden states to logits in fp32."""
        return self.linear(rows, self.config.hidden_size, self.config.vocab_size, FP32)

    def denoiser_step(self, batch: int, context: int) -> Counter[tuple[str, Cost]]:
        """One forward of the denoiser over blocks, and unmasking: the operations and their counts."""
        c, length = self.config, self.config.block_size
        counts = Counter(op for kind in c.hybrid_override_pattern for op in self._layer(kind, batch, length, context))
        hidden = c.hidden_size
        time = self.linear(batch, 256, hidden) + self.linear(batch, hidden, hidden) + self.linear(batch, hidden, 3 * hidden)
        counts.update([("time", time), ("head", self.head(batch * length)), ("unmask", self.unmask(batch, length))])
        return counts

    def commit(self, batch: int, context: int) -> Counter[tuple[str, Cost]]:
        """One forward of the context tower over finished blocks, up to its last layer with a state; no logits."""
        kinds = self.config.hybrid_override_pattern
        last = max((i for i, kind in enumerate(kinds) if kind in (MAMBA, ATTENTION)), default=-1)
        length = self.config.block_size
        return Counter(op for kind in kinds[: last + 1] for op in self._layer(kind, batch, length, context, commit=True))

    def ar_step(self, batch: int, context: int) -> Counter[tuple[str, Cost]]:
        """One token of each session by the context tower alone."""
        kinds = self.config.hybrid_override_pattern
        counts = Counter(op for kind in kinds for op in self._layer(kind, batch, 1, context, commit=True))
        counts.update([("head", self.head(batch)), ("unmask", self.unmask(batch, 1))])
        return counts

    def _layer(self, kind: str, batch: int, length: int, context: int, *, commit: bool = False) -> Iterator[tuple[str, Cost]]:
        c, rows = self.config, batch * length
        yield "norm", self.norm(rows)
        if kind == MAMBA:
            yield "in_proj", self.linear(rows, c.hidden_size, c.d_inner + c.conv_dim + c.mamba_num_heads)
            yield "scan", self.scan(batch, length, commit=commit)
            yield "out_proj", self.linear(rows, c.d_inner, c.hidden_size)
        elif kind == ATTENTION:
            queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            yield "qkv", self.linear(rows, c.hidden_size, queries + 2 * keys)
            yield "attention", self.attention(batch, length, context)
            yield "o_proj", self.linear(rows, queries, c.hidden_size)
        elif kind == MOE:
            yield "route", self.route(rows)
            yield "experts", self.experts(rows)
            yield "shared", self._mlp(rows, c.moe_shared_expert_intermediate_size)
        else:
            yield "mlp", self._mlp(rows, c.intermediate_size)

    def _mlp(self, rows: int, width: int) -> Cost:
        return self.linear(rows, self.config.hidden_size, width) + self.linear(rows, width, self.config.hidden_size)


def total(counts: Counter[tuple[str, Cost]]) -> Cost:
    """The cost of a step."""
    return sum((cost * times for (_, cost), times in counts.items()), Cost())


def least_seconds(counts: Counter[tuple[str, Cost]], roofline: Roofline) -> float:
    """The least time of a step whose operations wait for one another: the sum of the least times of all."""
    return sum(times * roofline.seconds(cost) for (_, cost), times in counts.items())
