# SPDX-License-Identifier: Apache-2.0
"""Make an environment again from what a run has recorded of it, without the data set."""

import contextlib
import json

from common.envs import making


def remembered(spec) -> dict | None:
    """What makes the env of this spec again: its id, options and step limit.

    None where that is not enough: the env has wrappers of this project, or its id leads elsewhere.
    """
    import gymnasium

    if spec is None or spec.additional_wrappers:
        return None
    registered = gymnasium.registry.get(spec.id)
    if registered is None or str(registered.entry_point) != str(spec.entry_point):
        return None
    options = {name: x for name, x in spec.kwargs.items() if name != "render_mode"}
    try:
        plain = json.loads(json.dumps(options))
    except (TypeError, ValueError):
        return None
    if plain != options:
        return None
    return {"id": spec.id, "options": options, "max_episode_steps": spec.max_episode_steps}


def make_remembered(facts: dict, env: str | None = None, render_mode: str | None = None):
    """The env that `remembered` tells of. `env` is the id that --env gave, if it did."""
    if "singletask" in facts["id"]:  # importing OGBench registers its ids
        with contextlib.suppress(ImportError):
            import ogbench  # noqa: F401
    limit = {"max_episode_steps": facts["max_episode_steps"], "render_mode": render_mode}
    return making.make(env or facts["id"], **facts["options"], **limit)
