# SPDX-License-Identifier: Apache-2.0
"""Packages and environments, without the notices they print and the files they leave behind."""

import contextlib
import os
import tempfile
import warnings

from common import fail, one_line, threads
from common.envs import graphics


def robotics():
    """The package gymnasium_robotics, without what it prints at import about Adroit's rewards."""
    graphics.check()
    with threads.captured_errors():
        import gymnasium_robotics
    return gymnasium_robotics


def make_quietly(env_id, make, *args, **options):
    """Call `make`, without notices about newer versions or a missing display.

    Raises:
        SystemExit: code 2 after one line that names `env_id`, where the env cannot be made.
    """
    # The first comes at every look at OGBench's spaces, the other at FrankaKitchen's first step.
    with threads.ALONE:
        for notice in ("precision lowered by casting", "share an object"):
            warnings.filterwarnings("ignore", message=f".*{notice}")
    if options.get("render_mode"):
        graphics.choose()
    try:
        with threads.no_warnings():
            env = make(*args, **options)
    except Exception as error:  # of Gymnasium, or of the module that --env names
        graphics.check()
        fail(f"env {env_id or 'of the data set'}: cannot be made ({one_line(error)}); see --env")
    _remove_model_file(env)
    if options.get("render_mode"):
        graphics.check_rendering(env)
    return env


def _remove_model_file(env):
    """Remove the model that gymnasium-robotics and OGBench write for each maze and leave behind."""
    world = env.unwrapped
    if type(world).__module__.startswith(("gymnasium_robotics", "ogbench")):
        for name in ("tmp_xml_file_path", "fullpath"):
            path = str(getattr(world, name, ""))
            if os.path.dirname(path) == tempfile.gettempdir():
                with contextlib.suppress(OSError):
                    os.remove(path)
