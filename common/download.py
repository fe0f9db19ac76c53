# SPDX-License-Identifier: Apache-2.0
"""Files from a server: resumed where a connection broke, checked, then put in place at once."""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from common import locks, one_line

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
    with locks.locked(path.with_name(path.name + ".lock")):
        if path.exists():  # another process was first
            return
        url = _from_any(urls, part)
        try:
            check(part)
        except Unusable:
            _forget(part)
            raise
        record = {"url": url, "bytes": part.stat().st_size, "sha256": sha256(part)}
        record_of(path).write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, path)
        record_of(part).unlink(missing_ok=True)


def record_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def changed(path: Path) -> str | None:
    """What differs from the record of the download and the remedy, None without a difference."""
    try:
        record = json.loads(record_of(path).read_text())
        size, digest = record.get("bytes"), record.get("sha256")
    except (OSError, ValueError, AttributeError):
        return None
    remedy = f"; delete it and {record_of(path).name} beside it, then start again"
    try:
        if isinstance(size, int) and (found := path.stat().st_size) != size:
            return f"{found:,} bytes, but {size:,} were downloaded{remedy}"
        if isinstance(digest, str) and (now := sha256(path)) != digest:  # 1 to 2 s for each GB
            return f"SHA-256 {now[:12]}..., but {digest[:12]}... was downloaded{remedy}"
    except OSError as error:
        return f"cannot be read ({one_line(error)})"
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
            except (OSError, ValueError, http.client.HTTPException) as error:
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

    have, total, version = _begun(url, part)
    if have and have == total:  # only the check is still to be done
        return
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), None, TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what is here: too long, or of another file
            _forget(part)
        raise
    with response:
        length, now = response.headers.get("Content-Length"), _version(response.headers)
        if response.status == 206:
            _check_range(response.headers.get("Content-Range"), now, have, total, version, part)
        else:  # the whole file: the server has no ranges, or another version than before
            _forget(part)
            total = None if length is None else int(length)
            note = {"address": _address(url), "bytes": total, "version": now}
            record_of(part).write_text(json.dumps(note) + "\n")
            have = 0
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
    """(bytes here, bytes of the whole, version) of the file at `url`; 0 bytes where not known."""
    try:
        note = json.loads(record_of(part).read_text())
        have, total, version = part.stat().st_size, note["bytes"], note["version"]
        same = note["address"] == _address(url) and isinstance(total, int)
        if same and isinstance(version, str) and 0 < have <= total:
            return have, total, version
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, None, None


def _forget(part):
    part.unlink(missing_ok=True)
    record_of(part).unlink(missing_ok=True)


def _address(url):
    return url.partition("://")[2]  # https and http of one server have one file


def _version(headers):
    """What tells one version of a file from another, None where nothing surely does.

    RFC 9110, 13.1.5: a strong entity tag; the date only where there is no tag at all.
    """
    tag = headers.get("ETag")
    if tag is None:
        return headers.get("Last-Modified") or None
    return tag if tag.startswith('"') else None


def _check_range(said, now, have, total, version, part):
    """A part of a file must go on where the half ends, and be of the same version and size."""
    wanted = f"bytes {have}-{(total or 0) - 1}/{total}"
    if said != wanted or now not in (None, version):
        _forget(part)
        raise OSError(f"the server sent {said or 'no range'} of {now}, not {wanted} of {version}")
