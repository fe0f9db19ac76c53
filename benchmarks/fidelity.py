# SPDX-License-Identifier: Apache-2.0
"""How far the files of algorithms/ are from their references, and what that comparison notices.

Run        python benchmarks/fidelity.py --output benchmarks/results/fidelity.md
Difference The largest one of tests/algorithms/test_parity.py: every loss, gradient, parameter,
           target and action, relative to the largest number of its array.
Mutants    With --mutate [ALGORITHM ...], copies of a file with one small error each: a sign, a mean
           for a sum, a target network for the online one, a clip, a square, a stop_gradient or
           an update left out, another constant. Errors are put between the headers "Losses" and
           "Training", at every place where they can be. A mutant is caught if it fails the test.
           The result is stored beside the page (.json), a later call without --mutate prints it.
"""

import ast
import copy
import datetime
import hashlib
import importlib
import json
import re
import sys
import types
from pathlib import Path

import jax
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "algorithms")]

command_line = importlib.import_module("common.command_line")
parity = importlib.import_module("parity")
test_parity = importlib.import_module("test_parity")

# What a fixture has no part in: it brings the batches, and every update is compared by itself.
NOT_COMPARED = ("sample_batch", "train_chunk", "mean_metrics", "policy_params")
SWAPPED = {"mean": "sum", "sum": "mean", "min": "max", "max": "min"}
SWAPPED |= {"minimum": "maximum", "maximum": "minimum", "argmax": "argmin"}
SWAPPED |= {"target_params": "params", "termination": "truncation"}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {ast.Gt: ast.Lt, ast.Lt: ast.Gt}

N_STEP = ("cfg.n_step", "no case has n_step above 1: test_n_step.py compares those targets")

DDPG_BC = "extraction=ddpg_bc is seohongpark/fql's, which updates otherwise: no case"

# Of the files that fit dynamics.
DYNAMICS = [
    ("model_updates", "of the fit of the dynamics, which test_mopo.py compares"),
    ("step + 1", "of the fit of the dynamics, which test_mopo.py compares"),
    ("member_loss", "of the fit of the dynamics, which test_mopo.py compares"),
    ("square(kernel)", "of the fit of the dynamics, which test_mopo.py compares"),
    ("fit.waiting", "of the fit of the dynamics, which test_mopo.py compares"),
    ("ring.filled", "of the rows from the model, which test_mopo.py counts"),
    ("known[0].sum", "the unit of a holdout error, which orders the members all the same"),
    ("1.0 -> 1.5", "guards against a division by no rows: not reached"),
]

# Files that are compared with a reimplementation, by people who are not the method's authors.
REIMPLEMENTED = {"awac", "bc", "cal_ql", "combo", "cql", "cql_discrete", "edac", "mopo", "morel"}
REIMPLEMENTED |= {"qdt", "sac", "sac_n", "spot"}

# Why a mutant is not caught: {file: [(part of its text, reason)]}, "" for all files.
REASONS = {
    "": [("-1 -> 1", "an axis, counted from the end: no error here")],
    "atac": [("restart(", "no case goes over the end of the warm start")],
    "awac": [("softmax", "weight=softmax is rlkit's, which was not run")],
    "bc": [("argmax", "integer actions are an addition, without authors' code")],
    "brac": [("jnp.square(difference)", "of the Gaussian kernel, which no case has")],
    "cal_ql": [("jnp.maximum -> jnp.minimum", "clip_diff_min, whose bound no case has")],
    "combo": DYNAMICS,
    "cql_discrete": [("stop_gradient", "the target has no gradient: no error")],
    "diffusion_dice": [("jnp.minimum(y", "guards against an overflow: not reached")],
    "dt": [("timestep) - 1", "a gather beyond the end reads the last row anyway: no error")],
    "fql": [N_STEP],
    "iql": [N_STEP, *((part, DDPG_BC) for part in ("- mean", "observation, mean", "(q)", "gain"))],
    "ivr": [
        ("1.0", "a bound that no batch reaches"),
        ("weight > 0", "in a number that is only logged"),
        ("jnp.mean", "in a number that is only logged"),
    ],
    "mobile": DYNAMICS,
    "mopo": DYNAMICS,
    "morel": [*DYNAMICS, ("halt", "of the halt state, which test_morel.py compares")],
    "odice": [("1e-10", "guards against a division by zero: not reached")],
    "online_dt": [("jnp.tanh(x)", "the drawn action is exploration's, which is not compared")],
    "optidice": [("1e-10", "guards log w of chi2: not reached"), ("y + 1.0", "the same guard")],
    "qc": [("jnp.abs(q)", "normalize_q is an addition, without authors' code")],
    "rebrac": [N_STEP],
}


