"""Backbone and heads of one side, student or teacher."""

from __future__ import annotations

from torch import nn

from training.config import ModelConfig, ObjectiveConfig
from training.models.head import ProjectionHead
from training.models.vit import VisionTransformer


class Network(nn.Module):
    """A backbone with the heads that the objective needs. Its children's names are those of dinov2's checkpoints.

    Attributes:
        backbone: the vision transformer.
        dino_head: of class tokens; of patches too where the heads are tied. None where neither loss uses it.
        ibot_head: of masked patches. None where it is tied to DINO's, or off.
        feature_map: of tokens to those of a teacher without heads; None elsewhere.
    """

    dino_head: ProjectionHead | None
    ibot_head: ProjectionHead | None
    feature_map: nn.Linear | None

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        *,
        attention: str = "auto",
        feature_dim: int | None = None,
        with_heads: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = VisionTransformer(model, attention=attention)
        self.dino_head = self.ibot_head = self.feature_map = None
        dim = model.shape[0]
        if feature_dim is not None:
            self.feature_map = nn.Linear(dim, feature_dim)
        if feature_dim is not None or not with_heads:
            return
        ibot, dino = objective.ibot, objective.dino
        is_tied = ibot.weight > 0 and ibot.head is None
        if dino.weight > 0 or is_tied:
            self.dino_head = ProjectionHead(dim, dino.head)
        if ibot.weight > 0 and ibot.head is not None:
            self.ibot_head = ProjectionHead(dim, ibot.head)

    @property
    def patch_head(self) -> ProjectionHead | None:
        """The head of masked patches: iBOT's own, else DINO's."""
        return self.ibot_head if self.ibot_head is not None else self.dino_head

    def heads(self) -> dict[str, ProjectionHead]:
        """The heads that are there, by name."""
        named = {"dino_head": self.dino_head, "ibot_head": self.ibot_head}
        return {name: head for name, head in named.items() if head is not None}

    def init_weights(self) -> None:
        """Draw all weights anew from torch's generator."""
        self.backbone.init_weights()
        for head in self.heads().values():
            head.init_weights()
        if self.feature_map is not None:
            nn.init.trunc_normal_(self.feature_map.weight, std=0.02)
            nn.init.zeros_(self.feature_map.bias)
