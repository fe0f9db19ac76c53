# SPDX-License-Identifier: Apache-2.0
"""XLA's flags in the tests, beside those that the user has set in XLA_FLAGS."""

from importlib import metadata

FLAGS = (
    # Half the time to compile; what trains for thousands of updates asks for more, see probes.py.
    "--xla_backend_optimization_level=0",
    # The tests jit `create_state`: XLA's concurrent scheduler would run its QR decompositions at
    # the same time, and on two cores they can wait for each other for ever (jax 0.10.2).
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)


def beside(users):
    """Value of XLA_FLAGS: the user's flags come last, so they win over the tests' own."""
    words = users.split()
    return " ".join([*(flag for flag in FLAGS if flag not in words), *words])


# For a program that runs a few times and is compared with tolerances: half the time to compile.
QUICK = {"xla_backend_optimization_level": 0}
if metadata.version("jaxlib").startswith("0.10."):
    # The older way to compile fused operations halves it again. With it a seed's numbers depend on
    # the other seeds in their last bits, and a version must be known to have the option.
    QUICK["xla_cpu_use_fusion_emitters"] = False
