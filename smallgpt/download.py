"""Downloads that resume after a broken connection and are checked before they are kept."""

import hashlib
import logging
import time
from pathlib import Path

log = logging.getLogger(__name__)


def download(url: str, destination: Path, *, checksum: str, attempts: int = 4, backoff: float = 0.5) -> Path:
    """Fetch `url` once; a broken connection is resumed after `backoff` seconds, doubled each time.

    Args:
        checksum: "sha256:..." or "md5:..." of the whole file; a file already there is checked, too.

    Raises:
        ValueError: the checksum differs.
        OSError: the network or the server failed; the message says what to fetch by hand and where to put it.
    """
    import requests  # here, so that reading prepared text needs no network library

    if destination.exists():
        verify(destination.read_bytes(), str(destination), checksum, f"remove it to download {url} again")
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(f"{destination.name}.part")
    for attempt in range(1, attempts + 1):
        try:
            _fetch(url, part)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            reason = f"HTTP {status}" if status else type(error).__name__
            if attempt == attempts or (status and status < 500):
                remedy = f"fetch it by hand where there is a network and save it as {destination}"
                raise OSError(f"cannot download {url} ({reason}); {remedy}") from None
            log.warning("download of %s broke off (%s), trying again", url, reason)
            time.sleep(backoff * 2 ** (attempt - 1))
    try:
        verify(part.read_bytes(), url, checksum, f"try again, or fetch it by hand and save it as {destination}")
    except ValueError:
        part.unlink()
        raise
    part.replace(destination)
    return destination


def _fetch(url: str, part: Path) -> None:
    """Append what `part` lacks of `url`, or write it anew when the server ignores the range or has none such."""
    import requests
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # a range of a compressed answer would not be a range of the file
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if response.status_code == 416 and have:
            part.unlink()
            return _fetch(url, part)
        response.raise_for_status()
        have = have if response.status_code == 206 else 0
        total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        progress = tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, disable=None)
        with part.open("ab" if have else "wb") as file, progress:
            for piece in response.iter_content(1 << 16):
                file.write(piece)
                progress.update(len(piece))
    return None


def verify(data: bytes, name: str, checksum: str, remedy: str) -> None:
    """Raise ValueError, with both sums and the remedy, unless `data` has the `checksum` ("kind:hex")."""
    kind, expected = checksum.split(":")
    found = hashlib.new(kind, data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"{name} has {kind} {found}, not {expected}; {remedy}")
