# SPDX-License-Identifier: Apache-2.0
"""Files from a server: resumed where a connection broke, checked, then put in place at once."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ATTEMPTS = 5  # connections per address that may break, as long as each brings something
TIMEOUT = 30  # seconds without a byte before a connection counts as broken
CHUNK = 1 << 20


class Unusable(Exception):
    """What arrived is not the file that was asked for."""


def fetch(urls: list[str], path: Path, check: Callable[[Path], None]) -> None:
    """Download `path` from the first of `urls` that has it, unless it is there already.

    The bytes so far lie in `path.part`, what the server calls that version of the file in
    `path.part.json`; a later call goes on with them if the server still has that version, and
    begins anew if not. `check` raises `Unusable` where the whole file is not what it should be.
    Address, size and SHA-256 are recorded in `path.json`.

    Raises:
        OSError: no address delivered the file; the message has the reason of each.
        Unusable: the file arrived whole, but `check` refused it. Nothing of it is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _locked(path.with_name(path.name + ".lock")):
        if path.exists():  # another process was first
            return
        url = _from_any(urls, part)
        record_of(part).unlink(missing_ok=True)
        try:
            check(part)
        except Unusable:
            part.unlink()
            raise
        record = {"url": url, "bytes": part.stat().st_size, "sha256": sha256(part)}
        record_of(path).write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, path)


def record_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def changed(path: Path) -> str | None:
    """What differs from the record of the download, None without a record or difference."""
    try:
        record = json.loads(record_of(path).read_text())
        size, digest = record["bytes"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if (found := path.stat().st_size) != size:
        return f"{found:,} bytes, but {size:,} were downloaded"
    if (found := sha256(path)) != digest:  # 0.7 s for each GB
        return f"SHA-256 {found[:12]}..., but {digest[:12]}... was downloaded"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_any(urls, part):
    reasons = []
    for url in urls:
        for _ in range(ATTEMPTS):
            before = part.stat().st_size if part.exists() else 0
            try:
                _get(url, part)
                return url
            except (OSError, http.client.HTTPException) as error:
                reason = " ".join(str(getattr(error, "reason", error)).split())
                if isinstance(error, urllib.error.HTTPError):
                    reason = f"HTTP {error.code} {reason}"
                reason = f"{url.split('://')[0]}: {reason or type(error).__name__}"
                after = part.stat().st_size if part.exists() else 0
                if after == before:
                    break
        reasons.append(reason)
    raise OSError("; ".join(reasons))


def _get(url, part):
    """One connection. Raises where fewer bytes came than the server promised."""
    from tqdm import tqdm

    have, version = _begun(url, part)
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), None, TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what is here: too long, or of another file
            part.unlink()
        raise
    with response:
        length = response.headers.get("Content-Length")
        if response.status == 206:
            total = _total(response.headers.get("Content-Range"), have, part)
        else:  # the whole file: the server has no ranges, or another version than before
            have, total = 0, None if length is None else int(length)
            part.unlink(missing_ok=True)
            note = {"address": _address(url), "version": _version(response.headers)}
            record_of(part).write_text(json.dumps(note) + "\n")
        bar = tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with part.open("ab") as file, bar:
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
    got = part.stat().st_size
    if total is not None and got != total:
        raise OSError(f"the connection ended after {got:,} of {total:,} bytes")


def _begun(url, part):
    """How many bytes are here of the file at `url`, and of which version: 0 where not known."""
    try:
        note = json.loads(record_of(part).read_text())
        same = note["address"] == _address(url) and isinstance(note["version"], str)
        return (part.stat().st_size, note["version"]) if same else (0, None)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _address(url):
    return url.partition("://")[2]  # https and http of one server have one file


def _version(headers):
    """What tells one version of a file from another (RFC 9110, 13.1.5): no weak entity tag."""
    tag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if tag.startswith("W/") else tag


def _total(content_range, have, part):
    """Bytes of the whole file, where the server sends those that are not here yet."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range or "")
    if not found or int(found[1]) != have or int(found[2]) != int(found[3]) - 1:
        part.unlink(missing_ok=True)
        raise OSError(f"the server sent {content_range or 'no range'}, not bytes from {have:,} on")
    return int(found[3])


@contextlib.contextmanager
def _locked(path):
    """Two processes must not append to one file: the second waits for the first."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The one before may have removed the file while this one waited for it.
            held = os.fstat(file.fileno())
            if not path.exists() or not os.path.samestat(held, path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink()
            return
