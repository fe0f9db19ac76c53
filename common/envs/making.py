# SPDX-License-Identifier: Apache-2.0
"""Make an environment by its Gymnasium id."""

from common import threads
from common.envs import pointmaze, quiet


def make(env_id, **options):
    """`gymnasium.make`, with the ids of gymnasium-robotics and of this project registered.

    Options that are None are left out. An env that cannot be made is one line and exit code 2.
    """
    import gymnasium

    with threads.ALONE:  # until the registry has all ids of a package
        if env_id not in gymnasium.registry and ":" not in env_id:
            gymnasium.register_envs(quiet.robotics())
            pointmaze.register()
    options = {name: value for name, value in options.items() if value is not None}
    return quiet.make_quietly(env_id, gymnasium.make, env_id, **options)
