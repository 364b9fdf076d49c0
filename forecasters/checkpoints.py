"""Where weights come from, and the strict reading of them.

Owns the finding of a checkpoint (bundled name, local folder, hub id) and the rule that every tensor of a network must
be in the file, none besides, each in its shape. Reads safetensors only. Knows nothing of the networks it loads into.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from forecasters import CheckpointError

if TYPE_CHECKING:
    from torch import nn

BUNDLED = Path(__file__).parent / "checkpoints"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_TIMEOUT_S = 5.0  # for each question to the hub; a file's download is bounded by the hub's own read timeout

DIGESTS = "STUDIES_DIGESTS"  # in the environment: digests by the states of their files

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Rename = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that holds one network's config.json and weights."""

    source: str  # as the user named it
    folder: Path
    weights: tuple[Path, ...]

    @cached_property
    def digest(self) -> str:
        """sha256, as hex, of the configuration's and the weights' bytes; computed once (about 1 s a GB).

        Child processes inherit it through the environment, for the files as they were; changed ones are read again.
        """
        files = (self.folder / CONFIG, *self.weights)
        known = json.loads(os.environ.get(DIGESTS, "{}"))
        before = _states(files)
        if before in known:
            return known[before]
        whole = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        if _states(files) == before:
            os.environ[DIGESTS] = json.dumps({**known, before: whole.hexdigest()})
        return whole.hexdigest()

    def config(self, required: Sequence[str], optional: Sequence[str] | None = ()) -> dict[str, Any]:
        """The entries of config.json. Raises CheckpointError on a missing or an unknown key.

        optional: None: any other key may be there.
        """
        path = self.folder / CONFIG
        entries = _read_json(path)
        for key in required:
            if key not in entries:
                raise CheckpointError(
                    f"{path}: the key {key!r} is missing; use the config.json published with the weights"
                )
        for key in entries:
            if optional is not None and key not in (*required, *optional):
                raise CheckpointError(f"{path}: unknown key {key!r}; this is not a configuration of this network")
        return entries


def resolve(source: str, *, revision: str | None = None, setting: str = "checkpoint") -> Checkpoint:
    """Find a checkpoint.

    source: a bundled name (a folder below forecasters/checkpoints, which goes before a local folder of that name), a
    local folder (one that exists, or anything that starts with . / ~), or a hub id `org/name`.
    revision: a branch, tag or commit of a hub id. A commit that was downloaded before needs no network.
    setting: what names the source, for messages: "[toto] checkpoint".
    Raises CheckpointError; nothing is ever used in place of what was named.
    """
    if not source.startswith((".", "/", "~")):
        bundled = BUNDLED / source
        if ".." not in bundled.parts and (bundled / CONFIG).is_file():
            return _local(source, bundled, revision)
        if not Path(source).is_dir() and _HUB_ID.fullmatch(source):
            return _from_hub(source, revision, setting)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        names = ", ".join(sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))) or "none"
        raise CheckpointError(
            f"checkpoint {source!r}: no such folder; name a folder with {CONFIG} and {WEIGHTS}, "
            f"a hub id like org/name, or a bundled checkpoint ({names})"
        )
    return _local(source, folder, revision)


def check(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]], rename: Rename) -> None:
    """Refuse a checkpoint that does not fit a network, from the files' headers alone: without weights and torch.

    shapes: of the network's tensors, by its own names.

    rename: a stored name to the network's, or None for a tensor that is dropped on purpose.
    Raises CheckpointError naming the file, the tensor, the expected and the found shape.
    """
    found: dict[str, Path] = {}
    for path, stored, name, entry in _entries(checkpoint, rename):
        shape, dtype = list(entry.get_shape()), entry.get_dtype()
        if name not in shapes:
            raise CheckpointError(
                f"{path}: unexpected tensor {stored} of shape {shape}; expected none of that name: "
                f"these weights are of another network than {CONFIG} beside them describes"
            )
        if name in found:
            raise CheckpointError(f"{path}: tensor {stored} is there twice (also in {found[name]}); remove one of them")
        if shape != list(shapes[name]):
            raise CheckpointError(
                f"{path}: tensor {stored} has shape {shape}, expected {list(shapes[name])}; "
                f"use the {CONFIG} that was published with these weights"
            )
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: tensor {stored} is {dtype}, expected one of {', '.join(_FLOATS)}; convert it"
            )
        found[name] = path
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.weights[0]}: tensor {missing[0]}{more} is missing, "
            f"expected shape {list(shapes[missing[0]])}; get the complete file"
        )


