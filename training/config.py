"""What a training run is: every value that a recipe can set, with its unit, range and source.

A recipe is a list of stages. Its top-level sections are the values of all of them; a stage changes what it names.
Paper means Oquab et al., DINOv2 (arXiv 2304.07193); released means what facebookresearch/dinov2 does when it runs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

EXECUTION: dict[str, Any] = {"execution": True}


class ConfigError(Exception):
    """Bad configuration: one readable line naming the key, the value got, the values allowed and the way out."""


class Config(BaseModel):
    """Base of every section of a recipe: frozen, and an unknown key is an error.

    A field declared with ``json_schema_extra=EXECUTION`` says how, not what (workers, paths, ports): it stands outside
    every fingerprint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def fingerprint_values(self) -> dict[str, Any]:
        """The values that decide content, JSON-able, execution fields left out."""
        return {name: _plain(getattr(self, name)) for name in self._content_fields()}

    def filled(self, values: dict[str, Any]) -> dict[str, Any]:
        """``fingerprint_values`` of an older version, with the fields that it had not yet at their defaults."""
        values = dict(values)
        for name in self._content_fields():
            own, info = getattr(self, name), type(self).model_fields[name]
            if name not in values and not info.is_required():
                values[name] = _plain(info.get_default(call_default_factory=True))
            elif isinstance(own, Config) and isinstance(values.get(name), dict):
                values[name] = own.filled(values[name])
        return values

    @classmethod
    def _content_fields(cls) -> list[str]:
        extras = {name: info.json_schema_extra for name, info in cls.model_fields.items()}
        return [name for name, extra in extras.items() if not (isinstance(extra, dict) and extra.get("execution"))]


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.fingerprint_values()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


Range = tuple[float, float]

# Model

# name: (embedding dim, blocks, heads) of timm's and dinov2's models of that name
ARCHITECTURES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
    "vit_giant2": (1536, 40, 24),
}


class ModelConfig(Config):
    """A vision transformer with the parameter names of dinov2."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant2"] = "vit_large"
    dim: int | None = Field(default=None, ge=8, description="embedding dim; null: that of arch")
    depth: int | None = Field(default=None, ge=1, description="blocks; null: that of arch")
    num_heads: int | None = Field(default=None, ge=1, description="null: that of arch")
    patch_px: int = Field(default=14, ge=1)
    # linear: each patch on its own, as published; conv: overlapping 3 x 3 convolutions before it (Xiao et al. 2021),
    # with which small networks on few pictures learn faster; optim.patch_embed_lr is theirs too
    stem: Literal["linear", "conv"] = "linear"
    image_px: int = Field(default=224, ge=1, description="side of the square that the position grid is stored for")
    ffn: Literal["mlp", "swiglu"] = "mlp"
    mlp_ratio: float = Field(default=4.0, gt=0)
    activation: Literal["gelu", "relu"] = "gelu"
    layerscale: float | None = Field(default=1e-5, gt=0, description="initial gamma; null: no LayerScale")
    num_registers: int = Field(default=0, ge=0)
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth, the same in every block")
    # released: dinov2 resizes the grid by (n + 0.1) / M for models without registers, by size and antialiased for
    # those with; offset and size name the two flavours
    pos_resize: Literal["offset", "size"] = "offset"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(embedding dim, blocks, heads)."""
        dim, depth, num_heads = ARCHITECTURES[self.arch]
        return self.dim or dim, self.depth or depth, self.num_heads or num_heads

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        dim, _, num_heads = self.shape
        if dim % num_heads:
            raise ValueError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        if self.image_px % self.patch_px:
            raise ValueError(f"image_px {self.image_px} must be a multiple of patch_px {self.patch_px}")
        if self.stem == "conv" and (dim % 32 or self.patch_px % 8):
            raise ValueError(
                f"stem 'conv' needs a dim that is a multiple of 32 and a patch_px that is one of 8; got {dim}, "
                f"{self.patch_px}"
            )
        return self


class HeadConfig(Config):
    """Projection head: MLP, L2 norm, prototypes."""

    num_prototypes: int = Field(default=65536, ge=2, description="K")
    hidden_dim: int = Field(default=2048, ge=1)
    bottleneck_dim: int = Field(default=256, ge=1)
    num_layers: int = Field(default=3, ge=1)
    # batch: BatchNorm in the MLP, DINO's use_bn_in_head; batch_all: after its last layer too, without gain and bias
    norm: Literal["none", "batch", "batch_all"] = "none"
    # dinov2 weight-normalises the prototypes with a gain that starts at 1 and learns; none: dinov3's plain linear
    weight_norm_gain: Literal["trainable", "frozen", "none"] = "trainable"


