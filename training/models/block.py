"""One block of the transformer: attention and feed-forward network over several groups of crops at once.

Letters: C crops in a group, T tokens of a crop, D embedding dim, H heads, F hidden dim, R rows (tokens of all
groups).

Packing: whatever treats tokens alone (linear layers, norms, LayerScale) runs once on the R rows of all groups;
attention runs per group, whose crops are of one size. No mask is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ConfigError, ModelConfig

NORM_EPS = 1e-6
ATTENTIONS = ("auto", "sdpa", "plain", "varlen")
HALVES = (torch.bfloat16, torch.float16)
Sizes = Sequence[tuple[int, int]]  # (C, T) of each group


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def reset_parameters(self) -> None:
        """Back to the initial gain."""
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [R, D] to [R, D]."""
        return rows * self.gamma


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.act: nn.Module = {"gelu": nn.GELU, "relu": nn.ReLU}[activation]()

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [R, D] to [R, D]."""
        hidden: Tensor = self.act(self.fc1(rows))  # [R, F]
        out: Tensor = self.fc2(hidden)
        return out


class SwiGlu(nn.Module):
    """SiLU(x W1) * (x W2), then W3 (Shazeer 2020); W1 and W2 are one matrix, the gated half first."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [R, D] to [R, D]."""
        gate, value = self.w12(rows).chunk(2, dim=-1)  # [R, F] each
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


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

    def forward(self, rows: Tensor, sizes: Sizes) -> Tensor:
        """Rows [R, D] to [R, D].

        Args:
            rows: tokens of all crops of all groups, one after the other.
            sizes: (C, T) of each group.
        """
        qkv: Tensor = self.qkv(rows).view(len(rows), 3, self.num_heads, -1)  # [R, 3, H, D / H]
        if self.kind == "varlen":
            return self._project(_varlen(qkv, sizes))
        attend = _plain if self.kind == "plain" else _sdpa
        mixed = [
            attend(group.view(*size, *group.shape[1:])) for group, size in zip(_split(qkv, sizes), sizes, strict=True)
        ]
        return self._project(_joined([group.flatten(0, 1) for group in mixed]))

    def _project(self, mixed: Tensor) -> Tensor:
        """Heads [R, H, D / H] to rows [R, D]."""
        out: Tensor = self.proj(mixed.flatten(1))
        return out


def _sdpa(qkv: Tensor) -> Tensor:
    """[C, T, 3, H, D / H] to [C, T, H, D / H]."""
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

    def forward(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Groups of crops [C, T, D], each group with its own C and T, to the same."""
        halfway = self._add(groups, self._attend)
        return self._add(halfway, self._feed)

    def _attend(self, rows: Tensor, sizes: Sizes) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(rows), sizes))
        return out

    def _feed(self, rows: Tensor, sizes: Sizes) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(rows)))
        return out

    def _add(self, groups: Sequence[Tensor], residual: Callable[[Tensor, Sizes], Tensor]) -> list[Tensor]:
        """Add a residual to each group; in training only that of a random subset of its crops (stochastic depth).

        The subset is small enough to save time, and its residuals are scaled up, so that the sum is right on average
        (Oquab et al. 2023, section 5).
        """
        is_dropped = self.training and self.drop_path > 0
        kept = [_subset(group, self.drop_path) for group in groups] if is_dropped else None
        inputs = [group[index] for group, index in zip(groups, kept, strict=True)] if kept else groups
        sizes = [(group.shape[0], group.shape[1]) for group in inputs]
        rows = residual(_joined([group.flatten(0, 1) for group in inputs]), sizes)  # [R, D]
        residuals = [part.view(*size, -1) for part, size in zip(_split(rows, sizes), sizes, strict=True)]
        if kept is None:
            return [group + part for group, part in zip(groups, residuals, strict=True)]
        return [
            torch.index_add(group, 0, index, part.to(group.dtype), alpha=len(group) / len(index))
            for group, index, part in zip(groups, kept, residuals, strict=True)
        ]


def _layer_scale(config: ModelConfig) -> nn.Module:
    return nn.Identity() if config.layerscale is None else LayerScale(config.shape[0], config.layerscale)


def _subset(group: Tensor, drop_path: float) -> Tensor:
    """Indices [kept] of the crops of a group [C, T, D] that get a residual."""
    num_kept = max(int(len(group) * (1 - drop_path)), 1)
    return torch.randperm(len(group), device=group.device)[:num_kept]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(rows: Tensor, sizes: Sizes) -> Sequence[Tensor]:
    """Rows [R, ...] to those of each group [C T, ...]."""
    return torch.split(rows, [num * length for num, length in sizes])
