"""What can be said of a model before it is loaded: for the plan that `lvd curate` prints, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One model of a recipe.

    Attributes:
        name: as the recipe names it.
        file: that its weights are read from; None where it has none.
        sha256: of the file, hex.
        license: of the weights as their library or file states it; None where it states none.
        takes: what it is shown, such as ``224 px``.
        dim: length of a vector; None where it gives no vectors, or says so only once loaded.
        precision: of its arithmetic.
        is_cached: the file is in the cache of Hugging Face, not one that the recipe names.
        needs_cpu: it runs on the CPU whatever ``execution.device`` says.
    """

    name: str
    file: Path | None = None
    sha256: str = ""
    license: str | None = None
    takes: str = ""
    dim: int | None = None
    precision: str = "fp32"
    is_cached: bool = False
    needs_cpu: bool = False

    def cells(self, device: str) -> tuple[str, ...]:
        """Name, input and output, arithmetic, licence, file: one line of a table."""
        shape = f"{self.takes} -> {self.dim:,}" if self.dim is not None else self.takes
        how = f"{self.precision} {'cpu' if self.needs_cpu else device}"
        if self.file is None:
            return self.name, shape, how, "-", "no weights"
        where = "in the Hugging Face cache: " if self.is_cached else ""
        size = size_text(self.file.stat().st_size)
        return (
            self.name,
            shape,
            how,
            self.license or "not stated",
            f"{where}{self.file} ({size}, sha256 {self.sha256[:8]})",
        )


def size_text(num_bytes: int) -> str:
    """1,234,567 as ``1.2 MB``."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"