# Objective


class TemperatureConfig(Config):
    """Teacher temperature: linear from ``start`` to ``end`` over ``warmup`` steps (or samples, see schedule.unit)."""

    start: float = Field(default=0.04, gt=0)
    end: float = Field(default=0.07, gt=0)
    warmup: int = Field(default=37_500, ge=0)


class DinoConfig(Config):
    """Image-level loss: teacher globals against student globals and locals, the same view excluded."""

    weight: float = Field(default=1.0, ge=0)
    head: HeadConfig = HeadConfig()
    student_temperature: float = Field(default=0.1, gt=0)


class IbotConfig(Config):
    """Patch-level loss at masked patches of the global crops."""

    weight: float = Field(default=1.0, ge=0)
    head: HeadConfig | None = Field(default=None, description="null: shares DINO's head (tied)")
    student_temperature: float = Field(default=0.1, gt=0)
    temperature: TemperatureConfig | None = Field(default=None, description="of patches; null: as for DINO")
    start: int = Field(default=0, ge=0, description="steps or samples before it, during which nothing is masked")


class KoleoConfig(Config):
    """Spread of student class tokens, each view apart (Sablayrolles et al. 2019)."""

    weight: float = Field(default=0.1, ge=0)
    scope: Literal["micro", "step"] = "step"  # neighbours within a micro-batch, or within all of a step's
    distributed: bool = False  # neighbours on all ranks; dinov2 looks on its own rank only
    patch_weight: float = Field(default=0.0, ge=0, description="of the same loss on mean patch tokens")


class GramConfig(Config):
    """Gram anchoring: patch similarities held to those of an earlier teacher."""

    weight: float = Field(default=0.0, ge=0)
    start: int = Field(default=0, ge=0, description="steps or samples")
    refresh: int | None = Field(default=None, ge=1, description="steps between copies of the EMA teacher; null: never")
    max_refreshes: int = Field(default=3, ge=0)
    global_px: int | None = Field(default=None, ge=1, description="side of the crops given to the gram teacher")
    checkpoint: str | None = None  # teacher to hold to; null: the teacher at `start`


class ObjectiveConfig(Config):
    """What is minimised, and how the teacher is made."""

    dino: DinoConfig = DinoConfig()
    ibot: IbotConfig = IbotConfig()
    koleo: KoleoConfig = KoleoConfig()
    gram: GramConfig = GramConfig()
    centering: Literal["sinkhorn", "ema"] = "sinkhorn"
    sinkhorn_iterations: int = Field(default=3, ge=1)
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    temperature: TemperatureConfig = TemperatureConfig()
    ema_momentum: Range = Field(default=(0.994, 1.0), description="cosine from first to second")
    ema_batch: int | None = Field(
        default=None, ge=1, description="momentum is meant for this batch: it becomes m ** (batch / ema_batch)"
    )
    prototype_chunk: int = Field(
        default=4096, ge=1, json_schema_extra=EXECUTION, description="rows of logits held at once"
    )


# Views and masks


class ViewConfig(Config):
    """Crops and photometric changes (dinov2 data/augmentations.py)."""

    global_px: int = Field(default=224, ge=8)
    local_px: int = Field(default=98, ge=8)
    num_locals: int = Field(default=8, ge=0)
    global_scale: Range = (0.32, 1.0)
    local_scale: Range = (0.05, 0.32)
    aspect: Range = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    # brightness, contrast, saturation, hue
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = Field(default=0.8, ge=0, le=1)
    grey: float = Field(default=0.2, ge=0, le=1)
    # released: dinov2 hands 1 - p to RandomApply, so global 1, global 2, locals are blurred with 0, 0.9, 0.5;
    # paper: 1, 0.1, 0.5
    blur: Literal["released", "paper"] = "released"
    blur_sigma: Range = (0.1, 2.0)
    solarize: float = Field(default=0.2, ge=0, le=1, description="of global 2, threshold 128")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    on_device: bool = False  # photometric half batched on the device instead of in the workers

    @property
    def blur_probabilities(self) -> tuple[float, float, float]:
        """Of global 1, global 2 and locals, as they take effect."""
        return (0.0, 0.9, 0.5) if self.blur == "released" else (1.0, 0.1, 0.5)


