"""One large file of the Hugging Face hub, downloaded into its cache so that nothing is paid twice.

The hub's own client goes on after a broken connection, but begins anew in each process (since its
release 2: a partial file in a fixed place is not safe where file locks are not honoured). Weights
are gigabytes, and a process may be killed; so their files are written here, under a lock, beside
where the client looks for them: it finds them complete.
"""

import fcntl
import os
from pathlib import Path

_PART = ".nanogpt-part"


def begun_bytes(repo: str) -> int:
    """What earlier downloads of a repository have left unfinished."""
    return sum(part.stat().st_size for part in _blobs(repo).glob(f"*{_PART}"))


def _blobs(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs"


def fetch_blob(repo: str, revision: str, filename: str) -> Path:
    """The content of a file of a repository; another process that fetches it is waited for.

    Raises OSError or httpx2.HTTPError when it can't be had. The caller compares its checksum.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(repo, filename, revision=revision), build_hf_headers()
    found = get_hf_file_metadata(url, headers=headers)
    if found.etag is None:
        raise OSError(f"the hub says no checksum for {filename}")
    blob = _blobs(repo) / found.etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(blob.name + _PART)
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not blob.exists():  # nobody else was faster
            size = file.seek(0, os.SEEK_END)  # now, since another process may have come further
            if found.size is not None and size > found.size:
                size = file.truncate(0)
            http_get(
                url,
                file,
                resume_size=size,
                headers=headers,
                expected_size=found.size,
                displayed_filename=filename,
            )
            file.flush()
            os.replace(part, blob)
        else:
            part.unlink(missing_ok=True)
    return blob
