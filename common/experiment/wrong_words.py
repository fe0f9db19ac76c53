# SPDX-License-Identifier: Apache-2.0
"""Parse a command line with tyro. What is wrong with it is one line that names a remedy.

tyro frames its messages, spreads them over several lines and often names no remedy.
"""

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import re
import typing

import tyro

from common import fail, threads
from common.experiment import kinds, ranges

HELP = "--help lists the flags"
# What most other code calls it -> flag.
ELSEWHERE = {"gamma": "discount", "tau": "target-rate", "polyak": "target-rate"}
NO_VALUE = ("resume", "show_config", "start_optimizer", "html", "dry_run", "slurm")  # flags alone


def parse(kind, argv, source, hints=None, more="", in_file=False, classes=(), **settings):
    """`tyro.cli(kind)`, whose error becomes one line that begins with the source and exit code 2.

    Args:
        kind: what tyro makes.
        argv: the words of the command line, or those that a file's values are.
        source: the program or the file that they come from.
        hints: field -> its type, where `kind` does not tell.
        more: said after a word that is unknown.
        in_file: whether the values stand in a YAML file.
        classes: dataclasses whose comments tell what their fields are called elsewhere.
        settings: others of `tyro.cli`.
    """
    if not {"-h", "--help"} & {*argv}:  # the comments are help texts: a third of the time
        settings["config"] = (*settings.get("config", ()), tyro.conf.HelptextFromCommentsOff)
    try:
        # One thread at a time as well, since tyro reads comments by way of `ast`.
        with threads.captured_errors() as printed:
            return tyro.cli(kind, args=argv, **settings)
    except SystemExit as leave:
        if leave.code == 0:  # --help
            raise
        text = re.sub(r"\x1b\[[\d;]*m|[╭╮╰╯│─]|-{4,}", " ", printed.getvalue())
        text = " ".join(text.split("For full helptext")[0].split())
        hints = typing.get_type_hints(kind) if hints is None else hints
        unknown = text.startswith("Unrecognized options")
        said = _explained(text, argv, hints, classes, in_file)
        fail(f"{source}: {said}{more if unknown else ''}")


