# SPDX-License-Identifier: Apache-2.0
"""XLA's flags in the tests, beside those that the user has set in XLA_FLAGS."""

import os
from importlib import metadata

FLAGS = (
    # Half the time to compile; what trains for thousands of updates asks for more, see probes.py.
    "--xla_backend_optimization_level=0",
    # The tests jit `create_state`: XLA's concurrent scheduler would run its QR decompositions at
    # the same time, and on two cores they can wait for each other for ever (jax 0.10.2).
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)

# For a program that is compared bit for bit over numbers of seeds: fused as a user's programs are.
AS_USERS = {}
if metadata.version("jaxlib").startswith("0.10."):  # a version must be known to have the option
    # The older way to compile fused operations takes half the time again. With it a seed's numbers
    # depend on the other seeds in their last bits.
    FLAGS = (
        *FLAGS,
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",  # a sixth less time for programs this small
    )
    AS_USERS = {"xla_cpu_use_fusion_emitters": True}


def beside(users):
    """Value of XLA_FLAGS: the user's flags come last, so they win over the tests' own."""
    words = users.split()
    return " ".join([*(flag for flag in FLAGS if flag not in words), *words])


def as_users(more):
    """The same for a command whose numbers are compared bit for bit, with the flags `more`."""
    options = [f"--{name}={str(value).lower()}" for name, value in AS_USERS.items()]
    return " ".join([os.environ["XLA_FLAGS"], *options, more])