# --- Mutants ------------------------------------------------------------------------------------
def function_lines(source):
    """(first, last) line of what is between the headers of losses and of training."""
    lines = source.splitlines()
    first, last = (
        next(i for i, line in enumerate(lines, 1) if line.startswith(f"# --- {name} -"))
        for name in ("Losses", "Training")
    )
    return first, last


def compared_functions(tree, source):
    first, last = function_lines(source)
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and first < node.lineno < last
        and node.name not in NOT_COMPARED
    ]


def digest(source):
    """Short name for the code that errors are put into, without comments, docstrings, layout."""
    functions = compared_functions(ast.parse(source), source)
    for function in functions:
        if ast.get_docstring(function) is not None:
            function.body = function.body[1:]
    return hashlib.sha256("".join(map(ast.dump, functions)).encode()).hexdigest()[:12]


def is_call_of(node, *names):
    """Whether a node calls one of the functions with these dotted names."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def is_check(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("chex.")


def changeable(node):
    """The nodes below, without keys, checks, shapes and the numbers that are only logged."""
    for child in ast.iter_child_nodes(node):
        if is_check(child) or is_call_of(child, "jax.random.split", "jax.random.fold_in"):
            continue
        if isinstance(child, ast.Dict | ast.arguments):
            continue
        if isinstance(child, ast.keyword) and child.arg == "axis":
            continue
        if isinstance(child, ast.Attribute) and child.attr in ("shape", "ndim"):
            continue
        yield child
        yield from changeable(child)


def changes(node):
    """[(kind, change)] of a node; change(node) is the node to put in its place."""
    found = []
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        operator = OPERATORS[type(node.op)]
        kind = "sign" if operator in (ast.Add, ast.Sub) else "factor"
        found.append((kind, lambda n: ast.BinOp(n.left, operator(), n.right)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not is_axis(node):
        found.append(("sign", lambda n: n.operand))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        turned = COMPARISONS[type(node.ops[0])]
        found.append(("sign", lambda n: ast.Compare(n.left, [turned()], n.comparators)))
    if isinstance(node, ast.Attribute) and node.attr in SWAPPED:
        kind = {"target_params": "target network", "termination": "mask"}.get(node.attr, "mean")
        found.append((kind, lambda n: ast.Attribute(n.value, SWAPPED[n.attr], n.ctx)))
    if isinstance(node, ast.Constant) and type(node.value) is float and node.value:
        found.append(("constant", lambda n: ast.Constant(1.5 * n.value)))
    if is_call_of(node, "jnp.clip", "jnp.abs", "jnp.tanh", "jnp.minimum", "jnp.maximum"):
        found.append(("clip", lambda n: n.args[0]))
    if is_call_of(node, "jnp.square"):
        found.append(("square", lambda n: n.args[0]))
    if is_call_of(node, "jax.lax.stop_gradient"):
        found.append(("gradient", lambda n: n.args[0]))
    method = node.func if isinstance(node, ast.Call) else None
    if isinstance(method, ast.Attribute) and method.attr == "clip" and len(node.args) == 2:
        found.append(("clip", lambda n: n.func.value))
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "state":
        found.append(("update", lambda n: ast.Pass()))  # of a network or of its targets
    return found


def is_axis(node):
    """Whether a minus belongs to an integer, which counts axes or rows from the end."""
    return isinstance(node.operand, ast.Constant) and type(node.operand.value) is int


def mutants(source):
    """[(kind, line, what was, what is, syntax tree of the mutant)]"""
    tree, made = ast.parse(source), []
    count = len(list(places(tree, source)))
    for place in range(count):
        for choice in range(len(changes(list(places(tree, source))[place][2]))):
            spoilt = copy.deepcopy(tree)
            parent, slot, node = list(places(spoilt, source))[place]
            kind, change = changes(node)[choice]
            new = ast.copy_location(change(node), node)
            before, after = ast.unparse(node), ast.unparse(new)
            if isinstance(slot, tuple):
                getattr(parent, slot[0])[slot[1]] = new
            else:
                setattr(parent, slot, new)
            ast.fix_missing_locations(spoilt)
            made.append((kind, node.lineno, before, after, spoilt))
    return made


def spread(made, most):
    """At most `most` of the mutants, of each kind as many as there are of the others."""
    queues = {}
    for mutant in made:
        queues.setdefault(mutant[0], []).append(mutant)
    chosen = []
    while len(chosen) < min(most, len(made)):
        for queue in queues.values():
            if queue and len(chosen) < most:
                chosen.append(queue.pop(len(queue) // 2))
    return chosen


def places(tree, source):
    """(parent, slot in it, node) of every node that an error can be put into."""
    for function in compared_functions(tree, source):
        allowed = {id(node) for node in changeable(function)}
        for parent in [function, *changeable(function)]:
            for name, value in ast.iter_fields(parent):
                children = value if isinstance(value, list) else [value]
                for i, child in enumerate(children):
                    if isinstance(child, ast.AST) and id(child) in allowed and changes(child):
                        yield parent, (name, i) if isinstance(value, list) else name, child


def load(tree, name):
    """The module that a syntax tree makes."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # where dataclasses look
    exec(compile(tree, name, "exec"), module.__dict__)
    return module


