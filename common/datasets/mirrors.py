# SPDX-License-Identifier: Apache-2.0
"""Where else the files of D4RL and OGBench can be downloaded: servers that a user names.

A mirror is the address of a folder that has the files, in the folders of the original server or all
in one. It is asked first, and then the original server. Minari's own variable is MINARI_REMOTE.
"""

import os
from pathlib import PurePosixPath

D4RL = "ATOLL_D4RL_URL"
OGBENCH = "ATOLL_OGBENCH_URL"


def d4rl(servers: tuple[str, ...], file: str) -> list[str]:
    """The addresses of a file of D4RL, in the order in which they are tried."""
    return [*_mirrored(D4RL, file), *(server + file for server in servers)]


def ogbench(server: str, file: str) -> list[str]:
    """The same for a file of OGBench."""
    return [*_mirrored(OGBENCH, file), f"{server}/{file}"]


def use(url: str) -> None:
    """Take a mirror for the data sets of this process, whichever family they are of."""
    os.environ[D4RL] = os.environ[OGBENCH] = url


def chosen(flag: str | None) -> tuple[str | None, str]:
    """(the mirror that is asked, what says so): `flag` is that of the command line, None without.

    Where the variables name two, both are said.
    """
    named = {variable: os.environ.get(variable, "").strip() for variable in (D4RL, OGBENCH)}
    named = {variable: url for variable, url in named.items() if url}
    if flag is not None or not named:
        return flag, "default" if flag is None else "command line"
    return " ".join(dict.fromkeys(named.values())), " ".join(named)


def _mirrored(variable, file):
    url = os.environ.get(variable, "").strip().rstrip("/")
    if not url:
        return []
    names = dict.fromkeys((file, PurePosixPath(file).name))  # the same where there is no folder
    return [f"{url}/{name}" for name in names]
