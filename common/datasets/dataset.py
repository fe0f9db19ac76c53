# SPDX-License-Identifier: Apache-2.0
"""What `load` returns: a `Dataset` with its `Transitions`.

Rules that hold for every source:
- Values bootstrap through truncations and never through terminations. `termination` is therefore 1
  at a true end only.
- A row whose next observation is unknown is dropped. A terminal row without one is kept and has its
  own observation there: TD targets mask it, a dynamics model must not learn from it.
- `next_action` is the next action of the same episode. An episode's last row repeats its own.
- Actions reach the algorithm in [-1, 1], or as integers.
- Nothing here is part of a method: reward shifts, observation normalisation and filters are visible
  lines of the algorithm files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Transitions(NamedTuple):
    """N rows in time order, the rows of an episode together; float32 unless said otherwise."""

    observation: np.ndarray  # [N, O]
    action: np.ndarray  # [N, A] in [-1, 1], or int32 [N]
    reward: np.ndarray  # [N] as recorded
    next_observation: np.ndarray  # [N, O]
    next_action: np.ndarray  # like action
    termination: np.ndarray  # [N] 1 at a true end, else 0
    truncation: np.ndarray  # [N] 1 at the last row of an episode cut by time or by the recording


@dataclass(frozen=True)
class Dataset:
    """Transitions, episodes, and the environment to evaluate in (None where none is known)."""

    id: str
    transitions: Transitions
    episode_ends: np.ndarray  # [number of episodes] the row after each episode's last row
    episode_returns: np.ndarray  # [number of episodes] undiscounted, dropped rows included
    make_env: Callable[..., Any] | None = None  # (render_mode=None) -> gymnasium.Env
    horizon: int | None = None  # environment steps of the longest evaluation episode
    ref_min_score: float | None = None  # return that scores 0
    ref_max_score: float | None = None  # return that scores 100
    num_actions: int | None = None  # for integer actions
    score_is_success: bool = False  # OGBench: the score is the success rate
    record: dict[str, Any] | None = None  # further facts for the run's config.yaml

    def score(self, returns, success=None):
        """The normalised score: 0 at one reference score, 100 at the other.

        Without reference scores it is the plain return. OGBench has none either: its score is 100
        times the share of successful episodes.
        """
        if self.score_is_success and success is not None:
            return 100 * success
        if self.ref_min_score is None:
            return returns
        return 100 * (returns - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)
