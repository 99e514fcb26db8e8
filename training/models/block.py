"""One block of the transformer: attention and feed-forward network over several groups of crops at once.

Letters: C crops in a group, T tokens of a crop, D embedding dim, H heads, F hidden dim, R rows (tokens of all
groups).

Packing: whatever treats tokens alone (linear layers, norms, LayerScale) runs once on the R rows of all groups;
attention runs per group, whose crops are of one size. No mask is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ConfigError, ModelConfig

NORM_EPS = 1e-6
ATTENTIONS = ("auto", "sdpa", "plain", "varlen")
HALVES = (torch.bfloat16, torch.float16)
Sizes = Sequence[tuple[int, int]]  # (C, T) of each group


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual (Touvron et al. 2021); ``_linear`` applies it."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def reset_parameters(self) -> None:
        """Back to the initial gain."""
        nn.init.constant_(self.gamma, self.initial)


def _linear(rows: Tensor, layer: nn.Linear, gain: Tensor | None) -> Tensor:
    """Rows [R, F] through a linear layer and a gain [D] to [R, D].

    In training the gain scales the weights and not the rows, so that rows without gain are not kept for its gradient;
    otherwise as the formula has it, rounding included.
    """
    if gain is None or torch.is_grad_enabled():
        return F.linear(rows, *_scaled(layer, gain))
    return F.linear(rows, layer.weight, layer.bias) * gain


def _scaled(layer: nn.Linear, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight [D, F] and bias [D] of a linear layer that a gain [D] follows."""
    if gain is None:
        return layer.weight, layer.bias
    return layer.weight * gain[:, None], layer.bias * gain


class _GeluLinear(torch.autograd.Function):
    """A linear layer of gelu(x); keeps x alone for the backward pass, which makes gelu(x) again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[R, F], [D, F], [D] to [R, D]."""
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of x, weight and bias."""
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        by_weight = gradient.T @ F.gelu(x)
        return torch.ops.aten.gelu_backward(gradient @ weight, x), by_weight, gradient.sum(0)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, rows: Tensor, gain: Tensor | None = None) -> Tensor:
        """Rows [R, D], and a gain [D] of what comes out, to [R, D]."""
        hidden: Tensor = self.fc1(rows)  # [R, F]
        if self.activation == "relu" or not torch.is_grad_enabled():
            act = F.relu if self.activation == "relu" else F.gelu
            return _linear(act(hidden), self.fc2, gain)
        # in the precision of fc1: an autograd function is not cast under autocast
        weight, bias = (part.to(hidden.dtype) for part in _scaled(self.fc2, gain))
        out: Tensor = _GeluLinear.apply(hidden, weight, bias)
        return out


class SwiGlu(nn.Module):
    """SiLU(x W1) * (x W2), then W3 (Shazeer 2020); W1 and W2 are one matrix, the gated half first."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, rows: Tensor, gain: Tensor | None = None) -> Tensor:
        """Rows [R, D], and a gain [D] of what comes out, to [R, D]."""
        gate, value = self.w12(rows).chunk(2, dim=-1)  # [R, F] each
        return _linear(F.silu(gate) * value, self.w3, gain)


def hidden_dim(config: ModelConfig) -> int:
    """F: of an MLP ``mlp_ratio`` times D; of SwiGLU two thirds of that, rounded up to a multiple of 8."""
    wide = int(config.shape[0] * config.mlp_ratio)
    return wide if config.ffn == "mlp" else (int(wide * 2 / 3) + 7) // 8 * 8


