"""An annealing as a file, from which the same call goes on.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gradinv_helpers.errors import InputError
from gradinv_helpers.files import write_bytes


@dataclass(frozen=True)
class SavedStages:
    """The file behind an annealing; it is written whenever a level is done.

    Args:
        path: A ``.safetensors`` file, which need not exist.
        fingerprint: A hash of everything that the result depends on.
    """

    path: Path
    fingerprint: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts that were kept, or ``None`` where there is no file.

        Raises:
            InputError: The file is damaged, or belongs to another attack.
        """
        if not self.path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                facts = json.loads((file.metadata() or {})["annealing"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                "checkpoint",
                "a file that this attack has written",
                f"{self.path}: {str(error).splitlines()[0]}",
                "remove it to begin anew",
            ) from error
        if facts["fingerprint"] != self.fingerprint:
            raise InputError(
                "checkpoint",
                "the same update, prior, labels and settings as in the file",
                f"others than in {self.path}",
                "remove it to begin anew, or name another",
            )
        return tensors, facts

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write tensors and facts, in place of what was there."""
        from safetensors.torch import save

        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        text = json.dumps({"fingerprint": self.fingerprint, **facts})
        write_bytes(self.path, save(kept, {"annealing": text}))

    def remove(self) -> None:
        """Forget the file: the annealing is done."""
        self.path.unlink(missing_ok=True)


def fingerprint(facts: Sequence[object], tensors: Sequence[Tensor]) -> str:
    """A hash of plain values and tensors."""
    digest = hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode())
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
