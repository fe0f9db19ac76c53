# SPDX-License-Identifier: Apache-2.0
"""Download files: resume after a broken connection, check the whole file, then put it in place."""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from common import files, one_line

ATTEMPTS = 5  # connections per address, as long as each one brings some bytes
TIMEOUT = 30  # seconds without a byte before a connection counts as broken
CHUNK = 1 << 20


class Unusable(Exception):
    """What arrived is not the file that was asked for."""


def fetch(urls: list[str], path: Path, check: Callable[[Path], None]) -> None:
    """Download `path` from the first of `urls` that has a usable one, unless it is there already.

    Until it is whole, the file is `path.part`, and `path.part.json` records which version of the
    file the server sent. A later call continues if the server still has that version, and starts
    anew if not. `check` raises `Unusable` where the whole file is not what it should be. Address,
    size and SHA-256 are recorded in `path.json`.

    Raises:
        OSError: no address delivered the file; the message has the reason for each.
        Unusable: the file arrived whole, but `check` refused it. It is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with files.locked(path.with_name(path.name + ".lock")):
        if path.exists():  # another process was first
            return
        url = _usable_from_any(urls, part, check)
        record = {"url": url, "bytes": part.stat().st_size, "sha256": sha256(part)}
        record_of(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
        record_of(part).unlink(missing_ok=True)


def _usable_from_any(urls, part, check):
    """The first of `urls` that delivered what `check` accepts."""
    refused = []
    while True:
        try:
            url = _from_any(urls, part)
        except OSError as error:
            raise OSError("; ".join([*refused, str(error)])) from error
        try:
            check(part)
            return url
        except Unusable as error:
            _forget(part)
            urls = urls[urls.index(url) + 1 :]
            if not urls:
                raise
            refused.append(f"{url}: {error}")


def record_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def changed(path: Path) -> str | None:
    """How a file differs from the record of its download, with the remedy; None if it does not."""
    try:
        record = json.loads(record_of(path).read_text(encoding="utf-8"))
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
                if reasons:
                    print(f"downloaded from {url}, since {'; '.join(reasons)}")
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
    """Make one connection. Raises where fewer bytes came than the server announced."""
    from tqdm import tqdm

    have, total, version = _begun(url, part)
    if have and have == total:  # only the check is left
        return
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), None, TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file ends before: what is here is too long, or of another one
            _forget(part)
        raise
    with response:
        length, now = response.headers.get("Content-Length"), _version(response.headers)
        if response.status == 206:
            _check_range(response.headers.get("Content-Range"), now, have, total, version, part)
        else:  # the whole file: the server cannot send a part, or has another version now
            _forget(part)
            total = None if length is None else int(length)
            note = {"address": _address(url), "bytes": total, "version": now}
            record_of(part).write_text(json.dumps(note) + "\n", encoding="utf-8")
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
    """(bytes here, bytes of the whole file, its version); (0, None, None) where not known."""
    try:
        note = json.loads(record_of(part).read_text(encoding="utf-8"))
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
    return url.partition("://")[2]  # https and http of a server have the same file


def _version(headers):
    """The name of a version of a file, None where the server gives no reliable one.

    RFC 9110, 13.1.5: a strong entity tag; the date only where there is no tag at all.
    """
    tag = headers.get("ETag")
    if tag is None:
        return headers.get("Last-Modified") or None
    return tag if tag.startswith('"') else None


def _check_range(said, now, have, total, version, part):
    """The part that came must continue what is here, and have the same version and size."""
    wanted = f"bytes {have}-{(total or 0) - 1}/{total}"
    if said != wanted or now not in (None, version):
        _forget(part)
        raise OSError(f"the server sent {said or 'no range'} of {now}, not {wanted} of {version}")