def is_caught(tree, cases):
    """Whether a mutant fails the test of one of its cases. None where it does not even run."""
    module = load(tree, "mutant")
    for case in cases:
        limit = max(test_parity.limits_of(case).values())
        try:
            with jax.disable_jit():  # most fail in their first update: nothing to compile for
                found = parity.compare(module, case, stop_above=limit)
        except Exception:  # whatever a wrong program raises
            return None
        if test_parity.exceeded(case, found):
            return True
    return False


def try_mutants(algorithm, most):
    """What fidelity.json keeps of a file.

    Returns:
        {"mutants": number that run, "of": all, "caught": number, "survived": [line of text],
        "date": of today, "code": the `digest` of the file}
    """
    source = (ROOT / "algorithms" / f"{algorithm}.py").read_text()
    cases = [case for case in test_parity.CASES if case.algorithm == algorithm]
    verdicts, survived = [], []
    made = mutants(source)
    for kind, line, before, after, tree in spread(made, most):
        verdict = is_caught(tree, cases)
        if verdict is not None:
            verdicts.append(verdict)
        if verdict is False:
            survived.append(f"{before} -> {after}")
        text = f"{before[:60]} -> {after[:60]}"
        print(algorithm, line, kind, text, verdict, file=sys.stderr, flush=True)
    return {
        "mutants": len(verdicts),
        "of": len(made),
        "caught": sum(verdicts),
        "survived": survived,
        "date": datetime.date.today().isoformat(),
        "code": digest(source),
    }


# --- Page ---------------------------------------------------------------------------------------
def header(algorithm):
    """{"Repository": ..., "Commit": ...} from the first lines of the text beside a fixture."""
    text = (parity.FOLDER / f"{algorithm}.md").read_text()
    pairs = [line.split(None, 1) for line in text.splitlines() if line.startswith(("Repo", "Comm"))]
    return dict(pairs)


def deviations(algorithm):
    """The paragraph "Deviations" of a file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"algorithms/{algorithm}.py").read_text()))
    text = docstring.split("\nDeviations", 1)[1].split("\n\n")[0]
    return " ".join(text.split())


def reason(algorithm, mutant):
    """Why a mutant was not caught, as far as it is known."""
    for part, why in REASONS[""] + REASONS.get(algorithm, []):
        if part in mutant:
            return why
    return "not known"


def row(algorithm, mutation):
    cases = [case for case in test_parity.CASES if case.algorithm == algorithm]
    module = importlib.import_module(f"algorithms.{algorithm}")
    far, steps, losses = 0.0, 0, set()
    for case in cases:
        found = parity.compare(module, case)
        far = max(far, *parity.summary(found).values())
        steps = max(steps, parity.updates_of(case) * case.gradient_steps)
        losses |= set(found["loss"])
    facts = header(algorithm)
    repository = facts["Repository"].removeprefix("https://github.com/")
    reference = (
        f"[{repository}@{facts['Commit'][:7]}]({facts['Repository']}/tree/{facts['Commit']})"
    )
    if not re.fullmatch("[0-9a-f]{40}", facts["Commit"]):
        reference = f"[{repository}]({facts['Repository']}), commit {facts['Commit'].split(':')[0]}"
    counts = "not tried"
    if mutation:
        counts = f"{mutation['caught']} of {mutation['mutants']}"
        if mutation.get("of", 0) > mutation["mutants"]:
            counts += f" ({mutation['of']} possible)"
        if mutation["code"] != digest((ROOT / f"algorithms/{algorithm}.py").read_text()):
            counts += f", of the file as it was on {mutation['date']}"
    return [
        f"[{algorithm}](../../algorithms/{algorithm}.py)",
        reference,
        "others" if algorithm in REIMPLEMENTED else "the authors",
        f"[{len(cases)}](../../tests/fixtures/parity/{algorithm}.md)",
        ", ".join(sorted(losses)),
        str(steps),
        f"{far:.0e}",
        counts,
    ]


INTRODUCTION = """# Every file against its authors' or a reference code

