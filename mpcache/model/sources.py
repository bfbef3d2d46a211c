"""Find the model that --model names: a folder, a .gguf file, or a model of the Hugging Face hub.

What is there under the name is taken before the hub is asked. The hub's cache, token and offline switch
(HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) are those of the `huggingface_hub` package.
"""

from __future__ import annotations

import re
from pathlib import Path

from mpcache.errors import ModelError, MpcacheError
from mpcache.model.checks import first_words, shorten

FORMS = "a Hugging Face folder, a .gguf file, or OWNER/NAME[@REVISION][:FILE.gguf] of the hub"
_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(:(?P<file>[\w./-]+\.gguf))?", re.ASCII
)
_SMALL = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "adapter_config.json", "model.safetensors.index.json",
]  # fmt: skip
_WEIGHTS = ["model*.safetensors"]


def is_gguf(path: Path) -> bool:
    """Whether a path names a .gguf file."""
    return path.suffix.lower() == ".gguf"


def find_model(name: Path | str, weights: bool = True) -> Path:
    """Return the folder or file of a model, fetched from the hub where it is not here.

    weights: whether the tensors are needed, too; a .gguf file is one piece. Raises ModelError.
    """
    text, path = str(name), Path(name)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ModelError(f"--model {shorten(text)}: {first_words(error)}; give {FORMS}") from None
    if there:
        return path
    found = _HUB_ID.fullmatch(text)
    if found is None or ".." in text:
        raise ModelError(
            f"{text}: no such model folder or file, nor can a hub model have that name; give {FORMS}"
        )
    repo, revision, file = found["repo"], found["revision"], found["file"]
    wanted = [file] if file is not None else _SMALL + _WEIGHTS * weights
    folder = _fetch(text, repo, revision, wanted)
    if file is not None:
        if not (folder / file).is_file():
            raise ModelError(f"{text}: this hub model has no file {file}; check its name on the hub")
        return folder / file
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{text}: this hub model has no config.json; where it has .gguf files, name one: {text}:FILE.gguf"
        )
    return folder


def _fetch(text: str, repo: str, revision: str | None, wanted: list[str]) -> Path:
    """Return the folder in the hub's cache, with what is wanted in it. Raises ModelError."""
    # Imported here: it takes a fifth of a second, and few runs need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except MpcacheError:
        raise  # a stop signal's
    except Exception as error:  # of any kind: the library passes on those of four others
        raise ModelError(f"{text}: no such folder or file here, and {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Say why the hub did not give it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # neither from the hub nor from its cache
        match error.__cause__:
            case errors.OfflineModeIsEnabled() as offline:
                error = offline
            case errors.HfHubHTTPError(response=answer) if answer is not None:
                return f"the hub answers {answer.status_code}, its cache does not hold it; come again later"
    # The first kind that fits: some of them are kinds of others.
    told = (
        (
            errors.OfflineModeIsEnabled,
            "HF_HUB_OFFLINE is set, and the hub's cache does not hold it; unset it",
        ),
        (
            errors.LocalEntryNotFoundError,
            "the hub cannot be reached, nor does its cache hold this model; go online",
        ),
        (
            errors.GatedRepoError,
            "the hub gives it to those who accepted its terms; do so there, and set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such model, or not for your HF_TOKEN; check the name",
        ),
        (errors.RevisionNotFoundError, "the hub's model has no such revision; check what follows the @"),
    )
    for kind, words in told:
        if isinstance(error, kind):
            return words
    return f"the hub did not give it: {first_words(error)}"
