"""What one step minimises: DINO, iBOT and KoLeo between a student and the EMA of itself (Oquab et al., DINOv2).

Letters: B pictures of a micro-batch, C = 2 B global crops (view-major), L locals a picture, N patches, D embedding dim,
K prototypes, M masked patches of a micro-batch.

A step may be cut into micro-batches. Assignments (Sinkhorn, centre) and, with ``koleo.scope: step``, nearest neighbours
are of the whole step all the same: teacher logits of all micro-batches are assigned together, and the gradient of KoLeo
with respect to class tokens is taken over all of them before the pass that it flows back through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Resolved
from training.data import photometric
from training.data.collate import Batch
from training.losses.centering import Center
from training.losses.gram import gram_loss, resize_tokens
from training.losses.koleo import duplicate_pairs, koleo
from training.losses.sinkhorn import sinkhorn
from training.metrics import PrototypeUse
from training.models.network import Network
from training.models.vit import Tokens
from training.parallel import World
from training.schedule import At


@dataclass(kw_only=True)
class Views:
    """A micro-batch on the device, ready for the networks."""

    global_crops: Tensor  # float [C, 3, G, G], normalised
    local_crops: Tensor | None  # float [L B, 3, l, l]
    gram_crops: Tensor | None  # float [C, 3, g, g]
    masks: Tensor | None  # bool [C, N]; None before masking starts
    masked_indices: Tensor  # int64 [M], into [C N]

    @property
    def num_pictures(self) -> int:
        """B."""
        return len(self.global_crops) // 2

    @property
    def student_crops(self) -> list[Tensor]:
        """Groups of crops that the student sees."""
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]


@dataclass(kw_only=True)
class Targets:
    """What the teacher says of a micro-batch."""

    cls: Tensor | None  # [C, K], rows sum to 1
    patches: Tensor | None  # [M, K]
    tokens: Tokens | None  # of the global crops; kept only by modes that compare tokens
    num_duplicates: int  # pairs of pictures whose class tokens are the same in the first view


class Objective(nn.Module):
    """Student, teacher, and what is computed between them.

    Attributes:
        student: learns.
        teacher: in a distill stage a frozen network, else the EMA of the student.
        cls_center: running centre of class-token logits; unused by Sinkhorn.
        patch_center: of masked patches.
        gram_teacher: its backbone is what patch similarities are held to; None without gram.
        is_gram_on: whether they are yet.
    """

    gram_teacher: Network | None
    is_gram_on: bool = False

    def __init__(
        self, resolved: Resolved, student: Network, teacher: Network, gram_teacher: Network | None = None
    ) -> None:
        super().__init__()
        self.resolved = resolved
        self.config = resolved.objective
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        momentum = self.config.center_momentum
        patch_head = self.config.ibot.head or self.config.dino.head
        self.cls_center = Center(self.config.dino.head.num_prototypes, momentum)
        self.patch_center = Center(patch_head.num_prototypes, momentum)
        self.prototype_use = PrototypeUse(self.config.dino.head.num_prototypes)
        self.gram_teacher = gram_teacher.requires_grad_(False).eval() if gram_teacher is not None else None

    def place(self, world: World) -> Objective:
        """Take the centres to the device; the networks were placed by ``parallel.distribute``."""
        self.world = world
        self.cls_center.to(world.device)
        self.patch_center.to(world.device)
        return self

    # Input

    def views(self, batch: Batch, *, is_masked: bool) -> Views:
        """Move a micro-batch to the device and normalise it.

        Args:
            batch: uint8 crops, or float ones that are normalised already.
            is_masked: whether iBOT is on at this step.
        """
        config = self.resolved.views
        batch = batch.to(self.world.device)

        def ready(crops: Tensor, name: str = "") -> Tensor:
            if crops.is_floating_point():
                return crops
            if batch.photometric is not None and name in batch.photometric:
                crops = photometric.apply(crops, batch.photometric[name])
            return photometric.normalise(crops, config.mean, config.std)

        masks, indices = batch.masks, batch.masked_indices
        if self.resolved.stage.kind == "distill":  # the student sees whole pictures, and all their patches count
            masks = torch.ones_like(masks)
            indices = torch.arange(masks.numel(), device=masks.device)
        return Views(
            global_crops=ready(batch.global_crops, "global_crops"),
            local_crops=ready(batch.local_crops, "local_crops") if batch.local_crops is not None else None,
            gram_crops=ready(batch.gram_crops) if batch.gram_crops is not None else None,
            masks=masks if is_masked else None,
            masked_indices=indices if is_masked else indices[:0],
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Of the backbone; heads and losses stay in fp32."""
        if self.resolved.parallel.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    # Teacher

    @torch.no_grad()
    def targets(self, micros: Sequence[Views], at: At) -> list[Targets]:
        """Assignments of all micro-batches of a step, made together."""
        all_tokens, cls_logits, patch_logits = [], [], []
        duplicates = []
        dino, ibot = self.config.dino, self.config.ibot
        for views in micros:
            with self.autocast():
                tokens = self.teacher.backbone([views.global_crops], wanted=self._wanted(views))[0]
            all_tokens.append(tokens)
            duplicates.append(duplicate_pairs(tokens.cls[: views.num_pictures]))
            if dino.weight and self.student.dino_head is not None and self.teacher.dino_head is not None:
                cls_logits.append(self.teacher.dino_head(tokens.cls.float()))  # [C, K]
            if ibot.weight and self.student.patch_head is not None and self.teacher.patch_head is not None:
                patch_logits.append(self.teacher.patch_head(_masked(tokens, views)))  # [M, K]
        cls = self._assigned(cls_logits, self.cls_center, at.teacher_temperature)
        patches = self._assigned(patch_logits, self.patch_center, at.patch_temperature)
        keeps = self.config.gram.weight > 0 or self.resolved.stage.kind == "distill"
        return [
            Targets(
                cls=cls[i] if cls else None,
                patches=patches[i] if patches else None,
                tokens=all_tokens[i] if keeps else None,
                num_duplicates=duplicates[i],
            )
            for i in range(len(micros))
        ]

    def _assigned(self, logits: list[Tensor], center: Center, temperature: float) -> list[Tensor]:
        """Logits [n_i, K] to probabilities [n_i, K], over all i and ranks at once."""
        if not logits:
            return []
        sizes = [len(rows) for rows in logits]
        joined = logits[0] if len(logits) == 1 else torch.cat(logits)
        logits.clear()
        if self.config.centering == "sinkhorn":
            rows = sinkhorn(
                joined,
                temperature=temperature,
                iterations=self.config.sinkhorn_iterations,
                group=self.world.group,
            )
        else:
            rows = center.probabilities(joined, temperature)
            center.update(joined, self.world.group)
        return list(torch.split(rows, sizes))

    @torch.no_grad()
    def refresh_gram(self) -> None:
        """Make the EMA teacher of now the one that patch similarities are held to."""
        assert self.gram_teacher is not None
        pairs = zip(self.gram_teacher.backbone.parameters(), self.teacher.backbone.parameters(), strict=True)
        for old, new in pairs:
            old.copy_(new)

    def centers(self) -> list[Tensor]:
        """Copies of the running centres, for a step that may be skipped."""
        return [center.center.clone() for center in (self.cls_center, self.patch_center)]

    def restore_centers(self, centers: list[Tensor]) -> None:
        """Put back what ``centers`` gave."""
        for center, old in zip((self.cls_center, self.patch_center), centers, strict=True):
            center.center.copy_(old)

    # Student

    def cls_tokens(self, views: Views) -> Tensor:
        """Class tokens of the global crops [C, D], by the very pass that ``losses`` makes."""
        with self.autocast():
            tokens = self.student.backbone(views.student_crops, self._masks(views), wanted=self._wanted(views))
        cls: Tensor = tokens[0].cls.float()
        return cls

    def _masks(self, views: Views) -> list[Tensor | None]:
        # A distilled student sees whole pictures (paper, section 5).
        first = None if self.resolved.stage.kind == "distill" else views.masks
        return [first, None][: len(views.student_crops)]

    def _wanted(self, views: Views) -> Tensor | None:
        """The patches that anything reads: masked ones [M], unless there is a term of all patches."""
        reads_all = self.config.gram.weight or self.config.koleo.patch_weight or self.resolved.stage.kind == "distill"
        return None if reads_all else views.masked_indices

    def losses(
        self, views: Views, targets: Targets, cls_gradient: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and its terms.

        Args:
            views: the micro-batch.
            targets: the teacher's.
            cls_gradient: [C, D], gradient of KoLeo over the whole step with respect to these class tokens; None where
                neighbours are sought within the micro-batch.

        Returns:
            Scalar to run backward on; terms before their weights, detached.
        """
        config = self.config
        with self.autocast():
            groups = self.student.backbone(views.student_crops, self._masks(views), wanted=self._wanted(views))
        global_tokens = groups[0]
        total = global_tokens.cls.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        if targets.cls is not None:
            assert self.student.dino_head is not None
            cls = torch.cat([group.cls for group in groups]).float()  # [C + L B, D]
            dino = self.student.dino_head.dino_loss(
                cls,
                targets.cls,
                num_locals=self.resolved.views.num_locals,
                temperature=config.dino.student_temperature,
                chunk=config.prototype_chunk,
            )
            total = total + config.dino.weight * dino.total
            terms |= {"dino": dino.total, "dino_global": dino.global_, "dino_local": dino.local}
        if targets.patches is not None and views.masks is not None:
            assert self.student.patch_head is not None
            ibot = self.student.patch_head.ibot_loss(
                _masked(global_tokens, views),
                targets.patches,
                masks=views.masks,
                temperature=config.ibot.student_temperature,
                chunk=config.prototype_chunk,
            )
            total = total + config.ibot.weight * ibot
            terms["ibot"] = ibot
        if self.student.feature_map is not None and targets.tokens is not None:
            feature = self._feature(global_tokens, targets.tokens)
            total = total + feature
            terms["feature"] = feature
        if config.koleo.weight:
            if cls_gradient is None:
                spread = self.spread(global_tokens.cls.float())
                total = total + config.koleo.weight * spread
                terms["koleo"] = spread
            else:
                total = total + config.koleo.weight * (global_tokens.cls.float() * cls_gradient).sum()
        if config.koleo.patch_weight:
            patches = self.spread(global_tokens.patches.float().mean(1))
            total = total + config.koleo.patch_weight * patches
            terms["koleo_patch"] = patches
        if self.is_gram_on:
            gram = self._gram(global_tokens, views)
            total = total + config.gram.weight * gram
            terms["gram"] = gram
        return total, {name: term.detach() for name, term in terms.items()}

    def spread(self, cls: Tensor) -> Tensor:
        """KoLeo summed over the two views of class tokens [C, D]."""
        group = self.world.group if self.config.koleo.distributed else None
        first, second = cls.chunk(2)
        return koleo(first, group=group) + koleo(second, group=group)

    def _feature(self, tokens: Tokens, held: Tokens) -> Tensor:
        """1 - cosine of class and of patch tokens [C, N, D] to the teacher's, mapped to its width; mean of the two."""
        assert self.student.feature_map is not None
        cls = self.student.feature_map(tokens.cls.float())
        patches = self.student.feature_map(tokens.patches.float())  # [C, N, D_teacher]
        held_patches = held.patches.float()
        if held_patches.shape[1] != patches.shape[1]:
            held_patches = resize_tokens(held_patches, _square(held_patches), _square(patches))
        of_cls = 1 - F.cosine_similarity(cls, held.cls.float(), dim=-1).mean()
        of_patches = 1 - F.cosine_similarity(patches, held_patches, dim=-1).mean()
        return (of_cls + of_patches) / 2

    def _gram(self, tokens: Tokens, views: Views) -> Tensor:
        assert self.gram_teacher is not None
        crops = views.gram_crops if views.gram_crops is not None else views.global_crops
        patch_px = self.resolved.model.patch_px
        with torch.no_grad(), self.autocast():
            held = self.gram_teacher.backbone([crops])[0].patches.float()  # [C, N', D]
        side, held_side = views.global_crops.shape[-1] // patch_px, crops.shape[-1] // patch_px
        if held_side != side:
            held = resize_tokens(held, (held_side, held_side), (side, side))
        return gram_loss(tokens.patches.float(), held)

    @torch.no_grad()
    def telemetry(self, targets: Sequence[Targets]) -> dict[str, float]:
        """How sharp and how spread the teacher's assignments are, and how many pictures are twins; of this rank."""
        found = {"duplicate_pairs": float(sum(target.num_duplicates for target in targets))}
        rows = [target.cls for target in targets if target.cls is not None]
        if rows:
            joined = torch.cat(rows)  # [n, K]
            entropy = -torch.special.xlogy(joined, joined).sum(-1).mean()
            found |= {"teacher_entropy": float(entropy), "prototype_use": self.prototype_use.update(joined)}
        return found


def _masked(tokens: Tokens, views: Views) -> Tensor:
    """Masked patches of the global crops, fp32 [M, D]."""
    patches = tokens.patches if tokens.patches.ndim == 2 else tokens.patches.flatten(0, 1)[views.masked_indices]
    return patches.float()


def _square(tokens: Tensor) -> tuple[int, int]:
    """Grid of patch tokens [C, N, D] of square crops."""
    side = math.isqrt(tokens.shape[1])
    return side, side
