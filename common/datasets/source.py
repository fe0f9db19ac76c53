# SPDX-License-Identifier: Apache-2.0
"""What every reader returns: the rows as they were recorded, and what is known of the env."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    """Recorded rows, under the names of D4RL's files, with the facts that go with them."""

    rows: dict[str, np.ndarray]  # observations, actions, rewards, terminals, maybe timeouts, ...
    make_env: Callable[..., Any] | None  # (render_mode=None) -> the env as recorded
    reference: tuple = (None, None)  # returns that score 0 and 100
    keys: tuple[str, ...] = ()  # parts of a dict observation, in this order
    left_out: tuple[str, ...] = ()  # its other parts
    observation_space: Any = None  # of the recording, whose rows are its columns; None: not known
    action_space: Any = None  # of the recording
    bounds: tuple = (None, None)  # of the actions, where no env tells them; else -1 and 1
    horizon: int | None = None  # step limit of the recording
    termination_ends_episode: bool = True  # False: only `timeouts` end an episode
    score_is_success: bool = False  # whether the score is the success rate
    is_own: bool = False  # a user's own file, in which common mistakes are looked for
    adapted: dict = {}  # noqa: RUF012 - what `envs.d4rl.adapt` was given beside the env
    facts: dict = {}  # noqa: RUF012 - never changed; what the run's config.yaml should tell
