"""Finding checkpoints and refusing bad ones: always one line that names the file and what to do."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from forecasters import (
    CheckpointError,
    checkpoints,
    kronos_checkpoint,
    kronos_network,
    kronos_sizes,
    toto,
    toto_checkpoint,
    toto_network,
    toto_sizes,
)
from forecasters.checkpoints import BUNDLED, resolve

GOLDEN = Path(__file__).parent / "goldens" / "toto-a"
UNEMBED = "model.unembed.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint that a test may spoil."""
    shutil.copytree(GOLDEN, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(folder: Path) -> str:
    """The error of loading; checking without the weights must say the same."""
    with pytest.raises(CheckpointError) as loading:
        toto.load(str(folder))
    with pytest.raises(CheckpointError) as checking:
        toto_checkpoint.inspect(str(folder))
    assert str(loading.value) == str(checking.value)
    assert "\n" not in str(loading.value)
    return str(loading.value)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "-"}))


def test_a_missing_tensor_is_named_with_its_shape(folder: Path):
    rewrite(folder, **{UNEMBED: None})
    message = refused(folder)
    assert "model.safetensors: tensor unembed.weight is missing, expected shape [768, 48]" in message


def test_an_extra_tensor_is_refused(folder: Path):
    rewrite(folder, **{"model.target_variate_label": torch.ones(48)})
    assert "unexpected tensor model.target_variate_label of shape [48]" in refused(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path):
    rewrite(folder, **{UNEMBED: torch.ones(768, 47)})
    assert "tensor model.unembed.weight has shape [768, 47], expected [768, 48]" in refused(folder)


def test_a_tensor_under_two_names_is_refused(folder: Path):
    rewrite(folder, **{"unembed.weight": torch.ones(768, 48)})
    assert "is there twice" in refused(folder)


def test_a_tensor_of_whole_numbers_is_refused(folder: Path):
    rewrite(folder, **{UNEMBED: torch.ones(768, 48, dtype=torch.int32)})
    assert "is I32, expected one of F64, F32, F16, BF16" in refused(folder)


def test_half_precision_is_read_as_fp32(folder: Path):
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    assert toto.load(str(folder)).network.unembed.weight.dtype == torch.float32


@pytest.mark.parametrize("kept", [0, 4, 1000, 300_000])
def test_a_truncated_file_is_refused(folder: Path, kept: int):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    assert "model.safetensors: not a complete safetensors file" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_never_read(folder: Path, name: str):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: only safetensors is read, never a pickle"):
        toto.load(str(folder))


def test_an_empty_folder_and_a_missing_config_are_refused(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        resolve(str(tmp_path / "empty"))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        resolve(str(folder))


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
def test_a_corrupt_config_is_refused(folder: Path, text: str):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json: " in refused(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed_dim": "-"}, "the key 'embed_dim' is missing"),
        ({"embed_dims": 48}, "unknown key 'embed_dims'"),
        ({"num_layers": 4.0}, "num_layers is 4.0, expected a positive whole number"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 5}, "embed_dim is 48, expected an even multiple of num_heads"),
        ({"stride": 8}, "stride is 8, expected patch_size"),
        ({"spacewise_every_n_layers": 3}, "spacewise_every_n_layers is 3"),
        ({"scaler_cls": "<class 'model.scaler.StdMeanScaler'>"}, "scaler_cls is"),
        ({"output_distribution_classes": ["<class 'model.distribution.StudentTOutput'>"]}, "classes is"),
        ({"output_distribution_kwargs": None}, "output_distribution_kwargs is None"),
        ({"output_distribution_kwargs": {"k_components": 6}}, "has shape [5], expected [6]"),
    ],
)
def test_a_wrong_config_names_its_key(folder: Path, changes: dict[str, Any], said: str):
    reconfigure(folder, **changes)
    message = refused(folder)
    assert said in message
    assert str(folder) in message


def test_keys_with_a_published_default_may_be_absent(folder: Path):
    reconfigure(folder, scale_factor_exponent="-", stabilize_with_global="-", pre_xformers_checkpoint=True)
    assert toto_checkpoint.inspect(str(folder))
    assert toto_checkpoint.read_config(resolve(str(folder))).scale_factor_exponent == 10.0


def test_shards_are_read_through_their_index(folder: Path):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    shards = {f"model-{i:05d}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / shard)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        resolve(str(folder))
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = resolve(str(folder))
    network = toto_network.TotoNetwork(toto_checkpoint.read_config(found))
    checkpoints.load_into(found, network, toto_checkpoint.rename)
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name.removeprefix("model.")], tensor) for name, tensor in state.items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: no such file"):
        resolve(str(folder))


def test_names_are_bundled_or_folders_or_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve("toto-tiny").folder == BUNDLED / "toto-tiny"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN, tmp_path / "org" / "name")
    assert resolve("org/name").folder == tmp_path / "org" / "name"
    for absent in ("./none", "~/none-such-folder", "/none/such", "toto-tyni", "../toto-tiny"):
        with pytest.raises(CheckpointError, match=r"no such folder.*bundled checkpoint \(.*toto-tiny"):
            resolve(absent)
    with pytest.raises(CheckpointError, match=r"a revision .* is for hub ids only"):
        resolve("toto-tiny", revision="main")