The same parameters, batches and random numbers go through a file of algorithms/ and through its
reference: the code of the method's authors, or else a reimplementation by others. The losses of
every update, the first gradients of every network, the parameters and targets after the first and
the last update, and the actions of the policy on ten observations are compared, in
[test_parity.py](../../tests/algorithms/test_parity.py). Left out are three first gradients of
IDQL's wide actor, its targets after the first update, and the first gradient of CQL's multiplier
where its weight is fixed. What the reference made is stored in
[tests/fixtures/parity](../../tests/fixtures/parity), with a text that says how, and what of it had
to be replaced: the networks in GFP's case. Code of google-research is that of a fork. Two hidden
layers of 16 units, in float64 on both sides unless the text says otherwise; "difference" is the
largest one of all those numbers, relative to the largest number of its array, and includes the
rounding of the stored numbers: 7e-12, 5e-10 in IDQL's wide layers. dt.py, qdt.py and
trajectory_transformer.py compute the learning rate of their warm-up in float32, which is all of
their difference.

Not compared here: the initialisation of networks, which rows a batch has, learning rates beyond
those few updates, evaluation, and the hyperparameters of configs/, whose headers name their
sources. Initialisation and batches have tests of their own in tests/algorithms. Options without a
case are named in the texts beside the fixtures.

A mutant is a copy of a file with one small error: a sign, a mean for a sum, the online network in
place of its target, a termination not heeded, a clip, a square, a stop_gradient or an update left
out, another factor or constant. It is caught if the comparison fails. Where a number of possible
mutants is given, a choice of all kinds was tried, else all. A mutant that does not run at all
counts as neither. Where a date is given, the losses or updates of the file have changed since.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity.md
"""

ALL_FILES = """All files: a row with both a terminal and a timeout is kept as a termination, and
AntMaze's episodes end where the ant jumps; [loading.md](../../tests/fixtures/parity/loading.md) has
more, from a test of loading. The others are those that the files' docstrings list:"""


def page(results):
    head = ["file", "reference", "by", "cases", "losses", "gradient steps", "difference", "caught"]
    algorithms = list(dict.fromkeys(case.algorithm for case in test_parity.CASES))
    table = [head, ["---"] * len(head)]
    table += [row(algorithm, results.get(algorithm)) for algorithm in algorithms]
    lines = [INTRODUCTION, *(f"| {' | '.join(cells)} |" for cells in table)]
    lines += ["", "## Deviations that remain", "", ALL_FILES, ""]
    lines += [f"- `{algorithm}`: {deviations(algorithm)}" for algorithm in algorithms]
    survivors = [name for name in algorithms if results.get(name, {}).get("survived")]
    if survivors:
        lines += ["", "## Mutants that were not caught", ""]
    for algorithm in survivors:
        for text in results[algorithm]["survived"]:
            lines.append(f"- `{algorithm}`: `{text}`: {reason(algorithm, text)}")
    return "\n".join(lines) + "\n"


def main(
    output: Path = ROOT / "benchmarks/results/fidelity.md",
    mutate: tuple[str, ...] = (),
    most: int = 1000,
):
    """Write the page.

    mutate: files whose mutants are tried first (a minute each or more), or "all"
    most: try no more mutants than these of a file
    """
    store = output.with_suffix(".json")
    results = json.loads(store.read_text()) if store.exists() else {}
    if mutate == ("all",):
        mutate = tuple(dict.fromkeys(case.algorithm for case in test_parity.CASES))
    for algorithm in mutate:
        results[algorithm] = try_mutants(algorithm, most)
        store.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    output.write_text(page(results))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    tyro.cli(main)
