# SPDX-License-Identifier: Apache-2.0
"""wandb as a mirror of metrics.csv. The import of wandb waits until a run wants it."""

import re
import sys
import threading

from common import config, datasets, one_line


class Mirror:
    """Mirror of metrics.csv, one wandb run per seed; the first failure turns all offline."""

    def __init__(self, run, record):
        self.runs, self.record = {}, record
        modes = {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}
        for mode in modes[run.options.wandb]:
            try:
                self._start(run, mode)
                break
            except Exception as error:  # no key, no network, no wandb: never a lost run
                self._lost(error, "logging offline" if mode == "online" else "logging without it")

    def _start(self, run, mode):
        import wandb

        self.close()
        settings = {"silent": True, "console": "off", "init_timeout": 20, "disable_git": True}
        settings |= {"save_code": False, "x_disable_stats": True, "x_disable_meta": True}
        group = f"{run.algorithm}/{datasets.slug(run.cfg.dataset)}/{run.folder.name}"
        values = config.resolved(run.cfg, run.options) | {"algorithm": run.algorithm}
        values |= {"record": self.record, "code": run.code}
        for seed in run.cfg.seeds:
            name = f"{group}/{seed}"
            self.runs[seed] = wandb.init(
                mode=mode,
                project="atoll",
                group=group,
                name=name,
                id=re.sub(r"\W+", "-", name)[-120:],
                resume="allow",
                config=values | {"seed": seed},
                dir=str(run.folder),
                reinit="create_new",
                settings=wandb.Settings(**settings),
            )

    def log(self, seed, step, values):
        try:
            if seed in self.runs:
                self.runs[seed].log(values, step=step)
        except Exception as error:
            self._lost(error, "logging without it")

    def _lost(self, error, instead):
        print(f"WARNING: wandb: {one_line(error)}; {instead}", file=sys.stderr)
        self.close()

    def close(self):
        """Finish the runs; an upload that hangs is left to `wandb sync` after 25 seconds."""
        runs, self.runs = self.runs, {}
        finish = threading.Thread(target=lambda: [x.finish() for x in runs.values()], daemon=True)
        finish.start()
        finish.join(25)
        if finish.is_alive():
            print("WARNING: wandb does not finish; upload later with wandb sync", file=sys.stderr)