@pytest.mark.parametrize("learnt", [True, False])
def test_shapes_without_torch_are_those_of_the_networks(learnt: bool):
    toto_sizes_of = [toto_checkpoint.read_config(resolve(name)) for name in (str(GOLDEN), "toto-tiny")]
    kronos = replace(kronos_checkpoint.read_config(resolve("kronos-tiny")), learn_te=learnt, n_layers=3)
    coder = replace(
        kronos_checkpoint.read_tokenizer_config(resolve(kronos_checkpoint.tokenizer_of("kronos-tiny"))), n_dec_layers=4
    )
    with torch.device("meta"):
        expected = [
            *((toto_sizes.shapes(config), toto_network.TotoNetwork(config)) for config in toto_sizes_of),
            (kronos_sizes.network_shapes(kronos), kronos_network.KronosNetwork(kronos)),
            (kronos_sizes.tokenizer_shapes(coder), kronos_network.KronosTokenizer(coder)),
        ]
    for shapes, network in expected:
        assert shapes == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def test_a_child_reads_files_again_only_where_they_changed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(checkpoints.DIGESTS, raising=False)
    first = resolve(str(folder)).digest
    (key,) = json.loads(os.environ[checkpoints.DIGESTS])
    inherited = {"STUDIES_DIGESTS": json.dumps({key: "inherited"})}
    script = f"from forecasters.checkpoints import resolve; print(resolve({str(folder)!r}).digest)"

    def of_a_child() -> str:
        command = [sys.executable, "-c", script]
        ended = subprocess.run(command, env={**os.environ, **inherited}, capture_output=True, text=True, check=True)
        return ended.stdout.strip()

    assert of_a_child() == "inherited"
    weights = folder / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    os.utime(weights, ns=times)  # as a copy that keeps times leaves it: of the same size and age
    changed = of_a_child()
    assert changed not in ("inherited", first)
    assert changed == resolve(str(folder)).digest


def test_the_digest_follows_weights_and_config(folder: Path):
    first = resolve(str(folder)).digest
    assert first == resolve(str(GOLDEN)).digest
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    second = resolve(str(folder)).digest
    rewrite(folder, **{UNEMBED: torch.ones(768, 48)})
    assert len({first, second, resolve(str(folder)).digest}) == 3


def test_checking_reads_no_weights(folder: Path):
    """Zeros in place of all weights leave the answer of the check, which sees the header only."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:header])
    os.truncate(path, len(whole))
    assert toto_checkpoint.inspect(str(folder))
    assert toto_checkpoint.read_config(resolve(str(folder))).embed_dim == 48


def in_process_with_hub(endpoint: str, home: Path, *lines: str) -> str:
    """Run lines after the import in a process of their own: the hub's settings are read at import."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    imports = ("import forecasters", "from forecasters import *", "from forecasters.checkpoints import resolve")
    script = "\n".join((*imports, *lines))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={key: value for key, value in environment.items() if key != "HF_HUB_OFFLINE"},
        cwd=BUNDLED.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("listening", [False, True])
def test_an_unreachable_hub_is_an_error_in_seconds(tmp_path: Path, listening: bool):
    """Refused at once, or a server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        kronos = "'kronos', checkpoint='kronos-tiny', tokenizer='org/name', tokenizer_revision=None"
        asked = kronos if listening else "'toto', checkpoint='org/name'"
        inspecting = f"forecasters.inspect({asked}, revision=None, running=Running())"
        lines = (f"try: {inspecting}", "except CheckpointError as error: print(error)")
        began = time.monotonic()
        said = in_process_with_hub(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, *lines)
    assert time.monotonic() - began < 30  # most of it is the import of torch
    assert said.startswith("checkpoint 'org/name' cannot be had from http://127.0.0.1:")
    setting = "[kronos] tokenizer" if listening else "[toto] checkpoint"
    assert f'name a local folder with config.json and model.safetensors instead: {setting} = "./name"' in said
    assert "\n" not in said


class Hub(BaseHTTPRequestHandler):
    """The three requests of a download: the listing, then HEAD and GET of a file at that commit."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        if self.path.startswith("/api/models/org/name"):
            names = ("config.json", "model.safetensors", "pytorch_model.bin", "README.md")
            listing = {"id": "org/name", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(json.dumps(listing).encode())
        prefix = f"/org/name/resolve/{self.commit}/"
        name = self.path.removeprefix(prefix)
        assert self.path.startswith(prefix)
        assert name in ("config.json", "model.safetensors")
        return self.answer((GOLDEN / name).read_bytes(), etag=f'"{name}"')

    do_HEAD = do_GET

    def answer(self, body: bytes, etag: str = ""):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object):
        pass


def test_a_hub_id_is_downloaded_pinned_and_found_again_without_a_network(tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        first = in_process_with_hub(endpoint, tmp_path, "c = resolve('org/name')", "print(c.folder.name, c.digest)")
    finally:
        server.shutdown()
        server.server_close()
    assert first == f"{Hub.commit} {resolve(str(GOLDEN)).digest}"
    pinned = f"c = resolve('org/name', revision='{Hub.commit}')"
    assert in_process_with_hub(endpoint, tmp_path, pinned, "print(c.folder.name, c.digest)") == first
