"""Find a model folder on this machine, or by its name on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from gptcore.files import PathLike

_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # "gpt2", "openai-community/gpt2"


def find_folder(name_or_path: PathLike, patterns: Sequence[str]) -> Path:
    """Return the folder `name_or_path` if it exists, else the one in `huggingface_hub`'s cache with a Hub name's files.

    Only a str can be a name. patterns: the files wanted, "*.safetensors" and the like; those that the Hub does not have
    are not there. HF_HOME says where the cache is; HF_HUB_OFFLINE=1 means to look nowhere else.

    Raises FileNotFoundError where there is neither, or no network and nothing in the cache; NotADirectoryError where
    there is something else than a folder.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if os.path.lexists(path):
        raise NotADirectoryError(f"{path} is {'a link that leads nowhere' if path.is_symlink() else 'not a folder'}")
    if not isinstance(name_or_path, str) or not _NAME.fullmatch(name_or_path):
        raise FileNotFoundError(f"there is no folder {path} (looked from {Path.cwd()})")
    import huggingface_hub  # slow to import, and rarely needed

    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=list(patterns)))
    except Exception as error:  # of the network, the Hub and the cache: what matters is that the files are not here
        offline = ", and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines() or [""]
        raise FileNotFoundError(
            f"there is no folder {path} (looked from {Path.cwd()}), and the Hugging Face Hub gave nothing for this "
            f"name: {reason[0]} ({type(error).__name__}{offline}). Give a folder with the files, or download "
            "them once where there is a network"
        ) from error