class MaskConfig(Config):
    """Block masks over the global crops (dinov2 data/masking.py, data/collate.py)."""

    probability: float = Field(default=0.5, ge=0, le=1, description="share of global crops that are masked")
    ratio: Range = (0.1, 0.5)
    completion: Literal["none", "exact"] = "none"  # none: dinov2 stops a little short; exact: topped up at random
    min_block_patches: int = Field(default=4, ge=1)
    # released: half of the grid with dinov2's integer divisions (37 x 37 -> 666); paper: half of its patches
    max_block: Literal["released", "paper"] = "released"
    aspect_min: float = Field(default=0.3, gt=0, le=1)


# Data


class PartConfig(Config):
    """One source of pictures."""

    kind: Literal["run", "tars", "folder", "parquet"] = Field(
        description="run: output of `lvd curate`, verified against its manifest; tars: anybody's; "
        "folder: pictures at any depth; parquet: a column of bytes"
    )
    location: str = Field(description="path or s3:// url; tars and parquet also a glob", json_schema_extra=EXECUTION)
    column: str = Field(default="image", description="of parquet: bytes, or a struct with a field `bytes`")
    weight: float | None = Field(default=None, gt=0, description="share of samples; null: by number of pictures")
    split_by_part: bool = Field(default=False, description="of a run: each of its parts is a part of its own")
    part_weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="of a run that is split: weights of its parts; null: those of its own recipe, "
        "queries.NAME.weight; {}: none, so that they share by number of pictures",
    )
    where: str | None = Field(default=None, description="of parquet with a column `split`: take this value only")


def _without_null(values: Any) -> Any:
    """A mapping without its null entries: how a recipe removes what its base has."""
    return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class DataConfig(Config):
    """The stream of samples. Its position is a number: nothing else needs to be saved."""

    parts: Annotated[dict[str, PartConfig], BeforeValidator(_without_null)] = Field(
        min_length=1, description="by name; null removes one of the base"
    )
    batch_size: int = Field(default=2048, ge=1, description="pictures a step, over all ranks and micro-batches")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=EXECUTION,
        description="pictures of one rank at once; null: its whole share",
    )
    homogeneous: bool = Field(default=False, description="every batch holds pictures of one part only")
    shuffle_shards: int = Field(default=64, ge=1, description="shards whose pictures are mixed with each other")
    max_bad_in_row: int = Field(default=100, ge=1, description="unreadable pictures in a row that end the run")
    num_workers: int = Field(default=2, ge=0, json_schema_extra=EXECUTION)
    prefetch: int = Field(default=2, ge=1, json_schema_extra=EXECUTION, description="micro-batches a worker")
    cache: bool = Field(
        default=False, json_schema_extra=EXECUTION, description="keep decoded pictures in memory: for sets that fit"
    )


# Optimiser and schedule


