# SPDX-License-Identifier: Apache-2.0
"""Packages and environments, without the notices they print and the files they leave behind."""

import contextlib
import io
import os
import re
import tempfile
import warnings

from common import fail, one_line


def robotics():
    """The package gymnasium_robotics, without what it prints at import about Adroit's rewards.

    Raises:
        SystemExit: code 2 after one line, where MuJoCo's renderer keeps it from being imported.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import gymnasium_robotics
    except Exception as error:  # of OpenGL's libraries: there are many
        if line := renderer_fails(error):
            fail(line)
        raise
    return gymnasium_robotics


def renderer_fails(error: BaseException) -> str | None:
    """One line where an error tells of the renderer that MUJOCO_GL chooses, None of others."""
    renderer = os.environ.get("MUJOCO_GL")
    if not renderer or not re.search(r"MUJOCO_GL|OpenGL|OSMesa|EGL|GLFW|\bgl[A-Z]", str(error)):
        return None
    return (
        f"MUJOCO_GL={renderer}: MuJoCo cannot render with it on this machine ({one_line(error)}); "
        "unset MUJOCO_GL, or install what it needs"
    )


def make_quietly(env_id, make, *args, **options):
    """Call `make`, without notices about newer versions or a missing display.

    Raises:
        SystemExit: code 2 after one line that names `env_id`, where the env cannot be made.
    """
    # The first comes at every look at OGBench's spaces, the other at FrankaKitchen's first step.
    for notice in ("precision lowered by casting", "share an object"):
        warnings.filterwarnings("ignore", message=f".*{notice}")
    try:
        with warnings.catch_warnings(action="ignore"):
            env = make(*args, **options)
    except Exception as error:  # of Gymnasium, or of the module that --env names
        what = f"env {env_id or 'of the data set'}: cannot be made ({one_line(error)}); see --env"
        fail(renderer_fails(error) or what)
    _remove_model_file(env)
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
