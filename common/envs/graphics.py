# SPDX-License-Identifier: Apache-2.0
"""MuJoCo's graphics library, which the variable MUJOCO_GL chooses: egl, osmesa or glfw.

Only pictures need one. Training and evaluating need none, but MuJoCo cannot be imported with a
MUJOCO_GL whose library is missing.
"""

import ctypes.util
import functools
import importlib
import os
import sys

from common import fail, one_line, threads

PACKAGES = {"egl": "libegl1", "osmesa": "libosmesa6", "glfw": "libglfw3 and a display"}  # of Debian


def check():
    """Exit with one line, code 2, where MUJOCO_GL keeps MuJoCo from being imported."""
    if not os.environ.get("MUJOCO_GL"):
        return
    try:
        importlib.import_module("mujoco")
    except ModuleNotFoundError as error:
        if error.name != "mujoco":
            _fail(error)
    except Exception as error:  # of PyOpenGL, of ctypes, of MuJoCo itself
        _fail(error)


def choose():
    """Draw without a display where none is there and nothing was chosen."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not display and not os.environ.get("MUJOCO_GL") and ctypes.util.find_library("EGL"):
        os.environ["MUJOCO_GL"] = "egl"


def check_rendering(env):
    """Exit with one line, code 2, where the pictures of a MuJoCo environment cannot be drawn."""
    if is_mujoco(env):
        _check_context()


def is_mujoco(env):
    """Whether MuJoCo draws an environment, by where it comes from and what it is built on."""
    bases = [f"{base.__module__}.{base.__name__}" for base in type(env.unwrapped).__mro__]
    packages = ("gymnasium_robotics.", "ogbench.", "common.envs.")
    return any(name.startswith(packages) or "mujoco" in name.lower() for name in bases)


@functools.cache
def _check_context():
    """Draw nothing, once: a library that is there may still find no device."""
    name = (os.environ.get("MUJOCO_GL") or "glfw").lower()
    try:
        with threads.no_warnings():  # of GLFW, without a display
            import mujoco

            library = importlib.import_module(f"mujoco.{name}")
            context = library.GLContext(16, 16)
            context.make_current()
            model = mujoco.MjModel.from_xml_string("<mujoco/>")
            mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150).free()
            context.free()
        # MuJoCo's own renderer has the library that was chosen when MuJoCo was imported.
        if renderer := sys.modules.get("mujoco.rendering.classic.gl_context"):
            renderer.GLContext = library.GLContext
    except Exception as error:  # of PyOpenGL, of ctypes, of MuJoCo itself
        _fail(error)


def _fail(error):
    name = os.environ.get("MUJOCO_GL", "").lower()
    setting = f"MUJOCO_GL={name}" if name else "MUJOCO_GL is not set"
    if name and name not in PACKAGES:
        fail(f"{setting}: must be egl, osmesa or glfw, or not set")
    others = [other for other in PACKAGES if other not in (name, "glfw")]
    fail(
        f"{setting}: MuJoCo cannot draw with it here ({one_line(error)}); install "
        f"{PACKAGES[name or 'glfw']} or set MUJOCO_GL={' or '.join(others)}; without pictures no "
        "MUJOCO_GL is needed"
    )