class OptimConfig(Config):
    """AdamW and what multiplies its rates (dinov2 utils/param_groups.py)."""

    lr: float = Field(default=2e-4, ge=0, description="base; scaled to the batch by lr_scaling")
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"  # by batch / 1024; linear: batch / 256
    min_lr: float = Field(default=1e-6, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: Range = Field(default=(0.04, 0.2), description="cosine from first to second")
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    patch_embed_lr: float = Field(default=0.2, ge=0, description="multiplier")
    clip: float | None = Field(default=3.0, gt=0, description="largest gradient norm; null: not clipped")
    clip_by: Literal["module", "global"] = "module"  # module: backbone and each head apart, as dinov2
    decay_tokens: bool = True  # released: tokens, position grid and weight-norm parameters are decayed


class ScheduleConfig(Config):
    """How long, and where the warm-ups end."""

    unit: Literal["steps", "samples"] = "steps"
    length: int = Field(default=625_000, ge=1)
    warmup: int = Field(default=100_000, ge=0, description="of the learning rate, linear from 0")
    freeze_last_layer: int = Field(default=1250, ge=0, description="rate of the prototypes is 0 until then")


# Machine


class ParallelConfig(Config):
    """How the step is laid over devices. Same results, other costs."""

    mode: Literal["none", "ddp", "fsdp", "hsdp"] = "none"  # more than one process and none: ddp
    shard_size: int | None = Field(default=None, ge=1, description="of hsdp: ranks that share one copy")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the backbone; heads and losses are always fp32
    compile: bool = False  # each block
    activation_checkpointing: bool = False  # each block
    attention: Literal["auto", "sdpa", "plain", "varlen"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="of torch on CPU; null: torch's own choice")


class CheckpointConfig(Config):
    """What is kept for resume, and what for use."""

    every: int = Field(default=1000, ge=1, description="steps")
    keep: int = Field(default=3, ge=1, description="latest ones")
    keep_every: int | None = Field(default=None, ge=1, description="steps of those that are kept for good")
    background: bool = True  # written while training goes on
    tensorboard: bool = False  # scalars beside the log too
    stop_after: int | None = Field(
        default=None,
        ge=1,
        description="steps after which the command ends, for a later one to go on: a queue's time slot",
    )


class EvalSet(Config):
    """Labelled pictures for kNN and linear probe."""

    train: PartConfig
    test: PartConfig | None = Field(default=None, description="null: a seeded fifth of train is held out")
    label: str = Field(
        default="label", description="column of parquet or manifest, field of the json; a folder's: `folder`"
    )
    max_train: int | None = Field(default=None, ge=1)
    max_test: int | None = Field(default=None, ge=1)


class EvalConfig(Config):
    """Measured on the teacher while it trains."""

    sets: Annotated[dict[str, EvalSet], BeforeValidator(_without_null)] = {}
    every: int = Field(default=1000, ge=1, description="steps")
    readout: Literal["cls", "mean", "cls_mean"] = "cls"
    k: tuple[int, ...] = (20,)
    temperature: float = Field(default=0.07, gt=0)
    linear: bool = False
    image_px: int | None = Field(default=None, ge=8, description="side of the square; null: that of the global crops")
    resize_px: int | None = Field(
        default=None, ge=8, description="shortest side before the centre is cut; null: 8/7 of it"
    )
    batch_size: int = Field(default=64, ge=1, json_schema_extra=EXECUTION)
    num_workers: int = Field(default=0, ge=0, json_schema_extra=EXECUTION, description="processes that decode")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", json_schema_extra=EXECUTION)  # bf16 on a GPU


# Stages


class InitConfig(Config):
    """Where the weights of a stage come from."""

    source: str = Field(
        default="previous",
        description="previous: teacher of the stage before, random for the first; random; or the "
        "path of a safetensors or .pth file, ours or released",
    )
    heads: bool = True  # taken too where the file has them
    freeze_backbone: int = Field(default=0, ge=0, description="steps or samples in which only the heads learn")


class DistillConfig(Config):
    """The frozen teacher of a distill stage."""

    teacher: str = Field(default="previous", description="previous, or the path of a file")
    model: ModelConfig | None = Field(default=None, description="of a file that does not say it: a released one")
    # heads: the teacher's own, with as many prototypes as the student's; feature: cosine to the teacher's tokens
    # through a linear map, for a teacher without heads. (A stage with init.freeze_backbone trains heads for it.)
    mode: Literal["heads", "feature"] = "heads"
    output_momentum: float = Field(default=0.999, ge=0, le=1, description="of the spare EMA that is the result")


class StageConfig(Config):
    """One stage: its kind, where it starts, and the values that it changes."""

    kind: Literal["pretrain", "gram", "highres", "distill"] = "pretrain"
    init: InitConfig = InitConfig()
    distill: DistillConfig = DistillConfig()
    # Outside the fingerprint: what it sets stands in the resolved sections, each value by its own rule.
    changes: dict[str, Any] = Field(
        default={}, json_schema_extra=EXECUTION, description="values laid over those of the recipe, section by section"
    )


SECTIONS = ("model", "views", "masks", "objective", "data", "optim", "schedule", "parallel", "checkpoint", "evaluation")

# Switches where the code that Meta released and its paper differ. Laid beneath a recipe's own values.
PRESETS: dict[str, dict[str, Any]] = {
    "dinov2-released": {
        "views": {"blur": "released"},
        "masks": {"completion": "none", "max_block": "released"},
        "optim": {"clip_by": "module", "decay_tokens": True, "lr_scaling": "sqrt"},
        "objective": {"koleo": {"scope": "micro", "distributed": False}},
    },
    "dinov2-paper": {
        "views": {"blur": "paper"},
        "masks": {"completion": "none", "max_block": "paper"},
        "optim": {"clip_by": "module", "decay_tokens": True, "lr_scaling": "sqrt"},
        "objective": {"koleo": {"scope": "micro", "distributed": False}},
    },
    # batches far below 2,048: neighbours and assignments over the whole step, momentum and warm-up by samples
    "small-batch": {
        "objective": {"koleo": {"scope": "step", "distributed": True}, "ema_batch": 2048},
        "schedule": {"unit": "samples"},
    },
}


class TrainRecipe(Config):
    """A training run: sections that hold for all stages, and the stages."""

    name: str
    run: str = Field(json_schema_extra=EXECUTION, description="folder of checkpoints, log and teacher")
    preset: Literal["dinov2-released", "dinov2-paper", "small-batch"] | None = None
    seed: int = 0
    model: ModelConfig = ModelConfig()
    views: ViewConfig = ViewConfig()
    masks: MaskConfig = MaskConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = Field(default=ParallelConfig(), json_schema_extra=EXECUTION)
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), json_schema_extra=EXECUTION)
    evaluation: EvalConfig = EvalConfig()
    stages: dict[str, StageConfig] = {"pretrain": StageConfig()}

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return lay_over(PRESETS[values["preset"]], values)
        return values

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        if not stages:
            raise ValueError("a recipe has at least one stage")
        for name, stage in stages.items():
            unknown = sorted(set(stage.changes) - set(SECTIONS))
            if unknown:
                raise ValueError(f"stage {name!r} changes {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
        return stages

    @model_validator(mode="after")
    def _check_resolved(self) -> TrainRecipe:
        for name in self.stages:
            self.resolved(name)
        return self

    def resolved(self, stage: str) -> Resolved:
        """The sections as they hold in one stage.

        Raises:
            ValueError: what the stage changes is not allowed, or sizes do not fit each other.
        """
        values = {name: getattr(self, name).model_dump() for name in SECTIONS}
        try:
            merged = lay_over(values, self.stages[stage].changes)
            return Resolved(name=stage, seed=self.seed, stage=self.stages[stage], **merged)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            message = str(first["msg"]).removeprefix("Value error, ")
            raise ValueError(f"stage {stage!r}{', ' + where if where else ''}: {message}") from None


class Resolved(Config):
    """All sections of one stage, checked against each other."""

    name: str
    seed: int
    stage: StageConfig
    model: ModelConfig
    views: ViewConfig
    masks: MaskConfig
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = Field(json_schema_extra=EXECUTION)
    checkpoint: CheckpointConfig = Field(json_schema_extra=EXECUTION)
    evaluation: EvalConfig

    @model_validator(mode="after")
    def _check(self) -> Resolved:
        sides = {
            "views.global_px": self.views.global_px,
            "views.local_px": self.views.local_px,
            "objective.gram.global_px": self.objective.gram.global_px,
            "evaluation.image_px": self.evaluation.image_px,
        }
        for key, side in sides.items():
            if side is not None and side % self.model.patch_px:
                raise ValueError(f"{key} {side} must be a multiple of model.patch_px {self.model.patch_px}")
        gram, kind = self.objective.gram, self.stage.kind
        if kind == "gram" and not gram.weight:
            raise ValueError("objective.gram.weight is 0, so a stage of kind gram would hold to nothing")
        if kind == "distill" and gram.weight and gram.checkpoint is None:
            raise ValueError("objective.gram.checkpoint is needed in a distill stage: its teacher is another network")
        if kind == "distill" and self.model.drop_path:
            raise ValueError(f"model.drop_path {self.model.drop_path} must be 0 in a distill stage (paper, section 5)")
        if self.schedule.warmup > self.schedule.length:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} must be at most schedule.length {self.schedule.length}"
            )
        objective = self.objective
        if self.stage.kind != "distill" and not (objective.dino.weight or objective.ibot.weight):
            raise ValueError("objective.dino.weight and objective.ibot.weight are both 0: nothing would be learned")
        return self

    def steps(self, amount: int) -> int:
        """A length of the schedule in steps, whatever its unit; rounded up."""
        if self.schedule.unit == "steps":
            return amount
        return -(-amount // self.data.batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        return self.steps(self.schedule.length)

    @property
    def ema_exponent(self) -> float:
        """What the teacher's momentum is raised to: the batch over the one that it is meant for."""
        return self.data.batch_size / self.objective.ema_batch if self.objective.ema_batch else 1.0


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: mappings are joined key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = lay_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