class Attention(nn.Module):
    """Multi-head self-attention of the tokens of each crop."""

    def __init__(self, dim: int, num_heads: int, kind: str) -> None:
        """Linear layers, and how tokens are mixed.

        Args:
            dim: D.
            num_heads: H, which divides D.
            kind: sdpa, per group; plain, the same in explicit products; varlen, one call for the crops of all groups,
                on CUDA in half precision; auto, which is sdpa.

        Raises:
            ConfigError: no such kind, or none here.
        """
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if kind not in ATTENTIONS:
            raise ConfigError(f"attention: got {kind!r}; allowed: {', '.join(ATTENTIONS)}")
        if kind == "varlen":
            _check_varlen()

    def forward(
        self, rows: Tensor, sizes: Sizes, *, gain: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Rows [R, D] to [R, D], or to [W, D].

        Args:
            rows: tokens of all crops of all groups, one after the other.
            sizes: (C, T) of each group.
            gain: [D], of what comes out.
            wanted: int64 [W], the rows that are asked for; None: all.
        """
        qkv: Tensor = self.qkv(rows).view(len(rows), 3, self.num_heads, -1)  # [R, 3, H, D / H]
        mixed = self._mixed(qkv, sizes).flatten(1)  # [R, D]
        return _linear(mixed if wanted is None else mixed[wanted], self.proj, gain)

    def _mixed(self, qkv: Tensor, sizes: Sizes) -> Tensor:
        """[R, 3, H, D / H] to [R, H, D / H]."""
        if self.kind == "varlen":
            return _varlen(qkv, sizes)
        attend = _plain if self.kind == "plain" else _sdpa
        mixed = [
            attend(group.view(*size, *group.shape[1:])) for group, size in zip(_split(qkv, sizes), sizes, strict=True)
        ]
        return _joined([group.flatten(0, 1) for group in mixed])


def _sdpa(qkv: Tensor) -> Tensor:
    """[C, T, 3, H, D / H] to [C, T, H, D / H]."""
    if qkv.device.type == "cpu" and qkv.dtype in HALVES:
        # on CPUs the backward pass in half precision is several times slower than in full
        with torch.autocast("cpu", enabled=False):
            return _sdpa(qkv.float()).to(qkv.dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [C, H, T, D / H] each
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _plain(qkv: Tensor) -> Tensor:
    """As ``_sdpa``. Under autocast products are in half precision, the softmax between them in fp32."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [C, H, T, T]
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    mixed: Tensor = shares @ value
    return mixed.transpose(1, 2)


def _check_varlen() -> None:
    try:
        import torch.nn.attention.varlen
    except ImportError:
        raise ConfigError(
            f"attention: got 'varlen', which torch {torch.__version__} has not; allowed here: auto, sdpa, plain"
        ) from None
    if not torch.cuda.is_available():
        raise ConfigError("attention: got 'varlen', which needs a CUDA device; allowed here: auto, sdpa, plain")


def _varlen(qkv: Tensor, sizes: Sizes) -> Tensor:
    """[R, 3, H, D / H] to [R, H, D / H]. Not covered by tests: it needs a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    if qkv.dtype not in HALVES:
        raise ConfigError(f"attention: 'varlen' needs half precision, got {qkv.dtype}; set parallel.precision=bf16")
    starts, begin = [torch.zeros(1, dtype=torch.int32, device=qkv.device)], 0
    for num, length in sizes:
        starts.append(torch.arange(1, num + 1, dtype=torch.int32, device=qkv.device) * length + begin)
        begin += num * length
    bounds, longest = torch.cat(starts), max(length for _, length in sizes)
    query, key, value = qkv.unbind(1)
    # Seven positional arguments: what comes after them differs between versions of torch.
    out: Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest)  # type: ignore[assignment]
    return out


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each half added to what it was given.

    The unit of sharding, compilation and activation checkpointing.
    """

    def __init__(self, config: ModelConfig, attention: str) -> None:
        super().__init__()
        dim, _, num_heads = config.shape
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads, attention)
        self.ls1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp: nn.Module = (
            SwiGlu(dim, hidden_dim(config))
            if config.ffn == "swiglu"
            else Mlp(dim, hidden_dim(config), config.activation)
        )
        self.ls2 = _layer_scale(config)

    def forward(self, groups: Sequence[Tensor], wanted: Tensor | None = None) -> list[Tensor]:
        """Groups of crops [C, T, D], each group with its own C and T, to the same.

        Args:
            groups: tokens.
            wanted: int64 [W], which of all R tokens are asked for. All are looked at, only these go through what comes
                after attention (with stochastic depth all still do), and one tensor [W, D] comes out. None: all.
        """
        if self.training and self.drop_path > 0:
            outputs = self._add_to_some(self._add_to_some(groups, self._attend), self._feed)
            return outputs if wanted is None else [_joined([group.flatten(0, 1) for group in outputs])[wanted]]
        sizes = [(group.shape[0], group.shape[1]) for group in groups]
        rows = _joined([group.flatten(0, 1) for group in groups])  # [R, D]
        attended = self._attend(rows, sizes, wanted)
        rows = (rows if wanted is None else rows[wanted]) + attended
        rows = rows + self._feed(rows, sizes)
        if wanted is not None:
            return [rows]
        return [part.view(*size, -1) for part, size in zip(_split(rows, sizes), sizes, strict=True)]

    def _attend(self, rows: Tensor, sizes: Sizes, wanted: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn(self.norm1(rows), sizes, gain=_gain(self.ls1), wanted=wanted)
        return out

    def _feed(self, rows: Tensor, sizes: Sizes) -> Tensor:
        out: Tensor = self.mlp(self.norm2(rows), _gain(self.ls2))
        return out

    def _add_to_some(self, groups: Sequence[Tensor], residual: Callable[[Tensor, Sizes], Tensor]) -> list[Tensor]:
        """Add to each group the residual of a random subset of its crops (stochastic depth).

        The subset is small enough to save time, and its residuals are scaled up, so that the sum is right on average
        (Oquab et al. 2023, section 5).
        """
        kept = [_subset(group, self.drop_path) for group in groups]
        inputs = [group[index] for group, index in zip(groups, kept, strict=True)]
        sizes = [(group.shape[0], group.shape[1]) for group in inputs]
        rows = residual(_joined([group.flatten(0, 1) for group in inputs]), sizes)  # [R, D]
        residuals = [part.view(*size, -1) for part, size in zip(_split(rows, sizes), sizes, strict=True)]
        return [
            torch.index_add(group, 0, index, part.to(group.dtype), alpha=len(group) / len(index))
            for group, index, part in zip(groups, kept, residuals, strict=True)
        ]


def _layer_scale(config: ModelConfig) -> nn.Module:
    return nn.Identity() if config.layerscale is None else LayerScale(config.shape[0], config.layerscale)


def _gain(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def _subset(group: Tensor, drop_path: float) -> Tensor:
    """Indices [kept] of the crops of a group [C, T, D] that get a residual."""
    num_kept = max(int(len(group) * (1 - drop_path)), 1)
    return torch.randperm(len(group), device=group.device)[:num_kept]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(rows: Tensor, sizes: Sizes) -> Sequence[Tensor]:
    """Rows [R, ...] to those of each group [C T, ...]."""
    return torch.split(rows, [num * length for num, length in sizes])
