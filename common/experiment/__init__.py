# SPDX-License-Identifier: Apache-2.0
"""One run: its config, its folder, its devices.

`parse` gives the Config and the Options of this start. `check` refuses values that no run can have:
it is the first step of `train`, for a Config that Python has made. `Run` is the run folder and
everything that is written into it, and `load` and `load_policy` read a run folder back. `streams`,
`place` and `over_seeds` put the random keys, the data and the training of all seeds on the devices.
"""

from common.experiment.config import check
from common.experiment.devices import over_seeds, place, streams
from common.experiment.run import Run
from common.experiment.start import parse
from common.experiment.stored import load, load_policy

__all__ = ["Run", "check", "load", "load_policy", "over_seeds", "parse", "place", "streams"]