def load_into(checkpoint: Checkpoint, network: nn.Module, rename: Rename) -> None:
    """Check, then load the weights into the network (which may be on the meta device) as fp32 on the CPU.

    Raises CheckpointError.
    """
    import torch

    check(checkpoint, {name: tensor.shape for name, tensor in network.state_dict().items()}, rename)
    # A copy, because safetensors maps the file: a file replaced later must not change a running worker.
    state = {
        name: entry[...].to(torch.float32, copy=True).contiguous()
        for _, _, name, entry in _entries(checkpoint, rename, "pt")
    }
    network.load_state_dict(state, strict=True, assign=True)


def _states(files: Sequence[Path]) -> str:
    """Changes with any of the files; a time of change cannot be set back, as that of modification can."""
    found = [(path, path.stat()) for path in files]
    return repr([(str(path), of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns) for path, of in found])


def _entries(checkpoint: Checkpoint, rename: Rename, framework: str = "numpy") -> Iterator[tuple[Path, str, str, Any]]:
    """File, stored name, the network's name and safetensors' lazy slice of every tensor that is not dropped."""
    for path in checkpoint.weights:
        try:
            with safe_open(path, framework=framework, device="cpu") as file:
                for stored in sorted(file.keys()):
                    name = rename(stored)
                    if name is not None:
                        yield path, stored, name, file.get_slice(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file ({_line(error)}); get it again") from error


def _local(source: str, folder: Path, revision: str | None) -> Checkpoint:
    if revision is not None:
        raise CheckpointError(f"checkpoint {source!r}: a revision ({revision}) is for hub ids only; leave it out")
    return Checkpoint(source=source, folder=folder.resolve(), weights=_weights(folder.resolve()))


def _weights(folder: Path) -> tuple[Path, ...]:
    """The weight files of a folder: one file, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{folder / INDEX}: no weight_map from tensors to files; get the file again")
        files = [folder / Path(name).name for name in sorted(set(names.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: only safetensors is read, never a pickle; convert it to {WEIGHTS}"
            )
        raise CheckpointError(f"{folder}: no {WEIGHTS}; name the folder that holds it and {CONFIG}")
    if len(files) > 1 and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: {len(files)} safetensors files and no {INDEX}; keep one, or add the index")
    for path in (folder / CONFIG, *files):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a checkpoint is {CONFIG} and its safetensors")
    return tuple(files)


def _from_hub(source: str, revision: str | None, setting: str) -> Checkpoint:
    # Late: 0.2 s that a local folder need not pay.
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # httpx in huggingface_hub 1.x, httpx2 in 2.x: their common root is the first base of the hub's own error.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    if pinned or constants.HF_HUB_OFFLINE:
        config = try_to_load_from_cache(source, CONFIG, revision=revision)
        if isinstance(config, str):
            return Checkpoint(source=source, folder=Path(config).parent, weights=_weights(Path(config).parent))
    try:
        # The listing has a timeout and pins the commit; snapshot_download's own listing has none (hub 2.4).
        info = HfApi().model_info(source, revision=revision, timeout=HUB_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
        wanted = [name for name in names if name in (CONFIG, INDEX) or name.endswith(".safetensors")]
        if CONFIG not in wanted or len(wanted) < 2:
            raise CheckpointError(
                f"checkpoint {source!r}: the hub's repository has no {CONFIG} with safetensors; "
                "only safetensors is read, name another repository or a local folder like ./toto-base"
            )
        # Without a network one file takes 1 + 2 + 4 + ... s of the hub's own retries: the listing above fails first.
        paths = [hf_hub_download(source, name, revision=info.sha, etag_timeout=HUB_TIMEOUT_S) for name in wanted]
    except (http_error, OSError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"checkpoint {source!r}{at} cannot be had from {constants.ENDPOINT} ({_line(error)}); "
            f'name a local folder with {CONFIG} and {WEIGHTS} instead: {setting} = "./{source.split("/")[-1]}"'
        ) from error
    folder = Path(paths[0]).parent
    return Checkpoint(source=source, folder=folder, weights=_weights(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({_line(error)}); get the file again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: holds no JSON object; get the file again")
    return entries


def _line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
