"""The README.md of a job's output: what the trainer wrote, completed with what is known."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.errors import HubRejected
from ckptd.hub import card
from ckptd.hub.card import Facts

PEFT_LIBRARY = "peft"
"""What loads an adapter."""
DIFFUSERS_LIBRARY = "diffusers"
"""What loads a pipeline's components, and the flat files of those who train diffusion models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What goes into the model card; `repo_id` where the output is pushed, `run` its name else."""

    facts: Facts
    library: str
    repo_id: str | None
    run: str

    def written(self, readme: bytes | None) -> bytes | None:
        """Return the card made of the trainer's; None where there is neither that nor a fact.

        Where nothing is pushed, a card that cannot be edited stays as it is.

        Raises:
            HubRejected: it cannot be edited, and would be pushed like this.
        """
        if not self.facts:
            return readme
        name = self.run if self.repo_id is None else self.repo_id.rpartition("/")[2]
        try:
            text = None if readme is None else readme.decode()
            made = card.merge(text, tags=(), library=self.library, facts=self.facts, name=name)
        except (HubRejected, UnicodeDecodeError):
            if self.repo_id is None or readme is None:
                return readme
            raise
        return card.filled(made, repo_id=self.repo_id, facts=self.facts).encode()
