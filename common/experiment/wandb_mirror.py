# SPDX-License-Identifier: Apache-2.0
"""wandb as a mirror of metrics.csv. wandb is imported only where a run uses it."""

import contextlib
import csv
import logging
import os
import re
import secrets
import sys
import threading

from common import datasets, files, one_line, threads
from common.experiment import config, wandb_settings

# Sent are the config, the record, the numbers, and the versions of wandb, Python and the platform.
# Not sent are the code, the host's name, the list of packages and statistics of the machine.
SETTINGS = {"silent": True, "console": "off", "init_timeout": 20, "save_code": False, "host": "-"}
SETTINGS |= {"disable_git": True, "disable_job_creation": True, "x_save_requirements": False}
SETTINGS |= {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
PATIENCE = 25  # seconds; an upload that hangs is then left to `wandb sync`
# All wandb runs of a process share one service. Here are the mirrors that still need it, and the
# lock of those that join them or leave.
NEED_SERVICE, SERVICE = set(), threading.Lock()


class Mirror:
    """One wandb run per seed; the first failure turns all of them offline."""

    def __init__(self, run, record):
        self.runs, self.record, self.mode = {}, record, None
        modes = {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}
        for name in modes[wandb_settings.mode(run.options)[0]]:
            try:
                self._start(run, name)
                break
            except Exception as error:  # no key, no network, no wandb: training goes on
                self._lost(error, "logging offline" if name == "online" else "logging without it")

    def _start(self, run, mode):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's reports about itself
        with threads.ALONE:  # its import parses its own source
            import wandb

        self.close()
        free = SERVICE.acquire(timeout=PATIENCE)
        NEED_SERVICE.add(self)
        if free:
            SERVICE.release()
        logging.raiseExceptions = False  # wandb's log may be on a full disk
        self.mode = mode
        group = f"{run.algorithm}/{datasets.slug(run.cfg.dataset)}/{run.folder.name}"
        values = config.resolved(run.cfg, run.options) | {"algorithm": run.algorithm}
        values |= {"record": self.record, "code": run.origin.code}
        token = run.folder / "wandb.id"  # a run that is deleted and made again is another one
        if not token.exists():
            files.write(token, secrets.token_hex(4) + "\n")
        token = token.read_text(encoding="utf-8").strip()
        for seed in run.cfg.seeds:
            # What wandb's own variables say goes before what is chosen here.
            several = f"/{seed}" if len(run.cfg.seeds) > 1 else ""
            name = f"{group}/{seed}"
            id = re.sub(r"\W+", "-", name)[-110:] + "-" + token
            if given := os.environ.get("WANDB_RUN_ID"):
                id = given + several.replace("/", "-")
            if given := os.environ.get("WANDB_NAME"):
                name = given + several
            settings = {
                key: value
                for key, value in SETTINGS.items()
                if f"WANDB_{key.upper()}" not in os.environ
            }
            self.runs[seed] = wandb.init(
                mode=mode,
                project=wandb_settings.project(run.options)[0],
                entity=wandb_settings.entity(run.options)[0],
                group=os.environ.get("WANDB_RUN_GROUP") or group,
                name=name,
                id=id,
                resume=os.environ.get("WANDB_RESUME") or "allow",
                config=values | {"seed": seed},
                dir=os.environ.get("WANDB_DIR") or str(run.folder),
                reinit="create_new",
                settings=wandb.Settings(**settings),
            )

    def replay(self, file):
        """Log the rows so far again: offline, every start of a run has a folder of its own."""
        if not self.runs or self.mode != "offline" or not file.exists():
            return
        with file.open(newline="", encoding="utf-8") as rows:
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
        """Finish the runs, and wandb's service with the last run of this process."""
        runs, self.runs = self.runs, {}

        def finish_all():
            for run in runs.values():
                with contextlib.suppress(Exception):  # wandb's own process may have ended
                    run.finish()
            with SERVICE:
                NEED_SERVICE.discard(self)
                if runs and not NEED_SERVICE and _users_run() is None:
                    with contextlib.suppress(Exception):
                        sys.modules["wandb"].teardown()  # else at exit, with a traceback

        finish = threading.Thread(target=finish_all, daemon=True)
        finish.start()
        finish.join(PATIENCE)
        if finish.is_alive():
            print("WARNING: wandb does not finish; upload later with wandb sync", file=sys.stderr)


def _users_run():
    """A wandb run that the program itself has begun, beside those of a Mirror."""
    return getattr(sys.modules["wandb"], "run", None)
