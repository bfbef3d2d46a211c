"""Choose the next token from what the client learns of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcache.errors import BadInput


@dataclass(frozen=True)
class Sampling:
    """How a token follows from its logits.

    Greedy at temperature 0, else drawn with a seed from the fewest tokens that hold `top_p` of the
    probability. Raises BadInput on a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise BadInput(f"--temperature is {self.temperature:g}; give 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"--top-p is {self.top_p:g}; give a number above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"--seed is {self.seed}; give a whole number from 0 to 2^63 - 1")

    def check(self, reveal: str) -> None:
        """Raise BadInput where the client would have to draw from logits that it does not learn."""
        if reveal == "token" and self.temperature > 0:
            raise BadInput(
                f"--temperature is {self.temperature:g}, but with reveal: token the client learns the "
                "likeliest token alone; leave the temperature at 0, or set reveal: logits"
            )

    def chooser(self, reveal: str = "logits") -> Chooser:
        """Make a function from what the client learns to a token id. Each one starts from the seed.

        reveal: what the client learns, "logits" (vocab,) or the "token" id itself.
        """
        return Chooser(self, reveal)


class Chooser:
    """Chooses tokens one after the other."""

    def __init__(self, sampling: Sampling, reveal: str) -> None:
        self.sampling, self.reveal = sampling, reveal
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def state(self) -> torch.Tensor:
        """Where the draws are (bytes): a chooser that is put there makes the same ones."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def __call__(self, logits: torch.Tensor) -> int:
        """Choose a token id from logits (vocab,), or return the id that was learned in their place."""
        if self.reveal == "token":
            return int(logits)
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scaled = torch.softmax(logits.double() / self.sampling.temperature, -1)
        probabilities, tokens = scaled.sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        allowed = probabilities * (before < self.sampling.top_p)
        return int(tokens[torch.multinomial(allowed, 1, generator=self._generator)])
