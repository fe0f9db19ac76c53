# SPDX-License-Identifier: Apache-2.0
"""wandb as a mirror of metrics.csv. The import of wandb waits until a run wants it."""

import contextlib
import csv
import logging
import os
import re
import secrets
import sys
import threading

from common import config, datasets, disks, one_line

# What is sent is the config, the record and the numbers, and wandb's, Python's and the platform's
# name and version: no code, host, packages or statistics.
SETTINGS = {"silent": True, "console": "off", "init_timeout": 20, "save_code": False, "host": "-"}
SETTINGS |= {"disable_git": True, "disable_job_creation": True, "x_save_requirements": False}
SETTINGS |= {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}


class Mirror:
    """Mirror of metrics.csv, one wandb run per seed; the first failure turns all offline."""

    def __init__(self, run, record):
        self.runs, self.record, self.mode = {}, record, None
        modes = {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}
        for mode in modes[run.options.wandb]:
            try:
                self._start(run, mode)
                break
            except Exception as error:  # no key, no network, no wandb: never a lost run
                self._lost(error, "logging offline" if mode == "online" else "logging without it")

    def _start(self, run, mode):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of wandb's own failures, to wandb
        import wandb

        self.close()
        logging.raiseExceptions = False  # of wandb's log, on a disk that takes no more
        self.mode = mode
        group = f"{run.algorithm}/{datasets.slug(run.cfg.dataset)}/{run.folder.name}"
        values = config.resolved(run.cfg, run.options) | {"algorithm": run.algorithm}
        values |= {"record": self.record, "code": run.code}
        token = run.folder / "wandb.id"  # one deleted and run again is another one
        if not token.exists():
            disks.write(token, secrets.token_hex(4) + "\n")
        for seed in run.cfg.seeds:
            name = f"{group}/{seed}"
            self.runs[seed] = wandb.init(
                mode=mode,
                project="atoll",
                group=group,
                name=name,
                id=re.sub(r"\W+", "-", name)[-110:] + "-" + token.read_text().strip(),
                resume="allow",
                config=values | {"seed": seed},
                dir=str(run.folder),
                reinit="create_new",
                settings=wandb.Settings(**SETTINGS),
            )

    def replay(self, file):
        """The rows so far, where this start of the run has an offline folder of its own."""
        if not self.runs or self.mode != "offline" or not file.exists():
            return
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                update, seed = int(row.pop("update")), int(row.pop("seed"))
                self.log(seed, update, {key: float(x) for key, x in row.items() if x})

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

        def finish_all():
            for run in runs.values():
                with contextlib.suppress(Exception):  # wandb's own process may be gone already
                    run.finish()
            if runs:
                with contextlib.suppress(Exception):
                    sys.modules["wandb"].teardown()  # else at exit, with a traceback

        finish = threading.Thread(target=finish_all, daemon=True)
        finish.start()
        finish.join(25)
        if finish.is_alive():
            print("WARNING: wandb does not finish; upload later with wandb sync", file=sys.stderr)