def hints_of(*classes):
    """field -> type of several dataclasses."""
    found = {}
    for kind in classes:
        hints = typing.get_type_hints(kind)
        found |= {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return found


def _comments(classes):
    """flag -> the comment behind the field, where there is one."""
    found = {}
    for kind in classes:
        # One thread at a time: a class is looked for by `ast`. One made by Python has no file.
        with threads.ALONE, contextlib.suppress(OSError, TypeError):
            lines = re.findall(r"^ +(\w+): .*  # (.*)$", inspect.getsource(kind), re.MULTILINE)
            found |= {ranges.flag(name): comment for name, comment in lines}
    return found


def _explained(text, argv, hints, classes, in_file):
    """A message of tyro's, in one line already, with a remedy."""
    kinds_of = {ranges.flag(name): kind for name, kind in hints.items()}
    if text.startswith("Unrecognized options"):
        unknown = text.partition(":")[2].partition(" Perhaps you meant")[0].strip().split(", ")
        return _unknown(unknown, argv, kinds_of, _comments(classes))
    found = re.search(r"(?:Error parsing |argument ')(--[\w-]+)", text)
    if found is None or found[1] not in kinds_of:
        return f"{re.sub('^(Parsing error|Required options) ', '', text)}; {HELP}"
    flag = found[1]
    return _value(flag, _given(flag, argv), kinds_of[flag], in_file)


def _value(flag, given, kind, in_file):
    """A flag has no value, or one that is not of its type."""
    if typing.get_origin(kind) is tuple:
        return _parts(flag, given, typing.get_args(kind)[0], in_file)
    if not given:
        return f"{flag}: has no value behind it; it must be {kinds.words(kind)}"
    hint = ""
    if (
        int in (kind, *typing.get_args(kind))
        and _reads(given[0], float)
        and float(given[0]).is_integer()
    ):
        hint = f"; write `{flag} {int(float(given[0]))}`"
    return f"{flag} {given[0] or repr('')}: must be {kinds.words(kind)}{hint}"


def _parts(flag, given, part, in_file):
    """The parts of a tuple cannot be read, mostly since they have commas between them."""
    example = {int: ["0", "1"], float: ["0.5", "1.5"]}.get(part, ["a", "b"])
    parts = re.sub(r"[\[\](),]+", " ", " ".join(given)).split()
    readable = bool(parts) and all(_reads(x, part) for x in parts)
    example = parts if readable else example
    written = f"{flag} {' '.join(example)}"
    if in_file:
        written = f"{flag.removeprefix('--').replace('-', '_')}: [{', '.join(example)}]"
    if readable:
        return f"{flag} {' '.join(given)}: write `{written}`"
    return f"{flag} {' '.join(given)}: each part must be {kinds.words(part)}, as in `{written}`"


def _unknown(unknown, argv, kinds_of, comments):
    """Words that no flag takes. The first decides what is said, since the others may follow it."""
    word = unknown[0]
    if word.startswith("-"):
        name = word.partition("=")[0]
        near = _near(name.strip("-").replace("_", "-"), kinds_of, comments)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        return f"there is no flag {name}; {meant}{HELP}"
    flag = _flag_before(word, argv)
    if flag is None:
        meant = f"write `--{word}`" if f"--{word.partition('=')[0]}" in kinds_of else HELP
        return f"{word}: belongs to no flag; {meant}"
    if flag.removeprefix("--").replace("-", "_") in NO_VALUE:
        return f"{flag}: takes no value, so not {word}; write `{flag}` alone, or leave it out"
    return f"{flag}: takes one value, so not {word} as well; leave that out"


def _near(word, flags, comments):
    """The flags that may be meant by a word, at most four: the first rule that finds some counts.

    The word is spelled like a flag, is a part of it, abbreviates it (`lr`, `actor-lr`), or is what
    its comment or most other code calls it (`beta1`, `tau`).
    """
    known = [flag.removeprefix("--") for flag in flags]
    near = difflib.get_close_matches(word, known, 3, 0.75)
    near = near or [flag for flag in known if word and f"-{word}" in f"-{flag}"]
    near = near or [flag for flag in known if word in _abbreviations(flag)]
    if not near:
        usual = [flag for flag in known if flag == ELSEWHERE.get(word)]
        near = usual + [x for x in _called(word, comments) if x not in usual]
    return [f"--{flag}" for flag in near[:4]]


def _abbreviations(flag):
    """Initials of two words or more at a flag's end, with and without the words before them."""
    words, found = flag.split("-"), set()
    for i in range(len(words) - 1):
        initials = "".join(word[:1] for word in words[i:])
        found |= {initials, "-".join([*words[:i], initials])}
    return found


def _called(word, comments):
    """The flags whose comments begin with a word, as "beta_1, weight of ..." and "1 / beta" do.

    What is behind the first comma does not count. A word in many comments tells nothing.
    """
    word, found, named = word.replace("-", "").lower(), [], []
    for flag, comment in comments.items():
        first, comma, _ = comment.replace("_", "").lower().partition(",")
        if word in re.findall(r"\w+", first):
            found.append(flag.removeprefix("--"))
        if comma and word == first:
            named.append(flag.removeprefix("--"))
    found = named or found
    return found if len(found) <= 3 else []


def _given(flag, argv):
    """The words that a command line gives to a flag."""
    found = []
    for i, word in enumerate(argv):
        name, sign, value = word.partition("=")
        if name.replace("_", "-") == flag:
            behind = itertools.takewhile(lambda x: not x.startswith("--"), argv[i + 1 :])
            found = [value, *behind] if sign else [*behind]
    return found


def _flag_before(word, argv):
    """The flag to which a word would belong, None where there is none before it."""
    before = None
    for other in argv:
        flag, sign, value = other.partition("=")
        flag = flag.replace("_", "-")
        if other.startswith("--") and sign and value == word:
            return flag
        if other == word:
            return before
        if other.startswith("--"):
            before = None if sign else flag
    return before


def _reads(text, kind):
    try:
        kind(text)
    except (ValueError, OverflowError):
        return False
    return True
