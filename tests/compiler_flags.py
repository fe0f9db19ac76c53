# SPDX-License-Identifier: Apache-2.0
"""XLA's flags in the tests, beside those that the user has set in XLA_FLAGS."""

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
